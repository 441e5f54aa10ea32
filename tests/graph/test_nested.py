"""Graphs inside a net of blocks, as the features of gluoncv's SSDs are: `convert` and everything behind it."""
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
from mxnet import autograd, gluon
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.graph import GraphNet
from gluonquant.layers import layers, quantizers

WEIGHTS = ['features.first_weight', 'features.second_weight', 'features.third_weight']


def converted(up=False, **options):
    return gq.convert(made(Detector(up)), **options)


def ready(up=False, **options):
    net = converted(up, **options)
    gq.calibrate(net, [pictures()])
    return net


def specs(net):
    return {path: f'{quantizer.method} {quantizer.grid.bits}' for path, quantizer in quantizers(net, 'weight').items()}


# ---------------------------------------------------------------- convert


def test_layers_of_the_graph_are_quantized_and_all_heads_are_last_layers():
    net = converted()
    assert specs(net) == {'features.first_weight_quantizer': 'int8 8',
                          'features.second_weight_quantizer': 'lsq 4',
                          'features.third_weight_quantizer': 'lsq 4',
                          **{f'{head}.{i}.weight_quantizer': 'int8 8' for head in ('scores', 'places') for i in (0, 1)}}
    assert isinstance(net.features, GraphNet) and net._children['features'] is net.features


def test_heads_on_one_map_share_its_quantizer():
    net = converted()
    assert net.places[0].input_quantizer is net.scores[0].input_quantizer
    assert net.places[1].input_quantizer is not net.scores[0].input_quantizer


def test_names_of_parameters_stay():
    before = set(made()._collect_params_with_prefix())
    after = converted()._collect_params_with_prefix()
    assert before <= set(after) and set(WEIGHTS) <= before
    assert all('_quantizer.' in name for name in set(after) - before)


@pytest.mark.parametrize('up', [False, True])
def test_switched_off_the_net_is_the_float_one(up):
    expected = outputs(made(Detector(up)))
    net = converted(up)
    assert_equal(outputs(gq.set_mode(net, 'off')), expected)


def test_four_bits_are_not_float():
    assert not np.array_equal(outputs(ready())[1], outputs(made())[1])


def test_rules_and_exclude_reach_into_the_graph():
    net = converted(rules=[gq.Rule('features.second*', weight_bits=2), gq.Rule('places', bits=6)],
                    exclude=['features.third_fwd', 'scores.1'])
    assert specs(net) == {'features.first_weight_quantizer': 'int8 8',
                          'features.second_weight_quantizer': 'lsq 2', 'scores.0.weight_quantizer': 'int8 8',
                          'places.0.weight_quantizer': 'int8 6', 'places.1.weight_quantizer': 'int8 6'}


def test_a_graph_that_is_excluded_stays_a_symbol_block():
    net = converted(exclude='features')
    assert isinstance(net.features, gluon.SymbolBlock) and list(layers(net)) == ['scores.0', 'scores.1', 'places.0',
                                                                                 'places.1']


def test_a_wrong_pattern_names_what_there_is_in_the_graph():
    with pytest.raises(ValueError, match="pattern 'features.frist_fwd' matches no layer. Did you mean "
                                         "'features.first_fwd'"):
        converted(exclude=['features.frist_fwd'])


def test_a_failed_call_changes_nothing():
    net = made()
    expected = outputs(net)
    with pytest.raises(TypeError, match='features: second_weight_quantizer.*nonsense'):
        gq.convert(net, rules=[gq.Rule('features.second*', weight='dorefa', weight_options={'nonsense': 1})])
    assert isinstance(net.features, gluon.SymbolBlock) and not quantizers(net)
    assert_equal(outputs(net), expected)


def test_a_net_of_nothing_but_a_graph_is_for_attach():
    with pytest.raises(ValueError, match='use gq.attach'):
        gq.convert(made().features)


def test_a_second_conversion_is_refused():
    with pytest.raises(RuntimeError, match='attached already|already converted'):
        gq.convert(converted())


def test_only_the_graph_may_have_layers():
    class Around(nn.HybridBlock):
        def __init__(self):
            super().__init__()
            self.features = made().features

        def hybrid_forward(self, F, x):
            return self.features(x)[1]
    net = gq.convert(Around())
    assert len(quantizers(net, 'weight')) == 3
    gq.calibrate(net, [pictures()])
    assert np.isfinite(net(pictures()).asnumpy()).all()


# ---------------------------------------------------------------- training, inference, hybridize


@pytest.mark.parametrize('up', [False, True])
@pytest.mark.parametrize('fold', [None, 'frozen', 'batch'])
def test_hybridized_and_not_give_the_same(up, fold):
    found = []
    for hybridized in (False, True):
        net = converted(up)
        if fold:
            gq.fold(net, fold)
        gq.calibrate(net, [pictures()])
        net.hybridize(hybridized)
        inferred = outputs(net)
        net.hybridize(hybridized)       # a detector's graph depends on the mode: gluoncv hybridizes anew for each
        found.append((inferred, training_outputs(net), gradients(net)))
    (inferred, trained, slopes), (inferred_hybrid, trained_hybrid, slopes_hybrid) = found
    assert_equal(inferred_hybrid, inferred)
    assert_trains_alike(trained_hybrid, trained, slopes_hybrid, slopes)


