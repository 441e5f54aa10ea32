"""Switches over a whole net: modes, frozen ranges, frozen BatchNorm, phases."""
import warnings

import numpy as np
import pytest
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.layers import quantizers

METHODS = ['int8', 'fqn', 'pact', 'dorefa', 'qil', 'gdrq', 'lsq']
every_method = pytest.mark.parametrize('method', METHODS)
hybridized_or_not = pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])
STATIC = {'static_alloc': True, 'static_shape': True}


def floating():
    net = nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(nn.Conv2D(4, 3), nn.Activation('relu'), nn.Conv2D(6, 3, use_bias=False), nn.BatchNorm(),
                nn.Conv2D(6, 3, groups=2), nn.Activation('relu'), nn.Dense(3))
    net.initialize(init.Xavier())
    net(images())
    return net


def images(seed=0, size=1.0):
    return nd.array(np.random.default_rng(seed).uniform(-size, size, (4, 3, 8, 8)))


def quantized(method='int8', hybridized=False, **options):
    net = gq.convert(floating(), method=method, **options)
    gq.calibrate(net, [images()])
    net.hybridize(hybridized, **(STATIC if hybridized else {}))
    return net


def train(net, seeds=(1,), **options):
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.05, 'momentum': 0.9, 'wd': 0.1, **options},
                            kvstore=None)
    return continue_training(net, trainer, seeds)


def continue_training(net, trainer, seeds, size=3.0):
    for seed in seeds:
        with autograd.record():
            loss = (net(images(seed, size)) ** 2).mean()
        loss.backward()
        trainer.step(1)
    nd.waitall()        # a static graph writes BatchNorm's statistics without telling who reads them next
    return trainer


def ranges(net):
    """Every value of the input quantizers, but for the switches themselves."""
    return {f'{path}.{name}': quantizer.value(name) for path, quantizer in quantizers(net, 'activation').items()
            for name in quantizer._reg_params if name not in ('mode', 'frozen')}


def moved(before, after):
    return [name for name in before if not np.array_equal(before[name], after[name])]


# ---------------------------------------------------------------- modes


@every_method
@hybridized_or_not
def test_a_net_without_ranges_trains_in_float_while_it_is_only_observed(seed, method, hybridized):
    net = gq.set_mode(gq.convert(floating(), method=method), 'observe')
    net.hybridize(hybridized, **(STATIC if hybridized else {}))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        train(net)
    assert all(np.isfinite(parameter.data().asnumpy()).all() for parameter in net.collect_params().values())


@every_method
@hybridized_or_not
@pytest.mark.parametrize('mode', ['off', 'observe'])
def test_off_and_observe_give_the_float_nets_outputs(seed, method, hybridized, mode):
    net = floating()
    net.hybridize(hybridized)
    expected = net(images(5)).asnumpy()
    net.hybridize(False)
    gq.calibrate(gq.convert(net, method=method), [images()])
    net.hybridize(hybridized)
    quantize = net(images(5)).asnumpy()
    assert gq.set_mode(net, mode) is net
    np.testing.assert_array_equal(net(images(5)).asnumpy(), expected)
    gq.set_mode(net, 'quantize')
    np.testing.assert_array_equal(net(images(5)).asnumpy(), quantize)
    assert not np.array_equal(quantize, expected)


@every_method
def test_off_gives_the_float_nets_gradients(seed, method):
    net = floating()
    gradients = []
    for _ in range(2):
        with autograd.record():
            loss = (net(images(5)) ** 2).sum()
        loss.backward()
        gradients.append(net[2].weight.grad().asnumpy())
        if len(gradients) == 1:
            gq.set_mode(gq.convert(net, method=method), 'off')
    # BatchNorm's statistics are the batch's; what differs is the order of float32 sums
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@every_method
@hybridized_or_not
def test_off_keeps_the_ranges_in_training(seed, method, hybridized):
    net = gq.set_mode(quantized(method, hybridized), 'off')
    before = ranges(net)
    with autograd.record():
        net(images(3, 5.0)).wait_to_read()
    assert not moved(before, ranges(net))


@hybridized_or_not
@pytest.mark.parametrize('method, name', [('int8', 'amax'), ('gdrq', 'threshold'), ('fqn', 'hi')])
def test_observe_lets_ranges_follow_the_data_of_the_float_net(seed, method, name, hybridized):
    net = gq.set_mode(quantized(method, hybridized), 'observe')
    before = ranges(net)
    with autograd.record():
        net(images(3, 5.0)).wait_to_read()
    assert f'2.input_quantizer.{name}' in moved(before, ranges(net))


def test_no_graph_is_traced_again_for_a_mode(seed):
    net = quantized(hybridized=True)
    net(images())
    graph = net._cached_op
    gq.set_mode(net, 'off')
    net(images())
    assert net._cached_op is graph


@pytest.mark.parametrize('mode', ['of', None, 0, True])
def test_an_unknown_mode_is_refused(seed, mode):
    net = quantized()
    before = net(images()).asnumpy()
    with pytest.raises(ValueError, match=f"mode={mode!r}: pass one of 'off', 'observe', 'quantize'"):
        gq.set_mode(net, mode)
    np.testing.assert_array_equal(net(images()).asnumpy(), before)


# ---------------------------------------------------------------- freeze


@every_method
@hybridized_or_not
def test_frozen_ranges_do_not_move_under_momentum_and_weight_decay(seed, method, hybridized):
    net = quantized(method, hybridized)
    trainer = train(net, (1, 2))            # momentum has gathered
    assert gq.freeze(net) is net
    before, weight = ranges(net), net[2].weight.data().asnumpy()
    continue_training(net, trainer, (3, 4, 5))
    assert not moved(before, ranges(net)) and not np.array_equal(net[2].weight.data().asnumpy(), weight)


