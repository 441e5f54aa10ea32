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


def test_gradients_are_not_quantized_in_a_graph():
    with pytest.raises(ValueError, match=r"gradient_bits=4: 'features' is a SymbolBlock.*exclude=\['features.\*'\]"):
        converted(gradient_bits=4)
    assert converted(gradient_bits=4, exclude='features.*')


def test_a_pattern_has_to_name_a_layer_of_the_graph():
    with pytest.raises(ValueError, match='norm'):
        converted(exclude='*norm*')


def test_a_layer_that_is_used_twice_is_a_first_or_last_one_at_every_use():
    first, weight, bias, x = (mx.sym.var(name) for name in ('first_weight', 'weight', 'bias', 'data'))
    x = mx.sym.relu(mx.sym.Convolution(x, first, num_filter=4, kernel=(3, 3), no_bias=True))
    heads = [mx.sym.Convolution(part, weight, bias, num_filter=4, kernel=(1, 1)) for part in (x, mx.sym.tanh(x))]
    net = nn.HybridSequential()
    net.add(gluon.SymbolBlock(mx.sym.Group(heads), mx.sym.var('data')))
    net.initialize()
    gq.convert(net, 4)
    assert {quantizer.grid.bits for quantizer in quantizers(net).values()} == {8}


@pytest.mark.parametrize('holder', [lambda block: [block], lambda block: (1, block), lambda block: {'first': block}])
def test_who_holds_the_block_in_a_list_gets_the_graph(holder):
    net = made()
    net.held = holder(net.features)
    gq.convert(net, 2)
    assert net.features in (net.held.values() if isinstance(net.held, dict) else net.held)


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


def test_a_table_that_fits_two_graphs_is_refused():
    net = nn.HybridSequential()
    for name in 'ab':
        body = mx.sym.Convolution(mx.sym.var('data'), num_filter=4, kernel=(1, 1), name=name)
        net.add(gluon.SymbolBlock(body, mx.sym.var('data')))
    net.add(nn.Conv2D(4, 1))
    net.initialize()
    gq.convert(net, method='int8')
    with pytest.raises(ValueError, match=r"'data', a tensor in 2 graphs: name one of \['0.data.*', '1.data.*'\]"):
        gq.calibrate(net, [pictures()], table={'data': 7.0})


def test_loaded_to_where_the_net_is(tmp_path):
    gq.save(ready(), tmp_path / 'net.npz')
    net, contexts = made(), [mx.cpu(0), mx.cpu(1)]
    net.collect_params().reset_ctx(contexts)
    gq.load(tmp_path / 'net.npz', net)
    assert {tuple(parameter.list_ctx()) for parameter in net.collect_params().values()} == {tuple(contexts)}


def test_moved_before_it_is_calibrated():
    net = converted()
    net.collect_params().reset_ctx([mx.cpu(0), mx.cpu(1)])
    gq.calibrate(net, [pictures()])
    assert_equal(outputs(net), outputs(ready()))


def test_statistics_of_graphs_are_shared_by_contexts():
    contexts = [mx.cpu(0), mx.cpu(1)]
    for net in (made(), ready()):
        net.collect_params().reset_ctx(contexts)
        sync = gq.StateSync(mx.kv.create('device'))
        sync.store(net)
        for number, context in enumerate(contexts):
            with autograd.record():
                net(pictures(number).as_in_context(context))
        sync(net)
        for name, parameter in net._collect_params_with_prefix().items():
            first, second = (array.asnumpy() for array in parameter.list_data())
            np.testing.assert_array_equal(first, second, name)


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


@pytest.mark.parametrize('make', [gq.graph.as_graph, gq.finalize])
def test_a_graph_that_was_made_of_a_detector_infers_and_leaves_the_detector_as_it_was(make):
    net = ready(method='int8')
    for _ in range(2):
        made_of = make(net)
    with pytest.raises(RuntimeError, match='holds what it does in inference'):
        training_outputs(made_of)
    gq.calibrate(net, [pictures()])
    before = gq.ranges(net)
    with autograd.record():
        net(50 * pictures())
    path = next(iter(before))
    assert gq.ranges(net)[path] != before[path]


def test_a_failed_merge_changes_nothing():
    net = converted()
    net.features._reg_params['first_weight']._data = None
    before = repr(net)
    with pytest.raises(RuntimeError, match='first_weight.* has no value yet'):
        gq.fold(net, 'merge')
    assert repr(net) == before


def test_the_summary_of_float_graphs():
    assert gq.summary(made()).float_bytes == gq.summary(converted(exclude='features.*')).float_bytes == \
        gq.summary(converted()).float_bytes


def test_batchnorm_of_a_float_graph_cannot_be_frozen(caplog):
    gq.freeze_batchnorm(converted(exclude='features.*'))
    assert 'features is a SymbolBlock: its BatchNorm is not frozen' in caplog.text
    caplog.clear()
    gq.freeze_batchnorm(converted())
    assert not caplog.text


@pytest.mark.parametrize('op', ['SyncBatchNorm', 'BatchNormWithReLU'])
def test_every_batchnorm_of_a_graph_freezes(op):
    body = mx.sym.Convolution(mx.sym.var('data'), num_filter=4, kernel=(1, 1), name='c')
    body = getattr(mx.sym.contrib, op)(body, name='n', **({'key': 'n', 'ndev': 1} if op == 'SyncBatchNorm' else {}))
    net = nn.HybridSequential()
    net.add(gluon.SymbolBlock(body, mx.sym.var('data')), nn.Conv2D(2, 1))
    net.initialize(mx.init.One())
    gq.convert(net, method='int8')
    gq.calibrate(net, [pictures()])
    gq.freeze_batchnorm(net)
    statistics = {name: parameter.data().asnumpy() for name, parameter in net[0].collect_params('.*moving').items()}
    with autograd.record():
        net(pictures())
    assert len(statistics) == 2
    for name, parameter in net[0].collect_params('.*moving').items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), statistics[name])
