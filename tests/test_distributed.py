"""`StateSync`: two contexts, or two workers, train the net that one with the joint batch trains."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.layers import layers

TWO = [mx.cpu(0), mx.cpu(1)]
OTHERS = [mx.cpu(1), mx.cpu(2)]         # as GPUs are: not where arrays go by default
# activation method -> weight method
METHODS = {'lsq': 'lsq', 'pact': 'sawb', 'qil': 'qil', 'int8': 'int8', 'affine': 'affine', 'gdrq': 'gdrq'}


def build(ctx):
    net = nn.HybridSequential(prefix='net_')
    net.add(nn.Conv2D(8, 3, in_channels=3, use_bias=False), nn.BatchNorm(in_channels=8), nn.Activation('relu'),
            nn.Conv2D(8, 3, in_channels=8, use_bias=False), nn.BatchNorm(in_channels=8), nn.Activation('relu'),
            nn.GlobalAvgPool2D(), nn.Dense(4, in_units=8))
    mx.random.seed(1)
    net.initialize(init.Xavier(), ctx=mx.cpu())
    net.collect_params().reset_ctx(ctx)
    return net


def batches(count):
    random = np.random.default_rng(0)
    return [(random.normal(size=(64, 3, 10, 10)).astype('float32'), random.integers(0, 4, 64)) for _ in range(count)]


def prepared(method, ctx, data, averages):
    net = build(ctx)
    gq.convert(net, 4, weight=METHODS[method], activation=method)
    gq.calibrate(net, [nd.array(data[0][0])])
    gq.freeze_batchnorm(net)
    for layer in layers(net).values():
        if layer.input_quantizer.follows and not averages:
            layer.input_quantizer.freeze()
    net.hybridize(static_alloc=True, static_shape=True)
    return net


def train(method, ctx, data, sync=True, averages=False):
    """The net after a step for each batch, which the contexts share; with moving averages, or with frozen ones."""
    net = prepared(method, ctx, data, averages)
    store = mx.kv.create('device')
    merge = gq.StateSync(store)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.05, 'momentum': 0.9, 'wd': 1e-4},
                            kvstore=merge.store(net), update_on_kvstore=False)
    loss_function = gluon.loss.SoftmaxCrossEntropyLoss()
    for images, labels in data:
        parts = zip(gluon.utils.split_and_load(images, ctx), gluon.utils.split_and_load(labels, ctx))
        with autograd.record():
            losses = [loss_function(net(x), y) for x, y in parts]
        autograd.backward(losses)
        trainer.step(len(images))
        if sync:
            merge(net)
    return net


def values(net, context):
    nd.waitall()
    return {name: parameter.data(context).asnumpy() for name, parameter in net._collect_params_with_prefix().items()}


def differences(method, steps, averages, contexts=TWO):
    """Largest difference of two contexts from one, by Parameter, and how far that Parameter has moved."""
    data = batches(steps)
    one, two = (train(method, ctx, data, averages=averages) for ctx in (TWO[:1], contexts))
    expected, found = values(one, TWO[0]), [values(two, context) for context in contexts]
    start = values(prepared(method, TWO[:1], data, averages), TWO[0])
    for name in expected:
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
    return {name: (np.abs(found[0][name] - value).max(), np.abs(value - start[name]).max())
            for name, value in expected.items()}


@pytest.mark.parametrize('method, contexts', [*((method, TWO) for method in METHODS),
                                              ('lsq', OTHERS), ('gdrq', OTHERS)])
def test_two_contexts_follow_one_with_the_joint_batch_to_rounding(method, contexts):
    found = differences(method, 20, averages=False, contexts=contexts)
    assert max(moved for _, moved in found.values()) > 0.01
    for name, (difference, _) in found.items():
        assert difference < 2e-6, name


@pytest.mark.parametrize('method', ['int8', 'affine', 'gdrq'])
def test_moving_averages_are_those_of_the_joint_batch(method):
    """In the first layer, whose input depends on no other average."""
    found = differences(method, 10, averages=True)
    names = [name for name in found if name.startswith('0.input_quantizer.')]
    assert any(found[name][1] > 1e-4 for name in names)
    for name in names:
        assert found[name][0] < 1e-6, name


@pytest.mark.parametrize('method', ['int8', 'gdrq'])
def test_without_merging_the_contexts_diverge(method):
    net = train(method, TWO, batches(2), sync=False, averages=True)
    first, second = (values(net, context) for context in TWO)
    assert any((first[name] != second[name]).any() for name in first)


def test_largest_and_smallest_values_are_those_of_all_and_counters_stay_counters():
    net = build(TWO)
    gq.convert(net, 8, activation='affine', weight='int8', activation_options={'delay_quant': 3})
    gq.calibrate(net, [nd.ones((1, 3, 10, 10))])
    quantizer = layers(net)['3'].input_quantizer
    for place, (low, high, steps) in enumerate([(-1, 2, 5), (-3, 1, 5)]):
        for name, value in (('lo', low), ('hi', high), ('steps', steps)):
            quantizer._reg_params[name].data(TWO[place])[:] = value
    gq.StateSync()(net)
    found = values(net, TWO[1])
    assert [float(found[f'3.input_quantizer.{name}']) for name in ('lo', 'hi', 'steps')] == [-3, 2, 5]


def test_running_statistics_are_averaged_and_equal_ones_stay_to_the_bit():
    net = build(TWO)
    mean = net[1].running_mean
    before = np.random.default_rng(0).normal(size=8).astype('float32')
    net[4].running_mean.set_data(nd.array(before))
    for place in range(2):
        mean.data(TWO[place])[:] = place
    gq.StateSync()(net)
    np.testing.assert_array_equal(values(net, TWO[0])['1.running_mean'], 0.5)
    np.testing.assert_array_equal(values(net, TWO[1])['4.running_mean'], before)


def test_broadcasting_gives_all_the_values_of_the_first():
    net = build(TWO)
    net[0].weight.data(TWO[1])[:] = 7
    gq.StateSync().broadcast(net)
    np.testing.assert_array_equal(net[0].weight.data(TWO[1]).asnumpy(), net[0].weight.data(TWO[0]).asnumpy())
    assert (net[0].weight.data(TWO[1]).asnumpy() != 7).all()


def test_one_worker_has_nothing_to_merge():
    net = build(TWO[:1])
    before = values(net, TWO[0])
    sync = gq.StateSync()
    sync(net)
    assert sync.rank == 0 and sync.workers == 1 and sync.gather(np.ones((1, 2))).tolist() == [[1, 1]]
    for name, value in values(net, TWO[0]).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize('way', ['convert', 'attach'])
def test_a_net_that_is_not_on_the_current_context_is_calibrated_folded_and_watched(way):
    net = build(OTHERS)
    net = gq.convert(net, 4) if way == 'convert' else gq.attach(net, 4)
    gq.fold(net, 'frozen')
    gq.calibrate(net, [nd.array(batches(1)[0][0])])
    assert gq.ranges(net).keys() == gq.clipped(net, [nd.array(batches(1)[0][0])]).keys()


def test_equal_values_of_three_contexts_are_saved_to_the_bit(tmp_path):
    contexts = [mx.cpu(i) for i in range(3)]
    net = gq.convert(build(contexts), 4)
    gq.calibrate(net, [nd.array(batches(1)[0][0])])
    gq.save(net, tmp_path / 'net.npz')
    expected, found = values(net, contexts[1]), values(gq.load(tmp_path / 'net.npz', build(contexts[:1])), contexts[0])
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_the_name_of_a_store_is_no_store():
    with pytest.raises(TypeError, match=r"pass mx.kv.create\('dist_sync'\)"):
        gq.StateSync('dist_sync')


@pytest.mark.parametrize('kind', ['dist_async', 'horovod'])
def test_a_store_that_cannot_share_state_is_refused(kind):
    class Store(mx.kvstore.KVStoreBase):
        type = kind

    with pytest.raises(ValueError, match=f"type '{kind}' cannot share state"):
        gq.StateSync(Store())


def test_a_net_without_values_is_refused():
    net = nn.Dense(3)
    net.initialize()
    with pytest.raises(ValueError, match="Parameter 'weight' has no value yet"):
        gq.StateSync()(net)
