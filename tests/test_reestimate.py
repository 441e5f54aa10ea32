"""`reestimate_batchnorm`: running statistics become those of the batches that are shown."""
import copy
import warnings

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

import gluonquant as gq
from fold_nets import (
    NORMS,
    STATIC,
    WAYS,
    Net,
    assert_near,
    assert_same,
    images,
    losses,
    quantized,
    remaining,
    run,
    shaken,
    small,
    state,
    step,
)
from gluonquant.graph import as_graph
from gluonquant.layers import named_blocks, quantizers

both_ways = pytest.mark.parametrize('way', WAYS)
KINDS = ('float', 'quantized')
every_kind = pytest.mark.parametrize('kind', KINDS)
# sums of some hundred float32 terms, and float64 sums of those
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _seeded(seed):
    pass


def made(way, kind, net=None):
    net = small() if net is None else net
    if kind == 'quantized':
        return quantized(way, net)
    return net if way == 'blocks' else as_graph(net)


def chain(*layers):
    net = nn.HybridSequential(prefix='net_')
    net.add(*layers)
    return shaken(net, images(99, 16))


def batches(count=3):
    return [images(seed) for seed in range(10, 10 + count)]


def statistics(net):
    return {name: value for name, value in state(net).items() if 'running' in name}


def normalize(x, gamma, beta, mean, var, eps):
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps) * gamma.reshape(shape) + beta.reshape(shape)


def expected_of_first(net, loader):
    """mean and variance of all that the first layer of a float net gives, at once."""
    data = nd.concat(*loader, dim=0)
    y = net[0](data).asnumpy().astype('float64')
    return y.mean(axis=(0, 2, 3)), y.var(axis=(0, 2, 3))


# ---------------------------------------------------------------- the numbers

@both_ways
def test_statistics_are_those_of_all_batches_together(way):
    blocks = small()
    mean, var = expected_of_first(blocks, batches())
    net = gq.reestimate_batchnorm(made(way, 'float', blocks), batches())
    assert_near(state(net)['1.running_mean'], mean, CLOSE)
    assert_near(state(net)['1.running_var'], var, CLOSE)


@both_ways
def test_statistics_of_a_quantized_net_are_those_of_quantized_outputs(way):
    blocks = chain(nn.Conv2D(4, 3), nn.BatchNorm())
    net = made(way, 'quantized', blocks)
    weight, data = (quantizers(net, role) for role in ('weight', 'activation'))
    (weight,), (data,) = weight.values(), data.values()
    x = nd.concat(*batches(), dim=0)
    y = nd.Convolution(data(x), weight(weight.source), blocks[0].bias.data(), kernel=(3, 3), num_filter=4).asnumpy()
    gq.reestimate_batchnorm(net, batches())
    found = state(net)
    assert_near(found['1.running_mean'], y.mean(axis=(0, 2, 3), dtype='float64'), CLOSE)
    assert_near(found['1.running_var'], y.var(axis=(0, 2, 3), dtype='float64'), CLOSE)


@both_ways
def test_quantization_enters_the_statistics(way):
    coarse = gq.attach(small(), method='int8', bits=2, first_last_bits=2) if way == 'graph' else \
        gq.convert(small(), method='int8', bits=2, first_last_bits=2)
    gq.calibrate(coarse, batches())
    gq.reestimate_batchnorm(coarse, batches())
    fine = gq.reestimate_batchnorm(made(way, 'float'), batches())
    assert np.abs(state(coarse)['1.running_var'] / state(fine)['1.running_var'] - 1).max() > 0.05


@both_ways
def test_each_batchnorm_normalizes_by_its_batch(way):
    """What the second BatchNorm sees does not depend on the statistics that the first had before."""
    first, second = made(way, 'float'), made(way, 'float')
    second._collect_params_with_prefix()['1.running_mean'].set_data(nd.array([3, -3, 5, 0]))
    second._collect_params_with_prefix()['1.running_var'].set_data(nd.array([30, 3, 5, 0.1]))
    for net in (first, second):
        gq.reestimate_batchnorm(net, batches())
    assert_same(statistics(second), statistics(first))


