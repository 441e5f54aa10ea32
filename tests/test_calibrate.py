"""`calibrate`: ranges from the float net's activations, and nothing else changes."""
import logging
import math

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.layers import layers, quantizers
from gluonquant.quantizers import Quantizer
from reference.observers import mse

ROUNDING = 1e-6     # ranges are stored, and the extremes, means and percentiles taken, in float32
hybridized_or_not = pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])


def small(ran=True):
    """Conv, Conv behind a ReLU, Dense behind BatchNorm and a ReLU."""
    net = nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(nn.Conv2D(4, 3), nn.Activation('relu'), nn.Conv2D(6, 3, use_bias=False), nn.BatchNorm(),
                nn.Dense(5, activation='relu'), nn.Dense(3))
    net.initialize(init.Xavier())
    if ran:
        net(batches()[0])
    return net


def batches(count=3):
    rng = np.random.default_rng(3)
    return [nd.array(rng.uniform(-1, 1, (4, 3, 8, 8)) * (k + 1)) for k in range(count)]


def float_inputs(net, loader):
    """{path: [what the layer reads of each batch]} in the float net."""
    seen = {}
    handles = [layer.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(
        args[0].asnumpy().astype('float64'))) for path, layer in layers(net).items()]
    gq.set_mode(net, 'off')
    for batch in loader:
        net(batch)
    gq.set_mode(net, 'quantize')
    for handle in handles:
        handle.detach()
    return seen