@hybridized_or_not
@pytest.mark.parametrize('method', ['int8', 'fqn', 'pact', 'qil', 'gdrq', 'lsq'])
def test_unfrozen_ranges_move_again(seed, method, hybridized):
    net = quantized(method, hybridized)
    gq.freeze(net)
    trainer = train(net, (1,))
    before = ranges(net)
    assert gq.unfreeze(net) is net
    continue_training(net, trainer, (2, 3))
    assert [name for name in moved(before, ranges(net)) if name.startswith('2.')]


def test_frozen_learned_ranges_have_no_gradient(seed):
    net = gq.freeze(quantized('lsq'))
    assert net[2].input_quantizer.scale.grad_req == 'null' and net[2].weight_quantizer.scale.grad_req == 'write'
    assert gq.unfreeze(net)[2].input_quantizer.scale.grad_req == 'write'


def test_weight_scales_go_on_following_frozen_nets_weights(seed):
    net = gq.freeze(quantized('int8'))
    before = net[2].weight_quantizer.qparams().scale
    net[2].weight.set_data(2 * net[2].weight.data())
    np.testing.assert_array_equal(net[2].weight_quantizer.qparams().scale, 2 * before)


@every_method
def test_freezing_does_not_change_the_output(seed, method):
    net = quantized(method)
    before = net(images(4)).asnumpy()
    np.testing.assert_array_equal(gq.freeze(net)(images(4)).asnumpy(), before)


def test_no_graph_is_traced_again_for_freezing_statistics(seed):
    net = quantized(hybridized=True)
    train(net)
    graph = net._cached_op
    gq.freeze(net)
    net(images())
    assert net._cached_op is graph


# ---------------------------------------------------------------- BatchNorm


@hybridized_or_not
def test_frozen_batchnorm_keeps_its_statistics_and_trains_gamma(seed, hybridized):
    net = quantized(hybridized=hybridized)
    trainer = train(net)
    assert gq.freeze_batchnorm(net) is net
    norm = net[3]
    before = [p.data().asnumpy() for p in (norm.running_mean, norm.running_var, norm.gamma)]
    continue_training(net, trainer, (2, 3))
    after = [p.data().asnumpy() for p in (norm.running_mean, norm.running_var, norm.gamma)]
    assert [np.array_equal(a, b) for a, b in zip(before, after)] == [True, True, False]


@hybridized_or_not
def test_frozen_batchnorm_computes_in_training_what_it_computes_in_inference(seed, hybridized):
    net = gq.freeze(quantized(hybridized=hybridized))
    train(net)          # a graph exists
    gq.freeze_batchnorm(net)
    with autograd.record():
        training = net(images(4))
    np.testing.assert_array_equal(training.asnumpy(), net(images(4)).asnumpy())


@hybridized_or_not
def test_batchnorm_can_be_unfrozen(seed, hybridized):
    net = gq.freeze_batchnorm(quantized(hybridized=hybridized))
    trainer = train(net)
    gq.freeze_batchnorm(net, False)
    before = net[3].running_mean.data().asnumpy()
    continue_training(net, trainer, (2,))
    assert not np.array_equal(net[3].running_mean.data().asnumpy(), before)


def test_float_nets_can_have_frozen_batchnorm_too(seed):
    net = gq.freeze_batchnorm(floating())
    before = net[3].running_var.data().asnumpy()
    train(net)
    np.testing.assert_array_equal(net[3].running_var.data().asnumpy(), before)


# ---------------------------------------------------------------- phases


@hybridized_or_not
def test_phases_switch_between_clipping_and_quantizing(seed, hybridized):
    net = quantized('gdrq', hybridized, bits=3)
    assert gq.set_phase(net, False) is net
    x = nd.array(np.linspace(0, 100, 50).reshape(1, 50))
    quantizer = net[2].input_quantizer
    assert len(np.unique(quantizer(x).asnumpy())) > 8 or quantizer(x).asnumpy().max() == quantizer.value('threshold')
    clipped = net(images()).asnumpy()
    gq.set_phase(net, True)
    assert len(np.unique(quantizer(x).asnumpy())) <= 8 and not np.array_equal(net(images()).asnumpy(), clipped)


def test_the_clipping_phase_clips_weights_at_a_multiple_of_their_mean(seed):
    net = gq.set_phase(quantized('gdrq', weight_options={'ktimes': 1.5, 'group_size': -1}), False)
    weight = net[2].weight.data()
    reach = 1.5 * np.abs(weight.asnumpy()).mean()
    assert reach < np.abs(weight.asnumpy()).max()
    np.testing.assert_allclose(net[2].weight_quantizer(weight).asnumpy(), np.clip(weight.asnumpy(), -reach, reach),
                               rtol=1e-6)       # the mean is a float32 sum


def test_phases_leave_other_methods_alone(seed):
    net = quantized('int8')
    before = net(images()).asnumpy()
    np.testing.assert_array_equal(gq.set_phase(net, False)(images()).asnumpy(), before)


@pytest.mark.parametrize('switch', [lambda net: gq.set_mode(net, 'off'), gq.freeze, gq.unfreeze,
                                    lambda net: gq.set_phase(net, True)])
def test_identities_have_nothing_to_switch(seed, switch):
    net = gq.convert(floating(), weight='none', activation='none')
    before = net(images()).asnumpy()
    np.testing.assert_array_equal(switch(net)(images()).asnumpy(), before)