@both_ways
def test_statistics_of_later_batchnorms(way):
    blocks = chain(nn.Conv2D(4, 3), nn.BatchNorm(epsilon=0.1), nn.Activation('relu'), nn.Dense(5), nn.BatchNorm())
    seen, values = [], state(blocks)
    for batch in batches():
        y = blocks[0](batch).asnumpy().astype('float64')
        y = normalize(y, values['1.gamma'], values['1.beta'], y.mean(axis=(0, 2, 3)), y.var(axis=(0, 2, 3)), 0.1)
        seen.append(blocks[3](nd.array(np.maximum(y, 0))).asnumpy().astype('float64'))
    seen = np.concatenate(seen)
    found = state(gq.reestimate_batchnorm(made(way, 'float', blocks), batches()))
    assert_near(found['4.running_mean'], seen.mean(axis=0), CLOSE)
    assert_near(found['4.running_var'], seen.var(axis=0), CLOSE)


@both_ways
def test_a_batchnorm_over_another_axis(way):
    blocks = nn.HybridSequential()
    blocks.add(nn.BatchNorm(axis=3), nn.BatchNorm(axis=2, scale=False))
    net = made(way, 'float', shaken(blocks, images()))
    gq.reestimate_batchnorm(net, batches())
    x = nd.concat(*batches(), dim=0).asnumpy().astype('float64')
    assert_near(state(net)['0.running_mean'], x.mean(axis=(0, 1, 2)), CLOSE)
    assert_near(state(net)['0.running_var'], x.var(axis=(0, 1, 2)), CLOSE)


@both_ways
def test_a_batchnorm_that_runs_twice_has_statistics_of_all_that_it_saw(way):
    blocks = shaken(Net(lambda net, F, x: net.norm(net.first(x)) + net.norm(net.second(x)), first=nn.Conv2D(4, 3),
                        second=nn.Conv2D(4, 3), norm=nn.BatchNorm()), images())
    y = np.concatenate([layer(batch).asnumpy() for batch in batches() for layer in (blocks.first, blocks.second)])
    found = state(gq.reestimate_batchnorm(made(way, 'float', blocks), batches()))
    assert_near(found['norm.running_mean'], y.mean(axis=(0, 2, 3), dtype='float64'), CLOSE)
    assert_near(found['norm.running_var'], y.var(axis=(0, 2, 3), dtype='float64'), CLOSE)


@both_ways
def test_frozen_batchnorm_is_estimated_too_and_stays_frozen(way):
    net = gq.freeze_batchnorm(made(way, 'float'))
    mean, _ = expected_of_first(small(), batches())
    gq.reestimate_batchnorm(net, batches())
    assert_near(state(net)['1.running_mean'], mean, CLOSE)
    assert_same(step(net)[2], statistics(net))


@both_ways
def test_a_fixed_gamma_counts_as_one_on_the_way(way):
    def net():
        return chain(nn.Conv2D(4, 3), nn.BatchNorm(scale=False), nn.Conv2D(4, 3), nn.BatchNorm())
    spoilt = net()
    spoilt[1].gamma.set_data(nd.array([5, 5, 5, 5]))
    found, expected = (gq.reestimate_batchnorm(made(way, 'float', each), batches()) for each in (spoilt, net()))
    assert_same(statistics(found), statistics(expected))


@both_ways
def test_large_means_do_not_cancel_the_variance(way):
    blocks = chain(nn.Conv2D(4, 1), nn.BatchNorm())
    blocks[0].bias.set_data(nd.array([1e3, -1e3, 1e2, 0]))
    y = blocks[0](nd.concat(*batches(), dim=0)).asnumpy().astype('float64')
    net = gq.reestimate_batchnorm(made(way, 'float', blocks), batches())
    # A mean of 1e3 is known to 6e-5 in float32, of which the square is nothing beside variances of about 1.
    np.testing.assert_allclose(state(net)['1.running_var'], y.var(axis=(0, 2, 3)), rtol=1e-3)


@both_ways
def test_dropout_is_as_in_inference(way):
    net = made(way, 'float', chain(nn.Dropout(0.5), nn.Conv2D(4, 3), nn.BatchNorm()))
    first = statistics(gq.reestimate_batchnorm(net, batches()))
    assert_same(statistics(gq.reestimate_batchnorm(net, batches())), first)