def test_it_trains():
    net = ready()
    net.hybridize()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.01, 'momentum': 0.9})
    losses = []
    for _ in range(20):
        with autograd.record():
            scores, places = net(pictures())
            loss = ((scores - 1) ** 2).mean() + (places ** 2).mean()
        loss.backward()
        trainer.step(1)
        losses.append(float(loss.asscalar()))
    assert losses[-1] < 0.6 * losses[0]


def test_ranges_and_clipped_reach_the_graph():
    net = ready()
    assert 'features.second_weight_quantizer' in gq.ranges(net)
    assert set(gq.clipped(net, [pictures()])) == set(gq.ranges(net))


def test_the_summary_has_the_layers_of_the_graph():
    rows = {row.name: row.weight for row in gq.summary(ready()).rows}
    assert list(rows)[:3] == ['features.first_fwd', 'features.second_fwd', 'features.third_fwd']
    assert rows['features.second_fwd'] == 'lsq 4s' and len(rows) == 7


# ---------------------------------------------------------------- files


@pytest.mark.parametrize('way', [gq.convert, gq.attach], ids=['convert', 'attach'])
def test_a_net_that_was_loaded_from_a_float_file(tmp_path, way):
    made().save_parameters(str(tmp_path / 'float.params'))
    net = made(values=False)
    net.load_parameters(str(tmp_path / 'float.params'))
    net = way(net)
    gq.calibrate(net, [pictures()])
    net.hybridize()
    expected = way(made())
    gq.calibrate(expected, [pictures()])
    assert_equal(outputs(net), outputs(expected))


@pytest.mark.parametrize('method', ['int8', 'lsq', 'fqn', 'sawb'])
@pytest.mark.parametrize('way', [gq.convert, gq.attach], ids=['convert', 'attach'])
def test_a_net_that_has_never_run(way, method):
    # as in gluoncv: layers added as symbols, of whose weights not even the number of axes is noted
    body = mx.sym.relu(mx.sym.Convolution(mx.sym.var('data'), num_filter=8, kernel=(3, 3), name='added'))
    net = nn.HybridSequential()
    net.add(gluon.SymbolBlock(body, mx.sym.var('data')), nn.Conv2D(4, 1))
    net.initialize()
    net = way(net, weight=method, activation='int8')
    gq.calibrate(net, [pictures()])
    assert net(pictures()).shape == (4, 4, 6, 6)
    net.hybridize()
    assert net(pictures()).shape == (4, 4, 6, 6)


@pytest.mark.parametrize('fold', [None, 'frozen'])
def test_save_and_load(tmp_path, fold):
    net = converted()
    if fold:
        gq.fold(net, fold)
    gq.calibrate(net, [pictures()])
    gq.freeze_batchnorm(gq.freeze(net))
    gq.save(net, tmp_path / 'net.npz')
    for other in (made(values=False), made()):
        again = gq.load(tmp_path / 'net.npz', other)
        assert_equal(outputs(again), outputs(net))
        assert_equal(training_outputs(again), training_outputs(net))
        gq.load(tmp_path / 'net.npz', again)
        assert_equal(outputs(again), outputs(net))


def test_weights_go_back_into_a_float_net(tmp_path):
    gq.save(ready(), tmp_path / 'net.npz')
    assert_equal(outputs(gq.load_weights(tmp_path / 'net.npz', made(values=False))), outputs(made()))


def test_a_file_of_another_net_changes_nothing(tmp_path):
    gq.save(ready(up=True), tmp_path / 'net.npz')
    net = made()
    with pytest.raises(ValueError, match='has shape'):
        gq.load(tmp_path / 'net.npz', net)
    assert isinstance(net.features, gluon.SymbolBlock) and not quantizers(net)
    assert_equal(outputs(net), outputs(made()))
    with pytest.raises(ValueError, match='features.*another graph'):
        gq.load(tmp_path / 'net.npz', ready())


def test_a_file_without_the_graph_does_not_fit_a_net_with_it(tmp_path):
    gq.save(ready(exclude='features'), tmp_path / 'net.npz')
    with pytest.raises(ValueError, match="'features' is quantized in the net, but float in the file"):
        gq.load(tmp_path / 'net.npz', ready())


# ---------------------------------------------------------------- as one graph


@pytest.mark.parametrize('up', [False, True])
@pytest.mark.parametrize('fold', [None, 'frozen'])
def test_as_one_graph(up, fold):
    net = converted(up)
    if fold:
        gq.fold(net, fold)
    gq.calibrate(net, [pictures()])
    expected = outputs(net)
    whole = gq.graph.as_graph(net)
    assert_equal(outputs(whole), expected)
    assert_equal(outputs(net), expected)
    assert set(quantizers(whole)) == {path for path, quantizer in quantizers(net).items()}
    training_outputs(net)       # as before, detours for gradients included


def test_a_merged_net_gives_what_the_folded_one_gave():
    net = gq.fold(converted(), 'frozen')
    gq.calibrate(net, [pictures()])
    folded = outputs(net)[1]
    np.testing.assert_allclose(outputs(gq.fold(net, 'merge'))[1], folded, rtol=1e-4, atol=1e-4)