def state(net):
    return {name: p._reduce().asnumpy() for name, p in net._collect_params_with_prefix().items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def assert_untouched(net, before, active):
    assert_same(state(net), before)
    assert [block._active for block in net._children.values() if isinstance(block, nn.HybridBlock)].count(active)
    assert net._active == active
    for quantizer in quantizers(net).values():
        assert 'forward' not in vars(quantizer)


@pytest.fixture
def net(seed):
    return small()


# ---------------------------------------------------------------- ranges are those of the method's formula


def flat(seen):
    return np.concatenate([x.ravel() for x in seen])


def moving_average(seen, decay=0.99):
    average = np.abs(seen[0]).max()
    for x in seen[1:]:
        average = decay * average + (1 - decay) * np.abs(x).max()
    return {'amax': average}


def percentile(seen, signed, percent=99.9):
    x = flat(seen)
    return np.percentile(np.abs(x) if signed else x, percent)


FORMULAS = {
    'int8': lambda seen, signed: moving_average(seen),
    'lsq': lambda seen, signed: {'scale': mse(flat(seen), -8, 7) / 7 if signed else mse(flat(seen), 0, 15) / 15},
    'pact': lambda seen, signed: {'alpha': percentile(seen, signed)},
    'gdrq': lambda seen, signed: {'threshold': 12 * np.abs(flat(seen)).mean()},
    'qil': lambda seen, signed: {name: percentile(seen, signed) * part
                                 for name, part in (('start', 1), ('center', 0.5), ('distance', 0.5))},
    'fqn': lambda seen, signed: {'lo': np.percentile(flat(seen), 0.1), 'hi': np.percentile(flat(seen), 99.9)},
    'affine': lambda seen, signed: {'lo': flat(seen).min(), 'hi': flat(seen).max()},
}


@pytest.mark.parametrize('method', FORMULAS)
def test_ranges_are_the_methods_formula_of_the_float_nets_activations(net, method):
    gq.convert(net, activation=method, first_last_bits=None)
    expected = FORMULAS[method](float_inputs(net, batches())['2'], False)
    gq.calibrate(net, batches())
    for name, value in expected.items():
        assert net[2].input_quantizer.value(name)[0] == pytest.approx(value, rel=ROUNDING), name


@pytest.mark.parametrize('method', ['int8', 'lsq', 'pact', 'gdrq', 'affine'])
def test_the_same_on_signed_inputs(net, method):
    gq.convert(net, activation=method, first_last_bits=None)
    expected = FORMULAS[method](float_inputs(net, batches())['4'], True)
    gq.calibrate(net, batches())
    for name, value in expected.items():
        assert net[4].input_quantizer.value(name)[0] == pytest.approx(value, rel=ROUNDING), name


@pytest.mark.parametrize('method, part', [('lsq', 1), ('qil', 0)])
def test_ranges_of_weights_are_set_from_the_present_weights(net, method, part):
    gq.convert(net, weight=method)
    weight = np.abs(net[2].weight.data().asnumpy())
    gq.calibrate(net, batches())
    if method == 'lsq':
        np.testing.assert_allclose(net[2].weight_quantizer.value('scale'),
                                   2 * weight.reshape(6, -1).mean(axis=1) / math.sqrt(7), rtol=ROUNDING)
    else:
        assert net[2].weight_quantizer.value('start')[0] == weight.max()


def test_earlier_layers_do_not_quantize_while_later_ones_are_observed(net):
    gq.convert(net, bits=2, method='int8', first_last_bits=2)
    expected = float_inputs(net, batches()[:1])
    gq.calibrate(net, batches())                            # a second calibration, so that ranges exist
    gq.calibrate(net, batches()[:1], observer='minmax')
    for path, seen in expected.items():
        q = layers(net)[path].input_quantizer
        assert q.value('amax')[0] == np.float32(np.abs(seen[0]).max()), path


@pytest.mark.parametrize('observer, amax', [
    ('minmax', lambda seen: flat(seen).max()), ('ema', lambda seen: moving_average(seen)['amax']),
    ('percentile', lambda seen: percentile(seen, False))])
def test_an_observer_can_be_named(net, observer, amax):
    gq.convert(net, method='int8', bits=4, first_last_bits=4)
    seen = float_inputs(net, batches())['2']
    gq.calibrate(net, batches(), observer=observer)
    assert net[2].input_quantizer.value('amax')[0] == pytest.approx(amax(seen), rel=ROUNDING)


@pytest.mark.parametrize('observer', ['mse', 'kl'])
def test_searching_observers_clip(net, observer):
    gq.convert(net, method='int8', bits=3, first_last_bits=3)
    top = flat(float_inputs(net, batches())['4'])
    gq.calibrate(net, batches(), observer=observer)
    assert 0.1 * np.abs(top).max() < net[4].input_quantizer.value('amax')[0] < np.abs(top).max()


@pytest.mark.parametrize('method', ['lsq', 'gdrq', 'pact', 'qil', 'int8'])
def test_a_named_observer_sets_the_highest_value_of_every_method(net, method):
    gq.convert(net, activation=method, first_last_bits=None)
    top = flat(float_inputs(net, batches())['2']).max()
    assert gq.calibrate(net, batches(), observer='minmax')['2.input_quantizer'][1] == pytest.approx(top, rel=ROUNDING)


def test_it_returns_the_range_of_every_input_quantizer(net):
    gq.convert(net, method='int8', bits=4, first_last_bits=8)
    bounds = gq.calibrate(net, batches())
    assert bounds == {path: q.affine_bounds() for path, q in quantizers(net, 'activation').items()}
    assert list(bounds) == ['0.input_quantizer', '2.input_quantizer', '4.input_quantizer', '5.input_quantizer']
    assert bounds['0.input_quantizer'][0] == -bounds['0.input_quantizer'][1] and bounds['2.input_quantizer'][0] == 0


@pytest.mark.parametrize('method', ['cliprelu', 'dorefa'])
def test_fixed_ranges_stay(net, method):
    gq.convert(net, activation=method, first_last_bits=None)
    before = state(net)
    bounds = gq.calibrate(net, batches())
    assert bounds['2.input_quantizer'] == pytest.approx((0, {'cliprelu': 6, 'dorefa': 1}[method]), rel=ROUNDING)
    after = state(net)
    assert all((after[name] == value).all() for name, value in before.items() if name.startswith('2.input'))


# ---------------------------------------------------------------- table


@pytest.mark.parametrize('path, entry, bounds', [('2', 3.0, (0, 3)), ('2', (0, 5), (0, 5)), ('4', 2.0, (-2, 2)),
                                                 ('4', (-1.0, 2.0), (-2, 2)), ('4', [-3.0, 2.0], (-3, 3))])
def test_a_table_overrides_the_data(net, path, entry, bounds):
    gq.convert(net, method='int8', bits=4)
    got = gq.calibrate(net, batches(), table={path: entry})
    assert got[f'{path}.input_quantizer'] == pytest.approx(bounds, rel=ROUNDING)


def test_a_table_of_an_affine_quantizer_is_a_range(net):
    gq.convert(net, activation='affine', bits=8)
    gq.calibrate(net, batches(), table={'4': (-1.0, 3.0)})
    q = net[4].input_quantizer
    assert (q.value('lo')[0], q.value('hi')[0]) == (-1, 3)


def test_the_other_layers_do_not_notice_the_table(net):
    gq.convert(net, method='int8', bits=4)
    without = gq.calibrate(net, batches())
    with_table = gq.calibrate(net, batches(), table={'2': 9.0})
    assert {**without, '2.input_quantizer': None} == {**with_table, '2.input_quantizer': None}


def test_a_table_entry_of_either_sharing_layer_sets_the_shared_quantizer(seed):
    class Branches(nn.HybridBlock):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            with self.name_scope():
                self.a, self.b = nn.Dense(3), nn.Dense(3)

        def hybrid_forward(self, F, x):
            return self.a(x) + self.b(x)

    net = Branches()
    net.initialize()
    gq.convert(net, method='int8', first_last_bits=4)
    assert gq.calibrate(net, [nd.ones((2, 4))], table={'b': 7.0}) == {'a.input_quantizer': pytest.approx((-7, 7))}


# ---------------------------------------------------------------- what it takes as batches


def counted(loader):
    """A generator that tells how many batches were taken."""
    taken = []

    def generate():
        for batch in loader:
            taken.append(1)
            yield batch
    return generate(), taken


@pytest.mark.parametrize('limit, expected', [(1, 1), (2, 2), (10, 4), (None, 4)])
def test_batches_limits_how_many_are_taken(net, limit, expected):
    loader, taken = counted(batches(4))
    gq.convert(net, method='int8', bits=4, first_last_bits=4)
    bounds = gq.calibrate(net, loader, batches=limit, observer='minmax')
    assert len(taken) == expected
    assert bounds['0.input_quantizer'][1] == pytest.approx(max(b.abs().max().asscalar() for b in batches(expected)))


def test_ten_batches_are_the_default(net):
    loader, taken = counted(batches(1) * 12)
    gq.calibrate(gq.convert(net), loader)
    assert len(taken) == 10


LABELS = nd.zeros(4)
WRAPPED = {'(data, label)': lambda x: (x, LABELS), '[data, label]': lambda x: [x, LABELS], '[data]': lambda x: [x],
           '[[data], label]': lambda x: [[x], LABELS], 'DataBatch': lambda x: mx.io.DataBatch([x], [LABELS]),
           'float32 array': lambda x: x.asnumpy(), 'float64 array': lambda x: x.asnumpy().astype('float64')}


@pytest.mark.parametrize('kind', WRAPPED)
def test_a_batch_may_come_in_any_of_the_usual_containers(net, kind):
    gq.convert(net, method='int8', bits=4)
    expected = gq.calibrate(net, batches())
    assert gq.calibrate(net, [WRAPPED[kind](x) for x in batches()]) == expected


def test_a_data_loader_is_a_loader(net):
    gq.convert(net, method='int8', bits=4)
    data = gluon.data.ArrayDataset(nd.concat(*batches(), dim=0), nd.zeros(12))
    loader = gluon.data.DataLoader(data, batch_size=4)
    assert gq.calibrate(net, loader) == gq.calibrate(net, batches())


def test_a_data_iterator_is_a_loader(net):
    gq.convert(net, method='int8', bits=4)
    iterator = mx.io.NDArrayIter(nd.concat(*batches(), dim=0), nd.zeros(12), batch_size=4)
    assert gq.calibrate(net, iterator) == gq.calibrate(net, batches())


def test_a_loader_may_reuse_one_array(net):
    buffer = nd.zeros((4, 3, 8, 8))

    def loader():
        for batch in batches():
            buffer[:] = batch
            yield buffer

    gq.convert(net, method='int8', bits=4)
    assert gq.calibrate(net, loader()) == gq.calibrate(net, batches())


def test_every_pass_of_one_and_the_same_array_counts(net):
    gq.convert(net, method='int8', bits=4, first_last_bits=4)
    first, last = batches(2)
    got = gq.calibrate(net, [last, first, first])['0.input_quantizer']
    assert got == gq.calibrate(net, [last, first, first.copy()])['0.input_quantizer']


def test_forward_runs_nets_with_several_inputs(seed):
    class Two(nn.HybridBlock):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            with self.name_scope():
                self.a, self.b = nn.Dense(3), nn.Dense(3)

        def hybrid_forward(self, F, x, y):
            return self.a(x) + self.b(y)

    net = Two()
    net.initialize()
    gq.convert(net, method='int8')
    bounds = gq.calibrate(net, [(nd.full((1, 2), 3), nd.full((1, 4), -5))], forward=lambda net, batch: net(*batch))
    assert [high for _, high in bounds.values()] == pytest.approx([3, 5])


# ---------------------------------------------------------------- what it leaves alone


@hybridized_or_not
def test_hybridization_is_as_before_and_the_graph_agrees(net, hybridized):
    gq.convert(net, method='int8', bits=4)
    net.hybridize(hybridized, static_alloc=True, static_shape=True)
    gq.calibrate(net, batches())
    assert net._active == net[0]._active == net[0].weight_quantizer._active == hybridized
    out = net(batches()[0]).asnumpy()
    net.hybridize(not hybridized)
    np.testing.assert_array_equal(net(batches()[0]).asnumpy(), out)


def test_a_graph_that_has_run_sees_the_new_ranges(net):
    gq.convert(net, method='int8', bits=4)
    gq.calibrate(net, batches(1))
    net.hybridize()
    before = net(batches()[0]).asnumpy()
    gq.calibrate(net, [batches()[0] * 9])
    after = net(batches()[0]).asnumpy()
    net.hybridize(False)
    assert not np.array_equal(after, before)
    np.testing.assert_array_equal(net(batches()[0]).asnumpy(), after)


def test_float_parameters_and_running_statistics_stay(net):
    before = state(net)
    gq.calibrate(gq.convert(net), batches())
    after = state(net)
    assert_same({name: after[name] for name in before}, before)


def test_inside_record_it_still_runs_in_inference_mode(net):
    gq.convert(net, method='int8')
    expected = gq.calibrate(net, batches())
    running = net[3].running_mean.data().asnumpy()
    with autograd.record():
        assert gq.calibrate(net, batches()) == expected
        assert autograd.is_training()
    np.testing.assert_array_equal(net[3].running_mean.data().asnumpy(), running)


@hybridized_or_not
def test_it_works_before_the_net_ever_ran(seed, hybridized):
    net, other = small(ran=False), small()
    gq.convert(net, method='lsq')
    net.hybridize(hybridized)
    gq.calibrate(net, batches())
    assert all(row.calibrated == 'yes' for row in gq.summary(net).rows)
    net.hybridize(not hybridized)
    hybrid = net(batches()[0])
    net.hybridize(hybridized)
    np.testing.assert_array_equal(net(batches()[0]).asnumpy(), hybrid.asnumpy())
    assert net[0].weight.shape == other[0].weight.shape


def test_parts_that_are_hybridized_for_themselves_quantize_after_calibration_with_unknown_shapes(seed):
    net = nn.Sequential()
    net.add(nn.Conv2D(4, 3), nn.Dense(3))
    net.initialize(init.Xavier())
    gq.convert(net, method='int8', first_last_bits=2)
    net.hybridize()
    gq.calibrate(net, batches())
    quantized = net(batches()[0]).asnumpy()
    gq.set_mode(net, 'off')
    assert not np.array_equal(net(batches()[0]).asnumpy(), quantized)


def test_calibrating_again_replaces_the_ranges(net):
    gq.convert(net, method='int8', bits=4)
    gq.calibrate(net, [10 * x for x in batches()])
    gq.calibrate(net, batches())
    again = state(net)
    other = small()
    for mine, theirs in zip(other.collect_params().values(), net.collect_params('(?!.*quantizer)').values()):
        mine.set_data(theirs.data())
    gq.calibrate(gq.convert(other, method='int8', bits=4), batches())
    assert_same(state(other), again)


def test_a_layer_that_saw_nothing_is_reported_and_keeps_no_range(seed, caplog):
    class Unused(nn.HybridBlock):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            with self.name_scope():
                self.used, self.idle = nn.Dense(3, in_units=4), nn.Dense(3, in_units=4)

        def hybrid_forward(self, F, x):
            return self.used(x)

    net = Unused()
    net.initialize()
    gq.convert(net, method='int8')
    with caplog.at_level(logging.WARNING, 'gluonquant'):
        bounds = gq.calibrate(net, [nd.ones((2, 4))])
    assert list(bounds) == ['used.input_quantizer'] and 'idle.input_quantizer' in caplog.text
    assert not net.idle.input_quantizer.calibrated


@pytest.mark.parametrize('method', ['int8', 'gdrq', 'lsq', 'pact', 'affine', 'qil', 'fqn'])
def test_an_input_that_is_always_0_is_no_obstacle(net, method):
    net[0].bias.set_data(nd.full(4, -100))          # nothing passes the ReLU
    gq.convert(net, activation=method, first_last_bits=None)
    gq.calibrate(net, batches())
    out = net(batches()[0]).asnumpy()
    assert np.isfinite(out).all()


# ---------------------------------------------------------------- refusals


def test_a_float_net_is_refused(net):
    with pytest.raises(ValueError, match=r'HybridSequential has no quantizer: call gq.convert\(net\) or gq.attach'):
        gq.calibrate(net, batches())


def raising(net, error, match, loader=None, **options):
    """Calibrate in vain, hybridized and not; the net stays as it was."""
    net(batches()[0])
    for hybridized in (False, True):
        net.hybridize(hybridized)
        before, out = state(net), net(batches()[0]).asnumpy()
        with pytest.raises(error, match=match):
            gq.calibrate(net, batches() if loader is None else loader, **options)
        assert_untouched(net, before, hybridized)
        np.testing.assert_array_equal(net(batches()[0]).asnumpy(), out)


@pytest.fixture
def converted(net):
    gq.calibrate(gq.convert(net, method='int8', bits=4), batches())
    return net


@pytest.mark.parametrize('loader', [[], (), iter([])])
def test_an_empty_loader_is_refused(converted, loader):
    raising(converted, ValueError, 'the loader gave no batch', loader=loader)


@pytest.mark.parametrize('value', [0, -1, 1.5, True, '3'])
def test_a_wrong_number_of_batches_is_refused(converted, value):
    raising(converted, ValueError, f'batches={value!r}: pass a number of batches >= 1, or None', batches=value)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_data_that_is_not_finite_is_refused_with_the_layer(converted, bad):
    broken = batches()[1]
    broken[0, 0, 0, 0] = bad
    raising(converted, ValueError, r'0.input_quantizer: 1 of 768 values are not finite', loader=[batches()[0], broken])


def test_a_layer_inside_is_named_where_the_infinity_arises(converted):
    weight = converted[2].weight.data()
    weight[0, 0, 0, 0] = 1e38
    with pytest.raises(ValueError, match=r'4.input_quantizer: \d+ of \d+ values are not finite'):
        gq.calibrate(converted, [batches()[0] * 1e5])


def test_an_unknown_observer_is_refused_with_the_nearest(converted):
    raising(converted, ValueError, "unknown observer 'minmx'. Did you mean 'minmax'", observer='minmx')


def test_an_unknown_table_entry_is_refused_with_the_nearest(converted):
    raising(converted, ValueError, r"table names '22', which is no quantized layer or tensor. Did you mean '2'",
            table={'22': 1.0})


def test_a_table_entry_for_a_float_input_is_refused(net):
    gq.convert(net, activation='none', weight='int8')
    raising(net, ValueError, "table names '2', whose input is not quantized", table={'2': 1.0})


@pytest.mark.parametrize('entry', [-4.0, 0.0, float('nan'), float('inf'), 'wide', (1, 2, 3), (), None, (3.0, 1.0)])
def test_a_table_entry_that_is_no_range_is_refused_with_the_layer(converted, entry):
    raising(converted, (ValueError, TypeError), "'2'", table={'2': entry})


def failing_loader():
    yield batches()[0] * 100
    raise OSError('disk gone')


def test_a_loader_that_fails_leaves_the_net_as_it_was(converted):
    for hybridized in (False, True):
        converted.hybridize(hybridized)
        before, out = state(converted), converted(batches()[0]).asnumpy()
        with pytest.raises(OSError, match='disk gone'):
            gq.calibrate(converted, failing_loader())
        assert_untouched(converted, before, hybridized)
        np.testing.assert_array_equal(converted(batches()[0]).asnumpy(), out)


@hybridized_or_not
def test_a_failure_before_the_first_run_leaves_a_net_that_can_be_calibrated(seed, hybridized):
    net = gq.convert(small(ran=False), method='lsq')
    net.hybridize(hybridized)
    with pytest.raises(OSError, match='disk gone'):
        gq.calibrate(net, failing_loader())
    assert not net[2].input_quantizer.calibrated and type(net[2].input_quantizer).forward is Quantizer.forward
    gq.calibrate(net, batches())
    assert net[2].input_quantizer.calibrated


def test_a_batch_of_the_wrong_shape_leaves_the_net_as_it_was(converted):
    raising(converted, Exception, 'hape', loader=[batches()[0], nd.ones((2, 5, 8, 8))])