@both_ways
@every_kind
def test_inference_afterwards_uses_the_new_statistics(way, kind):
    net = made(way, kind)
    before = run(net, images())[0]
    gq.reestimate_batchnorm(net, batches())
    assert np.abs(run(net, images())[0] - before).max() > 1e-3


@every_kind
def test_blocks_and_graph_get_the_same_statistics(kind):
    nets = [gq.reestimate_batchnorm(made(way, kind), batches()) for way in WAYS]
    assert_same(statistics(nets[0]), statistics(nets[1]))


# ---------------------------------------------------------------- batches

@both_ways
def test_at_most_the_number_of_batches_asked_for_is_taken(way):
    found = gq.reestimate_batchnorm(made(way, 'float'), iter(batches(5)), batches=2)
    expected = gq.reestimate_batchnorm(made(way, 'float'), batches(2))
    assert_same(statistics(found), statistics(expected))


def test_by_default_20_batches_are_taken():
    taken = []

    def loader():
        for seed in range(30):
            taken.append(seed)
            yield images(seed, 2)
    gq.reestimate_batchnorm(small(), loader())
    assert len(taken) == 20


def test_none_takes_all_batches():
    taken = []

    def loader():
        for seed in range(30):
            taken.append(seed)
            yield images(seed, 2)
    gq.reestimate_batchnorm(small(), loader(), batches=None)
    assert len(taken) == 30


@both_ways
def test_batches_weigh_alike_whatever_their_size(way):
    loader = [images(1, 2), images(2, 8)]
    y = [small()[0](batch).asnumpy() for batch in loader]
    net = gq.reestimate_batchnorm(made(way, 'float'), loader)
    assert_near(state(net)['1.running_mean'], (y[0].mean(axis=(0, 2, 3)) + y[1].mean(axis=(0, 2, 3))) / 2, CLOSE)


@pytest.mark.parametrize('batch', [lambda x: (x, nd.zeros(4)), lambda x: [x, nd.zeros(4)], lambda x: x.asnumpy(),
                                   lambda x: mx.io.DataBatch([x], [nd.zeros(4)])],
                         ids=['tuple', 'list', 'numpy', 'DataBatch'])
def test_batches_come_as_for_calibrate(batch):
    found = gq.reestimate_batchnorm(small(), [batch(x) for x in batches()])
    assert_same(statistics(found), statistics(gq.reestimate_batchnorm(small(), batches())))


def test_a_dataloader_is_a_loader():
    data = gluon.data.ArrayDataset(nd.concat(*batches(), dim=0), nd.arange(12))
    found = gq.reestimate_batchnorm(small(), gluon.data.DataLoader(data, batch_size=4))
    assert_same(statistics(found), statistics(gq.reestimate_batchnorm(small(), batches())))


@both_ways
def test_forward_runs_a_batch(way):
    net = gq.reestimate_batchnorm(made(way, 'float'), [{'image': x} for x in batches()],
                                  forward=lambda net, batch: net(batch['image']))
    assert_same(statistics(net), statistics(gq.reestimate_batchnorm(made(way, 'float'), batches())))


# ---------------------------------------------------------------- nothing else changes

@both_ways
@every_kind
def test_only_running_statistics_change(way, kind):
    net = made(way, kind)
    before, after = state(net), state(gq.reestimate_batchnorm(net, batches()))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f'{norm}.{name}' for norm in NORMS for name in ('running_mean', 'running_var')}


@both_ways
@pytest.mark.parametrize('method', ['int8', 'lsq', 'pact', 'fqn', 'qil', 'gdrq'])
def test_quantizers_keep_their_state(way, method):
    net = quantized(way, method=method, bits=4)
    before = {name: value for name, value in state(net).items() if 'quantizer' in name}
    gq.reestimate_batchnorm(net, batches())
    assert_same({name: value for name, value in state(net).items() if 'quantizer' in name}, before)


