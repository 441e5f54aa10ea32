"""Nets that do something else in training than in inference, attached: detectors above all."""
import copy
import pickle

import mxnet as mx
import numpy as np
import pytest
from detector_nets import (
    Detector,
    assert_equal,
    assert_trains_alike,
    gradients,
    made,
    outputs,
    pictures,
    training_outputs,
)
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.layers import quantizers
from gluonquant.symbol_graph import QUANTIZE, TWIN


class WithTargets(nn.HybridBlock):
    """Takes targets in training and returns losses, as gluoncv's YOLOv3 and Faster R-CNN do.

    In training the second layer reads a part of the map only: another tensor, of another node of the same name.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.body = nn.Conv2D(6, 3, padding=1, activation='relu')
            self.top = nn.Conv2D(6, 3, padding=1, activation='relu')
            self.head = nn.Conv2D(2, 1)

    def hybrid_forward(self, F, x, target=None):
        x = self.body(x)
        if autograd.is_training():
            x = F.slice_axis(x, axis=2, begin=0, end=4)
        x = self.head(self.top(F.Pooling(x, kernel=(1, 1), stride=(1, 1), name='look')))
        if autograd.is_training():
            return F.square(x - F.broadcast_like(target, x)), F.abs(x)
        return F.softmax(x, axis=1), F.argmax(x, axis=1)


TARGET = nd.ones((4, 2, 4, 8))


def attached(net=None, **options):
    net = gq.attach(net or made(), **options)
    gq.calibrate(net, [pictures()])
    return net


def with_targets(**options):
    return attached(made(WithTargets()), training_inputs=('data', 'target'), **options)


# ---------------------------------------------------------------- what the graph is


def test_both_ends_are_in_the_graph_and_what_they_share_is_there_once():
    net = attached()
    assert net.training.inputs == ['data'] and net.training.heads == 2
    convolutions = [node for node in net.graph.nodes() if node.op == 'Convolution']
    assert len(convolutions) == 7 and not any(TWIN in node.attrs for node in net.graph.nodes())


def test_a_net_that_does_the_same_in_training_has_one_end():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(3))
    made(net)
    assert gq.attach(net).training is None


def test_what_only_decides_stays_float():
    net = gq.attach(made())
    rows = gq.explain(net, 'Concat').rows
    assert rows and all(row.quantizer is None and 'no layer depends on it' in row.reason for row in rows)


@pytest.mark.parametrize('target', [None, 'tensorrt', 'onnxruntime', 'openvino', 'onednn'])
def test_a_tensor_has_one_quantizer_in_inference_and_training(target):
    net = with_targets(target=target)
    readers = {}
    for node in net.graph.nodes():
        if node.op == QUANTIZE:
            readers.setdefault(node.attrs['quantizer'], []).append(node.inputs[0].node)
    twins = [sources for sources in readers.values() if len(sources) > 1]
    assert twins and all({source.attrs.get(TWIN, source.name) for source in sources} ==
                         {sources[0].attrs.get(TWIN, sources[0].name)} for sources in twins)
    assert all(len(quantizer.tensors) == 1 for quantizer in quantizers(net, 'activation').values())
    assert all(quantizer.calibrated for quantizer in quantizers(net).values())


# ---------------------------------------------------------------- what it computes


def test_switched_off_it_is_the_float_net_in_both_modes():
    net = attached()
    gq.set_mode(net, 'off')
    assert_equal(outputs(net), outputs(made()))
    assert_equal(training_outputs(net), training_outputs(made()))
    net = with_targets()
    gq.set_mode(net, 'off')
    assert_equal(outputs(net), outputs(made(WithTargets())))
    assert_equal(training_outputs(net, TARGET), training_outputs(made(WithTargets()), TARGET))


@pytest.mark.parametrize('method', ['lsq', 'fqn', 'int8'])
def test_attach_and_convert_give_the_same(method):
    one = attached(method=method, ops=('Convolution',))
    other = gq.convert(made(), method=method)
    gq.calibrate(other, [pictures()])
    for path, quantizer in quantizers(one, 'weight').items():
        np.testing.assert_array_equal(quantizer.qparams().scale, quantizers(other)[path].qparams().scale)


@pytest.mark.parametrize('kind', ['detector', 'targets'])
@pytest.mark.parametrize('flags', [{}, {'static_alloc': True, 'static_shape': True}], ids=['plain', 'static'])
def test_hybridized_once_it_serves_both_modes(kind, flags):
    def ready():
        return attached(bits=8, method='int8') if kind == 'detector' else with_targets(bits=8, method='int8')
    targets = [] if kind == 'detector' else [TARGET]
    plain, hybrid = ready(), ready()
    hybrid.hybridize(**flags)
    for _ in range(2):
        assert_equal(outputs(hybrid), outputs(plain))
        assert_trains_alike(training_outputs(hybrid, *targets), training_outputs(plain, *targets),
                            gradients(hybrid, *targets), gradients(plain, *targets))


def test_it_is_traced_once_for_each_mode():
    net = attached()
    net.hybridize()
    traced = []
    for _ in range(3):
        for run in (outputs, training_outputs):
            run(net)
            traced.append(net._cached_op)
    assert traced[0] is not traced[1] and traced == traced[:2] * 3
    gq.freeze_batchnorm(net)
    for run in (outputs, training_outputs):
        run(net)
        assert net._cached_op not in traced


def test_exported_is_what_it_does_in_inference(tmp_path):
    net = gq.freeze(gq.freeze_batchnorm(attached()))
    net.hybridize()
    expected = outputs(net)
    training_outputs(net)
    net.export(str(tmp_path / 'net'))
    again = gluon.SymbolBlock.imports(str(tmp_path / 'net-symbol.json'), 'data', str(tmp_path / 'net-0000.params'))
    assert_equal(outputs(again), expected)


def test_it_trains_with_targets():
    net = with_targets()
    net.hybridize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.005, 'momentum': 0.9})
    losses = []
    for _ in range(15):
        with autograd.record():
            loss = net(pictures(), TARGET)[0].mean()
        loss.backward()
        trainer.step(1)
        losses.append(float(loss.asscalar()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize('fold', ['frozen', 'batch'])
def test_folded(fold):
    net = gq.attach(made(), bits=8, method='fqn')
    gq.fold(net, fold)
    gq.calibrate(net, [pictures()])
    for one, other in zip(outputs(net), outputs(made())):
        assert np.abs(one - other).mean() < 0.1 * np.abs(other).max()
    assert all(np.isfinite(part).all() for part in training_outputs(net))


# ---------------------------------------------------------------- files and copies


@pytest.mark.parametrize('way', ['file', 'file into float', 'copy', 'pickle'])
@pytest.mark.parametrize('kind', ['detector', 'targets'])
def test_a_copy_does_the_same_in_both_modes(tmp_path, kind, way):
    net = gq.freeze(attached() if kind == 'detector' else with_targets())
    targets = [] if kind == 'detector' else [TARGET]
    if way.startswith('file'):
        gq.save(net, tmp_path / 'net.npz')
        float_net = made(Detector() if kind == 'detector' else WithTargets())
        again = gq.load(tmp_path / 'net.npz', *([float_net] if way == 'file into float' else []))
    else:
        again = copy.deepcopy(net) if way == 'copy' else pickle.loads(pickle.dumps(net))
    assert_equal(outputs(again), outputs(net))
    assert_equal(training_outputs(again, *targets), training_outputs(net, *targets))
    assert again.training == net.training


def test_deployed_is_what_it_does_in_inference():
    net = attached(bits=8, method='int8', target='onnxruntime', exclude=['softmax*'])
    final = gq.finalize(net)
    assert len(final.graph.heads.inputs) == 2 and final.inputs == ['data']
    np.testing.assert_allclose(outputs(final)[1], outputs(net)[1], rtol=0.05, atol=0.05)
    with pytest.raises(RuntimeError, match='holds what it does in inference'):
        training_outputs(final)


class Differs(nn.HybridBlock):
    """One head on two maps of different size; in training the picture, or the second map, is another tensor."""

    def __init__(self, which, **kwargs):
        super().__init__(**kwargs)
        self.which = which
        with self.name_scope():
            self.body = nn.Conv2D(6, 3, activation='relu')
            self.head = nn.Conv2D(2, 1)

    def hybrid_forward(self, F, x):
        train = autograd.is_training()
        x = self.body(x * 1 if train and self.which == 'data' else x)
        y = F.tanh(x) * 50
        return self.head(x), self.head(y * 1 if train and self.which == 'map' else y)


@pytest.mark.parametrize('which', ['data', 'map'])
def test_what_exists_in_training_only_has_the_range_of_what_stands_there_in_inference_or_none(which):
    net = Differs(which)
    net.initialize()
    net = attached(net, method='int8', bits=8)
    expected = training_outputs(gq.set_mode(net, 'off'))
    found = training_outputs(gq.freeze(gq.set_mode(net, 'quantize')))
    for mine, theirs in zip(found, expected):
        assert abs(mine - theirs).max() < 0.1 * abs(theirs).max()


def test_one_weight_counts_once():
    net = Differs('none')
    net.initialize()
    net(pictures())
    assert gq.summary(gq.attach(net)).float_bytes == gq.summary(gq.convert(net)).float_bytes


def test_a_graph_that_was_taken_of_it_leaves_it_as_it_was():
    net = attached(bits=8, method='int8')
    gq.finalize(net)
    gq.calibrate(net, [pictures()])
    before = gq.ranges(net)
    with autograd.record():
        net(50 * pictures())
    assert gq.ranges(net)['data.output_quantizer'] != before['data.output_quantizer']


def test_exported_after_training_only(tmp_path):
    net = attached()
    net.hybridize()
    training_outputs(net)
    with pytest.raises(RuntimeError, match='has run in training only'):
        net.export(str(tmp_path / 'net'))


# ---------------------------------------------------------------- what it refuses


def test_a_tensor_that_is_called_otherwise_in_training():
    with pytest.raises(ValueError, match="reads 'image' in training.*call the same tensor the same"):
        gq.attach(made(), training_inputs='image')
    with pytest.raises(ValueError, match='training_inputs=.*a GraphNet has no other graph'):
        gq.attach(gq.graph.as_graph(made()), training_inputs='image')


def test_targets_that_nobody_has_named():
    net = attached(made(WithTargets()))
    assert_equal(outputs(gq.set_mode(net, 'off')), outputs(made(WithTargets())))
    with pytest.raises(RuntimeError, match=r'gq.attach\(net, training_inputs='):
        training_outputs(net, TARGET)


def test_targets_that_the_net_does_not_take():
    with pytest.raises(ValueError, match='cannot be traced in training with the inputs data, target, more'):
        gq.attach(made(WithTargets()), training_inputs=('data', 'target', 'more'))
    with pytest.raises(ValueError, match='training_inputs=.*a Symbol has no other graph'):
        gq.attach(mx.sym.relu(mx.sym.var('data')), training_inputs='data')


def test_the_number_of_inputs_in_each_mode():
    net = with_targets()
    with pytest.raises(ValueError, match=r'the net takes 1 inputs \(data\), not 2'):
        net(pictures(), TARGET)
    with pytest.raises(ValueError, match=r'the net takes 2 inputs \(data, target\), not 1'):
        training_outputs(net)