@both_ways
@every_kind
@pytest.mark.parametrize('flags', [{}, STATIC], ids=['plain', 'static'])
def test_a_hybridized_net_stays_hybridized_and_sees_the_new_statistics(way, kind, flags):
    net = made(way, kind)
    net.hybridize(**flags)
    net(images())
    gq.reestimate_batchnorm(net, batches())
    assert all(block._active for _, block in named_blocks(net) if isinstance(block, nn.HybridBlock))
    plain = gq.reestimate_batchnorm(made(way, kind), batches())
    assert_near(run(net, images())[0], run(plain, images())[0], CLOSE)


@both_ways
def test_a_net_that_is_not_hybridized_stays_so(way):
    net = gq.reestimate_batchnorm(made(way, 'float'), batches())
    assert not any(block._active for _, block in named_blocks(net) if isinstance(block, nn.HybridBlock))


@both_ways
@every_kind
def test_training_goes_on_with_the_batchs_statistics(way, kind):
    net = gq.reestimate_batchnorm(made(way, kind), batches())
    before = statistics(net)
    after = step(net)[2]
    assert all((after[name] != value).any() for name, value in before.items())


@both_ways
def test_training_before_and_after_works_hybridized(way):
    net = made(way, 'quantized')
    net.hybridize(**STATIC)
    losses(net, 1)
    gq.reestimate_batchnorm(net, batches())
    assert np.isfinite(losses(net, 2)).all()


@both_ways
def test_the_net_is_returned(way):
    net = made(way, 'float')
    assert gq.reestimate_batchnorm(net, batches()) is net


def test_recording_around_it_is_none_of_its_business():
    net = small()
    with autograd.record():
        gq.reestimate_batchnorm(net, batches())
        assert autograd.is_recording() and autograd.is_training()
    assert_same(statistics(net), statistics(gq.reestimate_batchnorm(small(), batches())))


@both_ways
def test_no_warning_is_given(way):
    net = made(way, 'quantized')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.simplefilter('ignore', DeprecationWarning)     # MXNet's own
        gq.reestimate_batchnorm(net, batches())


# ---------------------------------------------------------------- folded nets

@both_ways
@pytest.mark.parametrize('mode', ['frozen', 'batch'])
def test_a_folded_batchnorm_keeps_its_statistics(way, mode):
    net = gq.fold(quantized(way, chain(nn.BatchNorm(), nn.Conv2D(4, 3), nn.BatchNorm())), mode)
    before = statistics(net)
    after = statistics(gq.reestimate_batchnorm(net, batches()))
    assert remaining(net) == 1
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {'0.running_mean',
                                                                                         '0.running_var'}


@both_ways
@pytest.mark.parametrize('mode', ['frozen', 'batch', 'merge'])
def test_a_net_whose_batchnorms_are_all_folded_is_refused(way, mode):
    net = gq.fold(quantized(way), mode)
    with pytest.raises(ValueError, match=f'{type(net).__name__} has no BatchNorm with statistics of its own'):
        gq.reestimate_batchnorm(net, batches())


@both_ways
def test_folding_afterwards_takes_the_new_statistics(way):
    net = gq.reestimate_batchnorm(made(way, 'float'), batches())
    expected, = run(net, images())
    assert_near(run(gq.fold(net), images())[0], expected, CLOSE)


# ---------------------------------------------------------------- nets in other forms

def test_a_plain_block_with_hybrid_parts():
    class Plain(gluon.Block):
        def __init__(self):
            super().__init__()
            self.body = small()

        def forward(self, x):
            return self.body(x)
    net = gq.reestimate_batchnorm(Plain(), batches())
    assert_same(statistics(net.body), statistics(gq.reestimate_batchnorm(small(), batches())))


def test_an_attached_net_inside_of_another_block():
    outer = nn.HybridSequential()
    outer.add(quantized('graph'))
    gq.reestimate_batchnorm(outer, batches())
    assert_same(statistics(outer[0]), statistics(gq.reestimate_batchnorm(quantized('graph'), batches())))


def test_two_attached_nets_inside_of_one_block():
    """People read equal names of the nodes of both."""
    outer, x = nn.HybridSequential(), nd.concat(*batches(), dim=0)
    for prefix in ('first_', 'second_'):
        net = nn.HybridSequential(prefix=prefix)
        with net.name_scope():
            net.add(nn.Conv2D(3, 1), nn.BatchNorm())
        outer.add(as_graph(shaken(net, images(99, 16))))
    weight, bias = (outer[0].parameter(f'first_conv0_{name}').data() for name in ('weight', 'bias'))
    y = nd.Convolution(x, weight, bias, kernel=(1, 1), num_filter=3).asnumpy()
    gq.reestimate_batchnorm(outer, batches())
    assert_near(state(outer)['0.1.running_var'], y.var(axis=(0, 2, 3), dtype='float64'), CLOSE)


def test_a_synchronized_batchnorm():
    from mxnet.gluon.contrib.nn import SyncBatchNorm
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), SyncBatchNorm(num_devices=1))
    net.initialize()
    net(images())
    mean, var = expected_of_first(net, batches())
    gq.reestimate_batchnorm(net, batches())
    assert_near(net[1].running_mean.data().asnumpy(), mean, CLOSE)
    assert_near(net[1].running_var.data().asnumpy(), var, CLOSE)


def test_a_batchnorm_with_relu():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3), nn.BatchNormReLU())
    net.initialize()
    net(images())
    mean, var = expected_of_first(net, batches())
    gq.reestimate_batchnorm(net, batches())
    assert_near(net[1].running_mean.data().asnumpy(), mean, CLOSE)
    assert_near(net[1].running_var.data().asnumpy(), var, CLOSE)


@both_ways
def test_a_float64_net(way):
    blocks = small()
    blocks.cast('float64')
    loader = [x.astype('float64') for x in batches()]
    y = blocks[0](nd.concat(*loader, dim=0)).asnumpy()
    net = gq.reestimate_batchnorm(made(way, 'float', blocks), loader)
    np.testing.assert_allclose(state(net)['1.running_mean'], y.mean(axis=(0, 2, 3)), rtol=1e-5, atol=1e-6)



# ---------------------------------------------------------------- what is refused

def assert_refused(net, match, loader=None, **options):
    before = state(net)
    with pytest.raises(ValueError, match=match):
        gq.reestimate_batchnorm(net, batches() if loader is None else loader, **options)
    assert_same(state(net), before)
    assert not any('forward' in block.__dict__ or '_run' in block.__dict__ for _, block in named_blocks(net))


@both_ways
def test_a_net_without_batchnorm_is_refused(way):
    net = made(way, 'float', chain(nn.Conv2D(4, 3)))
    assert_refused(net, f'{type(net).__name__} has no BatchNorm with statistics of its own')


@both_ways
def test_an_empty_loader_is_refused(way):
    assert_refused(made(way, 'float'), 'the loader gave no batch: nothing to estimate from', [])


@pytest.mark.parametrize('number', [0, -1, 2.5, True, '3'])
def test_a_number_of_batches_that_is_none_is_refused(number):
    assert_refused(small(), f'batches={number!r}: pass a number of batches >= 1, or None for all', batches=number)


@both_ways
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(way, value):
    x = images()
    x[0, 0, 0, 0] = value
    assert_refused(made(way, 'float'), '(1|batchnorm0_fwd).*: the statistics are not finite. Go back to an earlier '
                   'checkpoint', [images(1), x])


@both_ways
@every_kind
def test_after_a_failure_the_net_is_as_it_was(way, kind):
    net = made(way, kind)
    expected = run(net, images())

    def loader():
        yield images()
        raise OSError('the disk is gone')
    before = state(net)
    with pytest.raises(OSError, match='the disk is gone'):
        gq.reestimate_batchnorm(net, loader())
    assert_same(state(net), before)
    np.testing.assert_array_equal(run(net, images()), expected)


@both_ways
def test_after_a_failure_a_hybridized_net_is_hybridized(way):
    net = made(way, 'float')
    net.hybridize()
    with pytest.raises(mx.MXNetError):
        gq.reestimate_batchnorm(net, [nd.zeros((2, 5, 8, 8))])
    assert all(block._active for _, block in named_blocks(net) if isinstance(block, nn.HybridBlock))


def test_a_copy_made_before_is_not_touched():
    net = small()
    other = copy.deepcopy(net)
    before = state(other)
    gq.reestimate_batchnorm(net, batches())
    assert_same(state(other), before)
