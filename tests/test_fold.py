"""`fold`: BatchNorm goes into layers, blocks and graphs alike, for training and for deployment."""
import copy
import gc
import json
import logging
import os
import time
import warnings
from contextlib import suppress

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

import gluonquant as gq
from fold_nets import (
    LAYERS,
    NORMS,
    STATIC,
    WAYS,
    Net,
    assert_near,
    assert_near_on_a_grid,
    assert_same,
    build,
    codes,
    images,
    losses,
    outputs,
    quantized,
    remaining,
    run,
    shaken,
    small,
    state,
    step,
)
from gluonquant import quantizers as quantizer_modes
from gluonquant.graph import Graph, as_graph
from gluonquant.layers import FoldedBatchNorm, named_blocks, quantizers
from reference import batchnorm as reference
from zoo import ZOO, entry_id
from zoo import build as build_zoo

# float32: merged weights are rounded once more, and sums of some hundred terms come in another form
FLOAT = 1e-5

both_ways = pytest.mark.parametrize('way', WAYS)
training_modes = pytest.mark.parametrize('mode', ['frozen', 'batch'])
every_mode = pytest.mark.parametrize('mode', ['merge', 'frozen', 'batch'])
hybridized_or_not = pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])


@pytest.fixture(autouse=True)
def _seeded(seed):
    pass


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'net.gq')


def as_way(way, net):
    """A float net as it is, or as a graph."""
    return net if way == 'blocks' else as_graph(net)


def float_inputs(net):
    """Switch the quantizers of activations off, so that nothing hides a difference."""
    for quantizer in quantizers(net, 'activation').values():
        quantizer.set_mode(quantizer_modes.OFF)


def ready(function, **layers):
    return shaken(Net(function, **layers), images(99, 16))


def chain(*layers):
    net = nn.HybridSequential(prefix='net_')
    net.add(*layers)
    return shaken(net, images(99, 16))


# ---------------------------------------------------------------- float nets, merged

@hybridized_or_not
@both_ways
def test_a_merged_float_net_computes_the_same(way, hybridized):
    net = as_way(way, small())
    expected, = run(net, images())
    gq.fold(net, 'merge')
    if hybridized:
        net.hybridize(**STATIC)
    assert_near(run(net, images())[0], expected, FLOAT)


@both_ways
def test_merging_is_the_default(way):
    net = gq.fold(as_way(way, small()))
    assert remaining(net) == 0 and not any('gamma' in name for name in state(net))


@both_ways
def test_fold_returns_the_net(way):
    net = as_way(way, small())
    assert gq.fold(net) is net


def merged_by_reference(before, norm):
    """(weight, bias) from the state of a net with the Parameters of `build`."""
    told, layer = build()[int(norm)]._kwargs, NORMS[norm]
    names = {'gamma': 'gamma', 'beta': 'beta', 'mean': 'running_mean', 'var': 'running_var'}
    return reference.merged(reference.Dense(), before[f'{layer}.weight'], before.get(f'{layer}.bias'), eps=told['eps'],
                            fix_gamma=told['fix_gamma'],
                            **{key: before[f'{norm}.{name}'] for key, name in names.items()})


@both_ways
@pytest.mark.parametrize('norm', NORMS)
def test_merged_weights_and_biases_are_those_of_the_reference(way, norm):
    net, layer = as_way(way, small()), NORMS[norm]
    weight, bias = merged_by_reference(state(net), norm)
    after = state(gq.fold(net))
    np.testing.assert_array_equal(after[f'{layer}.weight'], weight.astype('float32'))
    np.testing.assert_array_equal(after[f'{layer}.bias'], bias.astype('float32'))


@both_ways
def test_a_merged_net_has_the_parameters_of_a_net_without_batchnorm(way):
    after = state(gq.fold(as_way(way, small())))
    assert sorted(after) == sorted(f'{layer}.{name}' for layer in ('0', '3', '6', '9', '12')
                                   for name in ('weight', 'bias'))


@both_ways
def test_parameters_of_a_merged_net_keep_their_names(way):
    names = {path: p.name for path, p in small()._collect_params_with_prefix().items()}
    after = gq.fold(as_way(way, small()))._collect_params_with_prefix()
    assert all(p.name == names[path] for path, p in after.items() if path in names)
    assert after['0.bias'].name == names['0.weight'].replace('weight', 'bias')


@both_ways
def test_parameters_of_a_merged_net_stay_trainable(way):
    net = gq.fold(as_way(way, small()))
    assert all(p.grad_req == 'write' for p in net.collect_params().values())
    before, _ = state(net), losses(net, 1)
    assert all((state(net)[name] != value).any() for name, value in before.items())


@both_ways
def test_a_parameter_that_was_not_to_be_trained_is_not_trained_when_merged(way):
    net = small()
    net[0].weight.grad_req = 'null'
    assert gq.fold(as_way(way, net))._collect_params_with_prefix()['0.weight'].grad_req == 'null'


@both_ways
def test_a_fixed_gamma_is_ignored(way):
    net = chain(nn.Conv2D(4, 3), nn.BatchNorm(scale=False))
    net[1].gamma.set_data(nd.array([5, -5, 7, 0]))      # BatchNorm takes it for 1
    net = as_way(way, net)
    expected, = run(net, images())
    assert_near(run(gq.fold(net), images())[0], expected, FLOAT)


@both_ways
def test_a_channel_with_gamma_0_becomes_beta(way):
    net = chain(nn.Conv2D(4, 3), nn.BatchNorm())
    net[1].gamma.set_data(nd.array([1, 0, -1, 1]))
    beta = net[1].beta.data().asnumpy()
    out, = run(gq.fold(as_way(way, net)), images())
    np.testing.assert_array_equal(out[:, 1], beta[1])


@both_ways
def test_the_epsilon_of_each_batchnorm_counts(way):
    net = chain(nn.Conv2D(4, 3), nn.BatchNorm(epsilon=0.5))
    net = as_way(way, net)
    expected, = run(net, images())
    assert_near(run(gq.fold(net), images())[0], expected, FLOAT)


@both_ways
@pytest.mark.parametrize('kind, shape', [(nn.Conv1D, (2, 3, 9)), (nn.Conv3D, (2, 3, 4, 5, 4)),
                                         (nn.Conv1DTranspose, (2, 3, 9)), (nn.Conv3DTranspose, (2, 3, 4, 5, 4))])
def test_convolutions_of_all_dimensions_are_merged(way, kind, shape):
    x = nd.array(np.random.default_rng(3).uniform(-1, 1, shape))
    net = nn.HybridSequential()
    net.add(kind(4, 3), nn.BatchNorm())
    net = as_way(way, shaken(net, x))
    expected, = run(net, x)
    assert_near(run(gq.fold(net), x)[0], expected, FLOAT)


@both_ways
def test_a_layer_that_two_operators_read_is_left_alone(way):
    net = as_way(way, ready(lambda net, F, x: net.norm(net.conv(x)) + F.relu(net.conv.last), conv=Remembering(4, 3),
                            norm=nn.BatchNorm()))
    expected, = run(net, images())
    with pytest.raises(ValueError, match='no BatchNorm of .* can be folded: .*reads .*conv.* too'):
        gq.fold(net)
    np.testing.assert_array_equal(run(net, images())[0], expected)


class Remembering(nn.Conv2D):
    """A convolution whose last output can be read again."""

    def hybrid_forward(self, F, x, *args, **kwargs):
        self.last = super().hybrid_forward(F, x, *args, **kwargs)
        return self.last


@both_ways
def test_what_can_be_folded_is_folded_and_the_rest_stays(way):
    net = as_way(way, chain(nn.BatchNorm(), nn.Conv2D(4, 3), nn.BatchNorm(), nn.Activation('relu'), nn.BatchNorm()))
    expected, = run(net, images())
    gq.fold(net)
    assert remaining(net) == 2
    assert_near(run(net, images())[0], expected, FLOAT)


@both_ways
def test_of_two_batchnorms_in_a_row_the_first_is_merged_and_then_the_second(way):
    net = as_way(way, chain(nn.Conv2D(4, 3), nn.BatchNorm(), nn.BatchNorm()))
    expected, = run(net, images())
    assert remaining(gq.fold(net)) == 1
    assert remaining(gq.fold(net)) == 0
    assert_near(run(net, images())[0], expected, FLOAT)


@both_ways
def test_a_batchnorm_behind_two_layers_is_merged_or_left_alone(way):
    net = as_way(way, ready(lambda net, F, x: net.norm(net.first(x)) + net.norm(net.second(x)),
                            first=nn.Conv2D(4, 3), second=nn.Conv2D(4, 3), norm=nn.BatchNorm()))
    expected, = run(net, images())
    try:
        gq.fold(net)
    except ValueError as error:
        assert 'no BatchNorm' in str(error)
    assert_near(run(net, images())[0], expected, FLOAT)


@both_ways
def test_a_layer_and_its_batchnorm_called_twice_stay(way):
    net = as_way(way, ready(lambda net, F, x: net.norm(net.conv(net.norm(net.conv(x)))), conv=nn.Conv2D(3, 1),
                            norm=nn.BatchNorm()))
    expected, = run(net, images())
    with pytest.raises(ValueError, match='shared with another'):
        gq.fold(net)
    np.testing.assert_array_equal(run(net, images())[0], expected)


def test_an_operator_in_a_block_of_the_users_own_does_not_keep_others_from_being_merged():
    class Own(nn.HybridBlock):
        def __init__(self):
            super().__init__()
            with self.name_scope():
                self.weight = self.params.get('weight', shape=(4, 3, 1, 1))

        def hybrid_forward(self, F, x, weight):
            return F.Convolution(x, weight, kernel=(1, 1), num_filter=4, no_bias=True)
    net = chain(Own(), nn.BatchNorm(), nn.Conv2D(4, 3), nn.BatchNorm())
    expected, = run(net, images())
    gq.fold(net)
    assert isinstance(net[3], FoldedBatchNorm)
    assert_near(run(net, images())[0], expected, FLOAT)


def test_the_graph_of_an_operator_in_a_block_of_the_users_own_is_merged():
    class Own(nn.HybridBlock):
        def __init__(self):
            super().__init__()
            with self.name_scope():
                self.kernels = self.params.get('kernels', shape=(4, 3, 1, 1))

        def hybrid_forward(self, F, x, kernels):
            return F.Convolution(x, kernels, kernel=(1, 1), num_filter=4, no_bias=True)
    net = as_graph(chain(Own(), nn.BatchNorm(), nn.Conv2D(4, 3), nn.BatchNorm()))
    expected, = run(net, images())
    assert remaining(gq.fold(net)) == 0
    assert_near(run(net, images())[0], expected, FLOAT)


@both_ways
def test_a_convolution_of_a_class_of_the_users_own_is_merged(way):
    class Own(nn.Conv2D):
        pass
    net = as_way(way, chain(nn.Conv2D(4, 3), nn.BatchNorm(), Own(4, 3), nn.BatchNorm()))
    expected, = run(net, images())
    assert remaining(gq.fold(net)) == 0
    assert_near(run(net, images())[0], expected, FLOAT)


class Idle(nn.HybridBlock):
    """Has a Parameter whose size nobody learns."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.unknown = self.params.get('unknown', shape=(3, 0), allow_deferred_init=True)


def test_a_layer_that_never_runs_does_not_keep_others_from_being_merged():
    net = ready(lambda net, F, x: net.norm(net.conv(x)), conv=nn.Conv2D(4, 3), norm=nn.BatchNorm(),
                idle=Idle())
    expected, = run(net, images())
    gq.fold(net)
    assert_near(run(net, images())[0], expected, FLOAT)


@both_ways
def test_a_float64_net_is_merged(way):
    net = small()
    net.cast('float64')
    net, x = as_way(way, net), images().astype('float64')
    expected, = run(net, x)
    assert_near(run(gq.fold(net), x)[0], expected, FLOAT)


@both_ways
def test_a_net_that_was_hybridized_and_has_run_is_merged(way):
    net = as_way(way, small())
    net.hybridize(**STATIC)
    expected, = run(net, images())
    assert_near(run(gq.fold(net), images())[0], expected, FLOAT)


class Slow(mx.operator.CustomOp):
    """The identity, whose backward pass takes its time: what comes behind it is still to be computed meanwhile."""

    def forward(self, is_train, req, in_data, out_data, aux):
        self.assign(out_data[0], req[0], in_data[0])

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        time.sleep(0.3)
        self.assign(in_grad[0], req[0], out_grad[0])


@mx.operator.register('test_fold_slow')
class SlowProp(mx.operator.CustomOpProp):
    def create_operator(self, ctx, shapes, dtypes):
        return Slow()


@pytest.mark.parametrize('kind', ['float', 'quantized'])
@both_ways
def test_statistics_that_a_static_graph_is_still_writing_are_waited_for(way, kind):
    """Reading does not wait for what a static graph writes: `fold` has to."""
    blocks = small()
    net = as_way(way, blocks) if kind == 'float' else quantized(way, blocks)
    norms = {norm: (blocks[int(norm)].beta, blocks[int(norm)].running_mean, blocks[int(norm)].running_var)
             for norm in NORMS}
    gammas = {norm: blocks[int(norm)].gamma.data().asnumpy() for norm in NORMS}
    biases = {layer: value for layer, value in state(net).items() if layer.endswith('bias')}
    net.hybridize(**STATIC)
    for op in ('identity', 'test_fold_slow'):       # the first pass traces the graph
        with autograd.record():
            out = net(images(5))
            loss = (nd.Custom(out, op_type=op) if op != 'identity' else out).sum()
        loss.backward()
    gq.fold(net)
    merged = state(net)
    for norm, parameters in norms.items():
        beta, mean, var = (parameter.data().asnumpy().astype('float64') for parameter in parameters)
        bias, told = biases.get(f'{NORMS[norm]}.bias', 0), build()[int(norm)]._kwargs
        gamma = 1 if told['fix_gamma'] else gammas[norm]
        assert_near(merged[f'{NORMS[norm]}.bias'], beta + (bias - mean) * gamma / np.sqrt(var + told['eps']), FLOAT)


@both_ways
def test_a_merged_float_net_is_quantized_like_any_other(way):
    net = gq.fold(as_way(way, small()))
    expected, = run(net, images())
    net = gq.convert(net, method='int8', bits=8) if way == 'blocks' else gq.attach(net, method='int8', bits=8)
    gq.calibrate(net, [images()], observer='minmax')
    assert_near(run(net, images())[0], expected, 0.05)      # 8 bits, nothing clipped
    assert np.isfinite(losses(net, 2)).all()


def test_a_net_merged_before_it_was_converted_is_saved_and_loaded(path):
    net = quantized('blocks', gq.fold(small()))
    gq.save(net, path)
    np.testing.assert_array_equal(run(gq.load(path, gq.fold(small(seed=4))), images()), run(net, images()))


def test_gluons_own_files_carry_a_merged_float_net(path):
    net = gq.fold(small())
    net.save_parameters(path)
    other = gq.fold(small(seed=4))
    other.load_parameters(path)
    np.testing.assert_array_equal(run(other, images()), run(net, images()))


# ---------------------------------------------------------------- the float net beside an attached one

@pytest.mark.parametrize('mode', ['merge', 'frozen', 'batch'])
def test_folding_an_attached_net_leaves_the_float_net_as_it_was(mode):
    net = small()
    before, expected = state(net), run(net, images())
    gq.fold(quantized('graph', net), mode)
    assert_same(state(net), before)
    np.testing.assert_array_equal(run(net, images()), expected)


def test_parameters_that_merging_does_not_change_are_still_shared_with_the_float_net():
    net = small()
    attached = gq.fold(quantized('graph', net))
    assert attached._collect_params_with_prefix()['12.weight'] is net[12].weight


@training_modes
def test_a_folded_attached_net_shares_gamma_with_the_float_net(mode):
    net = small()
    attached = gq.fold(quantized('graph', net), mode)
    assert attached._collect_params_with_prefix()['1.gamma'] is net[1].gamma


def test_two_attached_nets_of_one_float_net_are_merged_independently():
    net = small()
    first, second = quantized('graph', net), quantized('graph', net)
    expected = run(second, images())
    gq.fold(first)
    np.testing.assert_array_equal(run(second, images()), expected)


# ---------------------------------------------------------------- quantized nets, merged

METHODS = {
    'int8': {},
    'int8 4': {'bits': 4, 'first_last_bits': 4},
    'int8 per tensor': {'per_channel': False},
    'lsq': {'method': 'lsq', 'bits': 4},
    'lsq per tensor': {'method': 'lsq', 'bits': 4, 'per_channel': False},
    'lsq 8': {'method': 'lsq', 'bits': 8},
    'pact': {'method': 'pact', 'bits': 4},
    'dorefa': {'method': 'dorefa', 'bits': 4},
    'qil': {'method': 'qil', 'bits': 4},
    'gdrq': {'method': 'gdrq', 'bits': 4},
    'fqn': {'method': 'fqn', 'bits': 8},
}
EVERYDAY = ('int8', 'lsq', 'pact')
every_method = pytest.mark.parametrize('method', [pytest.param(name, marks=[] if name in EVERYDAY else pytest.mark.slow)
                                                  for name in METHODS])


@both_ways
@every_method
def test_merging_keeps_the_codes_of_all_weights(way, method):
    net = quantized(way, **METHODS[method])
    before = codes(net)
    assert len(before) == 5
    assert_same(codes(gq.fold(net)), before)


@both_ways
@every_method
def test_a_merged_quantized_net_computes_the_same(way, method):
    net = quantized(way, **METHODS[method])
    expected, = run(net, images())
    gq.fold(net)
    assert remaining(net) == 0
    assert_near_on_a_grid(run(net, images())[0], expected)


@both_ways
def test_the_first_layer_of_a_merged_quantized_net_computes_the_same(way):
    """Without rounding behind it, nothing hides a difference."""
    net = quantized(way, chain(nn.Conv2D(16, 3), nn.BatchNorm()))
    expected, = run(net, images())
    assert_near(run(gq.fold(net), images())[0], expected, FLOAT)


@both_ways
def test_what_a_merged_layer_multiplies_is_codes_times_one_factor_for_each_channel(way):
    net = quantized(way, chain(nn.Conv2D(4, 3, use_bias=False), nn.BatchNorm()))
    scale = quantizers(net, 'weight')['0.weight_quantizer'].qparams().scale
    code, values = codes(net)['0.weight_quantizer'], state(net)
    factor = values['1.gamma'] / np.sqrt(values['1.running_var'].astype('float64') + 1e-5)
    bias = values['1.beta'] - values['1.running_mean'] * factor
    gq.fold(net)
    float_inputs(net)
    weight = code * scale.reshape(-1, 1, 1, 1) * factor.reshape(-1, 1, 1, 1)
    x = images().asnumpy().astype('float64')
    expected = reference.Convolution((1, 1), (0, 0)).forward(x, weight) + bias.reshape(1, -1, 1, 1)
    assert_near(run(net, images())[0], expected, FLOAT)


@both_ways
def test_a_layer_with_a_float_weight_takes_the_factor_into_it(way):
    net = quantized(way, weight='none', activation='int8', rules=[{'pattern': pattern, 'weight': 'none'}
                                                                  for pattern in ('0', '12')])
    expected, = run(net, images())
    gq.fold(net)
    assert not any('factor' in name for name in state(net))
    assert_near_on_a_grid(run(net, images())[0], expected)


@both_ways
def test_the_factor_behind_a_quantizer_is_not_trained(way):
    net = gq.fold(quantized(way))
    factors = [p for name, p in net._collect_params_with_prefix().items() if name.endswith('factor')]
    assert len(factors) == 4 and all(p.grad_req == 'null' for p in factors)


@both_ways
def test_a_calibrated_net_is_merged_without_running_it_first(way):
    net = quantized(way, calibrate=False)
    gq.calibrate(net, [images(1)])
    gq.fold(net)
    assert remaining(net) == 0


@both_ways
def test_a_net_that_is_not_calibrated_yet_is_merged(way):
    net = gq.fold(quantized(way, calibrate=False))
    gq.calibrate(net, [images(1)])
    other = quantized(way)
    assert_near_on_a_grid(run(net, images())[0], run(other, images())[0], share=0.1)


@both_ways
def test_a_merged_quantized_net_can_be_calibrated_again(way):
    net = gq.fold(quantized(way))
    expected, = run(net, images())
    gq.calibrate(net, [images(1)])
    assert_near_on_a_grid(run(net, images())[0], expected, share=0.05)


@both_ways
@training_modes
def test_a_folded_net_is_merged_and_computes_the_same(way, mode):
    net = gq.fold(quantized(way), mode)
    gq.calibrate(net, [images(1)])
    expected, = run(net, images())
    gq.fold(net, 'merge')
    assert_near_on_a_grid(run(net, images())[0], expected)


@both_ways
@training_modes
def test_a_folded_net_that_is_merged_has_no_factor_behind_quantizers(way, mode):
    net = gq.fold(gq.fold(quantized(way), mode), 'merge')
    assert not any('factor' in name or 'gamma' in name for name in state(net))


@both_ways
@training_modes
@every_method
def test_merging_a_folded_net_keeps_codes_but_for_ties(way, mode, method):
    net = gq.fold(quantized(way, **METHODS[method]), mode)
    before = codes(net)
    after = codes(gq.fold(net, 'merge'))
    # k w in float32 and in float64 differ in the last bit: a weight on a tie may go the other way.
    assert sum((after[name] != value).sum() for name, value in before.items()) <= 1


@both_ways
def test_a_merged_quantized_net_trains(way):
    net = gq.fold(quantized(way))
    net.hybridize(**STATIC)
    found = losses(net, 6)
    assert np.isfinite(found).all() and found[-1] < found[0]


@every_mode
@pytest.mark.parametrize('again', ['merge', 'frozen', 'batch'])
@both_ways
def test_of_two_batchnorms_in_a_row_of_a_quantized_net_the_second_stays(way, mode, again):
    """It may be merged, too, but neither in the wrong order nor said to be folded while it is not."""
    net = quantized(way, chain(nn.Conv2D(4, 3), nn.BatchNorm(), nn.BatchNorm()))
    expected, = run(net, images())
    assert remaining(gq.fold(net, mode)) == 1
    assert_near_on_a_grid(run(net, images())[0], expected)
    try:
        gq.fold(net, again)
    except ValueError as error:
        assert 'no BatchNorm' in str(error)
    assert_near_on_a_grid(run(net, images())[0], expected)


@both_ways
def test_a_batchnorm_behind_a_folded_one_is_frozen_or_not_as_before(way):
    net = gq.fold(quantized(way, chain(nn.Conv2D(4, 3), nn.BatchNorm(), nn.BatchNorm())), 'frozen')
    with suppress(ValueError):
        gq.fold(net, 'frozen')
    before = state(net)['2.running_mean']
    assert (step(net)[2]['2.running_mean'] != before).any()


# ---------------------------------------------------------------- 'frozen': the quantizer sees k w

def folded_weights(before):
    """{path of a layer: k w} from the state of a net with the Parameters of `small`."""
    return {layer: merged_by_reference(before, norm)[0] for norm, layer in NORMS.items()}


@both_ways
@training_modes
def test_the_quantizer_sees_the_folded_weight(way, mode):
    net = quantized(way)
    expected = folded_weights(state(net))
    gq.fold(net, mode)
    for layer, weight in expected.items():
        found = quantizers(net, 'weight')[f'{layer}.weight_quantizer'].source.asnumpy()
        assert_near(found, weight, 3e-7)        # three roundings to float32


@both_ways
@training_modes
def test_scales_of_int8_are_those_of_the_folded_weight(way, mode):
    net = quantized(way)
    expected = folded_weights(state(net))
    gq.fold(net, mode)
    for layer, weight in expected.items():
        scale = quantizers(net, 'weight')[f'{layer}.weight_quantizer'].qparams().scale
        reach = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        np.testing.assert_allclose(scale, reach / 127, rtol=5e-7)       # roundings to float32


@both_ways
@training_modes
@every_method
def test_folding_after_calibration_gives_the_weight_ranges_of_folding_before_it(way, mode, method):
    late = gq.fold(quantized(way, **METHODS[method]), mode)
    early = gq.fold(quantized(way, calibrate=False, **METHODS[method]), mode)
    gq.calibrate(early, [images(1)])
    for name, quantizer in quantizers(early, 'weight').items():
        for parameter in quantizer._reg_params:
            np.testing.assert_array_equal(quantizers(late)[name].value(parameter), quantizer.value(parameter))


@both_ways
@training_modes
def test_folding_after_calibration_keeps_the_ranges_of_activations(way, mode):
    net = quantized(way)
    before = {name: quantizer.value('amax') for name, quantizer in quantizers(net, 'activation').items()}
    gq.fold(net, mode)
    assert_same({name: quantizer.value('amax') for name, quantizer in quantizers(net, 'activation').items()}, before)


TRANSPOSED = {'first': lambda: (nn.Conv2DTranspose(4, 3, strides=2), nn.BatchNorm()),
              'without bias': lambda: (nn.Conv2DTranspose(4, 3, use_bias=False), nn.BatchNorm()),
              'in the middle': lambda: (nn.Conv2D(4, 3), nn.Conv2DTranspose(6, 2, strides=2), nn.BatchNorm(),
                                        nn.Activation('relu'), nn.Conv2D(3, 1))}


@every_mode
@both_ways
@pytest.mark.parametrize('where', TRANSPOSED)
def test_transposed_convolutions_are_folded_in_quantized_nets(way, mode, where):
    net = gq.fold(quantized(way, chain(*TRANSPOSED[where]())), mode)
    assert remaining(net) == 0


@every_mode
@both_ways
def test_a_quantized_transposed_convolution_computes_as_before(way, mode):
    """Per channel: int8 codes of w and of k w are equal but for signs, as scales are in proportion."""
    net = quantized(way, chain(*TRANSPOSED['first']()))
    expected, = run(net, images())
    gq.fold(net, mode)
    assert_near_on_a_grid(run(net, images())[0], expected)


@both_ways
def test_a_transposed_convolution_trains_like_one_with_a_batchnorm(way):
    expected = step(chain(*TRANSPOSED['in the middle']()))
    assert_equal_steps(step(off(way, 'batch', chain(*TRANSPOSED['in the middle']()))), expected)


@both_ways
def test_a_grouped_transposed_convolution_stays(way):
    net = as_way(way, chain(nn.Conv2DTranspose(6, 2, groups=3), nn.BatchNorm()))
    with pytest.raises(ValueError, match='counts the channels of one group only'):
        gq.fold(net)


@both_ways
@training_modes
def test_without_quantization_inference_is_that_of_the_float_net(way, mode):
    net = small()
    expected, = run(net, images())
    net = gq.set_mode(gq.fold(quantized(way, net, calibrate=False), mode), 'off')
    assert_near(run(net, images())[0], expected, FLOAT)


def off(way, mode, net):
    return gq.set_mode(gq.fold(quantized(way, net, calibrate=False), mode), 'off')


def assert_equal_steps(actual, expected):
    out, gradients, statistics = actual
    assert_near(out, expected[0], FLOAT)
    assert gradients.keys() == expected[1].keys() and statistics.keys() == expected[2].keys()
    # Gradients of biases before a BatchNorm are 0 but for rounding: all differences count against the largest of all.
    largest = max(np.abs(gradient).max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=2e-5 * largest, err_msg=name)
    for name, value in expected[2].items():
        np.testing.assert_allclose(statistics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@hybridized_or_not
@both_ways
def test_without_quantization_frozen_trains_like_a_frozen_batchnorm(way, hybridized):
    expected = step(gq.freeze_batchnorm(small()))
    net = off(way, 'frozen', small())
    if hybridized:
        net.hybridize(**STATIC)
    assert_equal_steps(step(net), expected)


@hybridized_or_not
@both_ways
def test_without_quantization_batch_trains_like_a_batchnorm(way, hybridized):
    expected = step(small())
    net = off(way, 'batch', small())
    if hybridized:
        net.hybridize(**STATIC)
    assert_equal_steps(step(net), expected)


@both_ways
def test_gamma_and_beta_of_frozen_are_trained_and_statistics_are_not(way):
    net = gq.fold(quantized(way), 'frozen')
    before, _ = state(net), losses(net, 2)
    after = state(net)
    assert {name: bool((after[name] != before[name]).any()) for name in before if name.startswith('1.')} == {
        '1.gamma': True, '1.beta': True, '1.running_mean': False, '1.running_var': False}


@both_ways
def test_gradients_of_a_quantized_frozen_layer_are_those_of_the_reference(way):
    net = chain(nn.Conv2D(4, 3), nn.BatchNorm())
    values = state(net)
    net = gq.fold(quantized(way, net), 'frozen')
    float_inputs(net)
    code, quantizer = codes(net)['0.weight_quantizer'], quantizers(net, 'weight')['0.weight_quantizer']
    rounded = quantizer(quantizer.source).asnumpy()
    assert len(np.unique(code)) > 50
    out, gradients, _ = step(net)
    g = np.random.default_rng(5).normal(size=out.shape).astype('float32')
    expected = reference.frozen(reference.Convolution((1, 1), (0, 0)), images(2).asnumpy(), values['0.weight'],
                                values['0.bias'], values['1.gamma'], values['1.beta'], values['1.running_mean'],
                                values['1.running_var'], 1e-5, g, quantize=lambda _: rounded)
    assert_near(out, expected.y, FLOAT)
    for name, which in [('0.weight', 'dweight'), ('0.bias', 'dbias'), ('1.gamma', 'dgamma'), ('1.beta', 'dbeta')]:
        assert_near(gradients[name], getattr(expected, which), 2e-5)


@both_ways
def test_gradients_and_statistics_of_a_quantized_batch_layer_are_those_of_the_reference(way):
    net = chain(nn.Conv2D(4, 3), nn.BatchNorm(momentum=0.7))
    values = state(net)
    net = gq.fold(quantized(way, net), 'batch')
    float_inputs(net)
    quantizer = quantizers(net, 'weight')['0.weight_quantizer']
    rounded = quantizer(quantizer.source).asnumpy()
    out, gradients, statistics = step(net)
    g = np.random.default_rng(5).normal(size=out.shape).astype('float32')
    expected = reference.batch(reference.Convolution((1, 1), (0, 0)), images(2).asnumpy(), values['0.weight'],
                               values['0.bias'], values['1.gamma'], values['1.beta'], values['1.running_mean'],
                               values['1.running_var'], 1e-5, g, momentum=0.7, quantize=lambda _: rounded)
    assert_near(out, expected.y, FLOAT)
    for name, which in [('0.weight', 'dweight'), ('1.gamma', 'dgamma'), ('1.beta', 'dbeta')]:
        assert_near(gradients[name], getattr(expected, which), 5e-5)
    assert_near(statistics['1.running_mean'], expected.mean, FLOAT)
    assert_near(statistics['1.running_var'], expected.var, FLOAT)


@both_ways
def test_without_quantization_many_steps_of_batch_are_those_of_the_float_net(way):
    net = off(way, 'batch', small())
    # Small differences grow from step to step.
    np.testing.assert_allclose(losses(net, 5), losses(small(), 5), rtol=1e-3)


@training_modes
@both_ways
def test_a_float64_net_trains_folded(way, mode):
    net = quantized(way)
    out, gradients, _ = step(gq.fold(quantized(way), mode))
    net.cast('float64')
    gq.fold(net, mode)
    g = nd.array(np.random.default_rng(5).normal(size=out.shape), dtype='float64')
    found = step(net, images(2).astype('float64'), g)
    assert_near_on_a_grid(found[0], out)
    assert found[1]['0.weight'].dtype == np.float64
    assert_near(found[1]['9.weight'], gradients['9.weight'], 0.05)


@every_mode
@both_ways
def test_types_of_a_float16_net_fit(way, mode):
    """The CPU cannot run it."""
    net = gq.fold(quantized(way), mode)
    net.cast('float16')
    assert net(mx.sym.var('data')).infer_type(data='float16')[1] == [np.float16]


# ---------------------------------------------------------------- 'batch'

@hybridized_or_not
@both_ways
def test_freezing_batchnorm_makes_batch_frozen(way, hybridized):
    net, expected = gq.fold(quantized(way), 'batch'), gq.fold(quantized(way), 'frozen')
    if hybridized:
        net.hybridize(**STATIC)
        expected.hybridize(**STATIC)
    gq.freeze_batchnorm(net)
    mine, theirs = step(net), step(expected)
    np.testing.assert_array_equal(mine[0], theirs[0])
    assert_same(mine[1], theirs[1])
    assert_same(mine[2], theirs[2])


@both_ways
def test_freezing_batchnorm_takes_effect_in_a_net_that_has_run(way):
    net = gq.fold(quantized(way), 'batch')
    net.hybridize(**STATIC)
    before = step(net)[2]
    after = step(gq.freeze_batchnorm(net))[2]
    assert_same(after, before)


@both_ways
def test_unfreezing_batchnorm_makes_frozen_batch(way):
    net = gq.freeze_batchnorm(gq.fold(quantized(way), 'frozen'), False)
    np.testing.assert_array_equal(step(net)[0], step(gq.fold(quantized(way), 'batch'))[0])


@both_ways
def test_a_frozen_net_needs_no_second_run_of_layers(way):
    net = gq.freeze_batchnorm(gq.fold(quantized(way), 'batch'))
    net.hybridize()
    net(images())
    text = net._cached_graph[1].tojson()
    count = sum(node['op'] == 'Convolution' for node in json.loads(text)['nodes'])
    assert count == 3 and 'Dropout' not in text


@both_ways
def test_running_statistics_of_batch_are_those_of_the_float_net(way):
    """Quantization does not enter them."""
    expected = state(small())
    losses_of_float = step(small())[2]
    net = gq.fold(quantized(way, bits=2, method='lsq'), 'batch')
    found = step(net)[2]
    for name in ('1.running_mean', '1.running_var'):      # the first layer reads 8 bits
        assert not np.array_equal(found[name], expected[name])
        np.testing.assert_allclose(found[name], losses_of_float[name], rtol=0.02, atol=0.02)


@both_ways
def test_inference_of_batch_equals_that_of_frozen_but_for_rounding(way):
    batch, frozen = gq.fold(quantized(way), 'batch'), gq.fold(quantized(way), 'frozen')
    assert_near_on_a_grid(run(batch, images())[0], run(frozen, images())[0])


@both_ways
def test_inference_of_batch_changes_nothing(way):
    net = gq.fold(quantized(way), 'batch')
    before = state(net)
    net(images(7))
    assert_same(state(net), before)


@both_ways
def test_a_broken_image_in_inference_does_not_break_a_net_that_is_folded(way):
    net = gq.fold(quantized(way), 'batch')
    expected, x = run(net, images()), images()
    x[0, 0, 0, 0] = np.nan
    net(x)
    np.testing.assert_array_equal(run(net, images()), expected)


# ---------------------------------------------------------------- blocks and graphs alike

@hybridized_or_not
@every_mode
@every_method
def test_blocks_and_graph_infer_the_same_bits(method, mode, hybridized):
    nets = [gq.fold(quantized(way, **METHODS[method]), mode) for way in WAYS]
    for net in nets:
        if hybridized:
            net.hybridize(**STATIC)
    np.testing.assert_array_equal(*(run(net, images()) for net in nets))


@hybridized_or_not
@every_mode
@every_method
def test_blocks_and_graph_train_with_the_same_losses(method, mode, hybridized):
    found = []
    for way in WAYS:
        net = gq.fold(quantized(way, **METHODS[method]), mode)
        if hybridized:
            net.hybridize(**STATIC)
        found.append(losses(net))
    assert found[0] == found[1] and len(set(found[0])) == 4


@training_modes
@both_ways
def test_hybridized_nets_train_like_imperative_ones(way, mode):
    plain, hybrid = (gq.fold(quantized(way), mode) for _ in range(2))
    hybrid.hybridize(**STATIC)
    np.testing.assert_allclose(losses(hybrid), losses(plain), rtol=1e-4)


@both_ways
def test_layers_hybridized_one_by_one_compute_the_same(way):
    if way == 'graph':
        pytest.skip('an attached net has no layers')
    net = gq.fold(quantized(way), 'frozen')
    expected = run(net, images())
    for layer in net:
        layer.hybridize()
    np.testing.assert_allclose(run(net, images()), expected, rtol=1e-5, atol=1e-5)


@every_mode
def test_a_net_that_has_been_trained_hybridized_is_folded_and_trains_on(mode):
    found = []
    for way in WAYS:
        net = quantized(way)
        net.hybridize(**STATIC)
        losses(net, 2)
        found.append(losses(gq.fold(net, mode), 2))
    assert found[0] == found[1] and np.isfinite(found[0]).all()


@training_modes
@both_ways
def test_no_warning_is_given(way, mode):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.simplefilter('ignore', DeprecationWarning)     # MXNet's own
        net = gq.fold(quantized(way), mode)
        net.hybridize()
        step(net)
        net(images())


@both_ways
def test_a_merged_net_gives_no_warning(way):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.simplefilter('ignore', DeprecationWarning)     # MXNet's own
        net = gq.fold(quantized(way))
        net.hybridize()
        net(images())


# ---------------------------------------------------------------- calibration, summary, explanation, log

@both_ways
@training_modes
def test_a_folded_net_is_calibrated(way, mode):
    net = gq.fold(quantized(way, calibrate=False), mode)
    ranges = gq.calibrate(net, [images(1)])
    assert len(ranges) == 5 and all(quantizer.calibrated for quantizer in quantizers(net).values())


@both_ways
@training_modes
def test_calibration_of_a_folded_net_watches_the_float_net(way, mode):
    """Ranges of activations do not depend on whether BatchNorm is folded."""
    folded = gq.calibrate(gq.fold(quantized(way, calibrate=False), mode), [images(1)])
    plain = gq.calibrate(quantized(way, calibrate=False), [images(1)])
    assert folded.keys() == plain.keys()
    for name, bounds in plain.items():
        np.testing.assert_allclose(folded[name], bounds, rtol=1e-5, atol=1e-6)


@both_ways
@training_modes
def test_calibration_leaves_running_statistics_alone(way, mode):
    net = gq.fold(quantized(way, calibrate=False), mode)
    before = {name: value for name, value in state(net).items() if 'running' in name}
    gq.calibrate(net, [images(1)])
    assert_same({name: value for name, value in state(net).items() if 'running' in name}, before)


@every_mode
@both_ways
def test_summary_lists_the_layers_of_a_folded_net(way, mode):
    net = gq.fold(quantized(way), mode)
    assert [row.name for row in gq.summary(net).rows] == ['0', '3', '6', '9', '12']


@training_modes
def test_a_folded_graph_is_not_attached_to(mode):
    with pytest.raises(RuntimeError, match='BatchNorm is folded already: attach first, then fold'):
        gq.attach(gq.fold(as_graph(small()), mode))


@pytest.mark.parametrize('mode, word', [('merge', 'merged'), ('frozen', 'folded'), ('batch', 'folded')])
def test_explain_says_what_became_of_each_batchnorm(mode, word):
    net = quantized('graph', chain(nn.BatchNorm(), nn.Conv2D(4, 3), nn.BatchNorm(), nn.Activation('relu'),
                                   nn.Conv2D(4, 3)))
    gq.fold(net, mode)
    reasons = [row.reason for row in gq.explain(net, 'BatchNorm').rows]
    assert len(reasons) == 2
    assert reasons[0] == "stays: it reads 'data' (null), which has no weight"
    assert reasons[1].startswith(f'{word} into ')


@both_ways
def test_the_log_says_what_became_of_each_batchnorm(way, caplog):
    net = as_way(way, chain(nn.BatchNorm(), nn.Conv2D(4, 3), nn.BatchNorm()))
    with caplog.at_level(logging.INFO, 'gluonquant'):
        gq.fold(net)
    said = [record.getMessage() for record in caplog.records if record.name == 'gluonquant.fold']
    assert any("stays: it reads 'data' (null), which has no weight" in line for line in said)
    assert any('merged into' in line for line in said) and len(said) == 2


# ---------------------------------------------------------------- files

def fresh():
    net = build()
    net.initialize(mx.init.Xavier())
    return net


def trained(way, mode, **options):
    net = gq.fold(quantized(way, **options), mode)
    losses(net, 2)
    return net


@every_method
@every_mode
@both_ways
def test_a_float_net_becomes_the_saved_one(way, mode, method, path):
    if (way, mode) == ('graph', 'merge'):
        pytest.skip('a merged graph has other Parameters than the float net; see below')
    net = trained(way, mode, **METHODS[method])
    gq.save(net, path)
    other = gq.load(path, fresh())
    assert_same(state(other), state(net))
    np.testing.assert_array_equal(run(other, images()), run(net, images()))



@every_mode
@both_ways
def test_layers_without_quantizers_for_weights_are_folded(way, mode):
    none = {'weight': 'none', 'rules': [{'pattern': path, 'weight': 'none'} for path in ('0', '12')]}
    net = quantized(way, **none)
    expected, = run(net, images())
    assert remaining(gq.fold(net, mode)) == 0
    assert_near_on_a_grid(run(net, images())[0], expected)


@every_mode
def test_a_file_of_a_graph_needs_no_net(mode, path):
    net = trained('graph', mode)
    gq.save(net, path)
    other = gq.load(path)
    assert_same(state(other), state(net))
    np.testing.assert_array_equal(run(other, images()), run(net, images()))


@training_modes
@both_ways
def test_training_goes_on_as_if_it_had_not_been_interrupted(way, mode, path):
    net = trained(way, mode)
    gq.save(net, path)
    other = gq.load(path, fresh())
    for each in (net, other):
        each.hybridize(**STATIC)
    assert losses(other) == losses(net)


@training_modes
def test_training_goes_on_from_a_file_of_a_graph_without_a_net(mode, path):
    net = trained('graph', mode)
    gq.save(net, path)
    assert losses(gq.load(path)) == losses(net)


@both_ways
def test_a_net_that_was_never_initialized_is_loaded(way, path):
    net = trained(way, 'frozen')
    gq.save(net, path)
    np.testing.assert_array_equal(run(gq.load(path, build()), images()), run(net, images()))


def test_a_merged_net_is_loaded_into_one_that_was_never_initialized(path):
    net = trained('blocks', 'merge')
    gq.save(net, path)
    np.testing.assert_array_equal(run(gq.load(path, build()), images()), run(net, images()))


@every_mode
@both_ways
def test_a_net_folded_in_the_same_way_takes_the_values(way, mode, path):
    net = trained(way, mode)
    gq.save(net, path)
    other = gq.fold(quantized(way, small(seed=4)), mode)
    other.hybridize()
    gq.load(path, other)
    np.testing.assert_allclose(run(other, images()), run(net, images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('saved, loaded', [('frozen', 'batch'), ('batch', 'frozen')])
@both_ways
def test_loading_takes_over_whether_batchnorm_is_frozen(way, saved, loaded, path):
    net = trained(way, saved)
    gq.save(net, path)
    other = gq.load(path, gq.fold(quantized(way), loaded))
    np.testing.assert_array_equal(step(other)[0], step(net)[0])


@pytest.mark.parametrize('mode', ['frozen', 'merge'])
@both_ways
def test_a_file_of_a_folded_net_is_refused_by_a_net_that_is_not_folded(way, mode, path):
    gq.save(trained(way, mode), path)
    other = quantized(way)
    expected = run(other, images())
    with pytest.raises(ValueError, match=os.path.basename(path)):
        gq.load(path, other)
    np.testing.assert_array_equal(run(other, images()), expected)


def test_a_file_of_a_net_that_is_not_folded_is_refused_by_a_folded_net(path):
    gq.save(quantized('blocks'), path)
    with pytest.raises(ValueError, match="layer '0' was saved as .*fold=None.*the net has .*fold='folded'"):
        gq.load(path, gq.fold(quantized('blocks'), 'frozen'))


def loading_a_merged_graph(path, **options):
    """The float net after an attempt to load a file of a merged graph into it; what it returned before."""
    gq.save(gq.fold(quantized('graph', **options)), path)
    net = small()
    expected = run(net, images())
    return net, expected


def test_a_file_of_a_merged_graph_is_refused_by_the_float_net(path):
    net, expected = loading_a_merged_graph(path)
    with pytest.raises(ValueError, match=f'{os.path.basename(path)}: Parameter .* is missing in the (net|graph)'):
        gq.load(path, net)
    np.testing.assert_array_equal(run(net, images()), expected)


def test_a_file_of_a_merged_graph_with_float_weights_does_not_spoil_the_float_net(path):
    """All its Parameters are in the float net, too, but there they are another thing."""
    float_net = chain(nn.Conv2D(4, 3), nn.BatchNorm(), nn.Activation('relu'), nn.Conv2D(4, 3))
    expected = run(float_net, images())
    gq.save(gq.fold(quantized('graph', float_net, weight='none', activation='int8',
                              rules=[{'pattern': '*', 'weight': 'none'}])), path)
    with pytest.raises(ValueError, match=os.path.basename(path)):
        gq.load(path, float_net)
    np.testing.assert_array_equal(run(float_net, images()), expected)


class Snapshot:
    """What a net is, to compare with later."""

    def __init__(self, net):
        self.net, self.before, self.values, self.output = net, self.now(net), state(net), run(net, images())

    @staticmethod
    def now(net):
        return [(path, type(block), sorted(block._children), sorted(block._reg_params), sorted(block.params),
                 dict(getattr(block, '_kwargs', {}))) for path, block in named_blocks(net)]

    def check(self):
        assert self.now(self.net) == self.before
        assert_same(state(self.net), self.values)
        np.testing.assert_array_equal(run(self.net, images()), self.output)


@every_mode
def test_a_load_that_fails_leaves_the_float_net_as_it_was(mode, path):
    gq.save(trained('blocks', mode, net=small(classes=4)), path)
    net = small()
    before = Snapshot(net)
    with pytest.raises(ValueError, match="Parameter '12.weight' has shape .4, 5. in the file, but .3, 5. in the net"):
        gq.load(path, net)
    before.check()
    losses(net, 1)


@training_modes
def test_a_load_of_a_graph_that_fails_leaves_the_float_net_as_it_was(mode, path):
    gq.save(trained('graph', mode, net=small(classes=4)), path)
    net = small()
    before = Snapshot(net)
    with pytest.raises(ValueError, match="Parameter '12.weight' has shape .4, 5. in the file, but .3, 5. in the net"):
        gq.load(path, net)
    before.check()


@pytest.mark.parametrize('mode', ['frozen', 'merge'])
def test_a_net_without_the_batchnorm_of_the_file_is_refused(mode, path):
    def forward(net, F, x):
        x = net.conv(x)
        return net.fc(net.norm(x) if hasattr(net, 'norm') else x)
    net = quantized('blocks', ready(forward, conv=nn.Conv2D(4, 3), norm=nn.BatchNorm(), fc=nn.Dense(3)))
    gq.save(gq.fold(net, mode), path)
    other = ready(forward, conv=nn.Conv2D(4, 3), fc=nn.Dense(3))
    before = Snapshot(other)
    with pytest.raises(ValueError, match='norm'):
        gq.load(path, other)
    before.check()


@pytest.mark.parametrize('mode', ['frozen', 'merge'])
def test_a_net_with_another_block_in_the_place_of_the_batchnorm_is_refused(mode, path):
    net = quantized('blocks', chain(nn.Conv2D(4, 3), nn.BatchNorm(), nn.Dense(3)))
    gq.save(gq.fold(net, mode), path)
    other = chain(nn.Conv2D(4, 3), nn.Activation('relu'), nn.Dense(3))
    before = Snapshot(other)
    with pytest.raises(ValueError, match=os.path.basename(path)):
        gq.load(path, other)
    before.check()


@every_mode
@both_ways
def test_a_hybridized_net_that_was_saved_right_after_training_is_loaded_with_its_statistics(way, mode, path):
    net = gq.fold(quantized(way), mode)
    net.hybridize(**STATIC)
    losses(net, 2)
    gq.save(net, path)
    assert_same(state(gq.load(path, None if way == 'graph' else fresh())), state(net))


# ---------------------------------------------------------------- copies and exports

@every_mode
@both_ways
def test_a_copy_computes_the_same(way, mode):
    net = gq.fold(quantized(way), mode)
    np.testing.assert_array_equal(run(copy.deepcopy(net), images()), run(net, images()))


@every_mode
@both_ways
def test_a_copy_trains_by_itself(way, mode):
    if way == 'blocks':
        pytest.skip('copies of Gluon nets, float ones too, have no gradients')
    net = gq.fold(quantized(way), mode)
    before, other = state(net), copy.deepcopy(net)
    found = losses(other)
    assert_same(state(net), before)
    assert losses(net) == found


@every_mode
@both_ways
def test_a_copy_of_a_folded_net_can_be_merged_by_itself(way, mode):
    if mode == 'merge':
        pytest.skip('merged already')
    net = gq.fold(quantized(way), mode)
    expected = run(net, images())
    gq.fold(copy.deepcopy(net), 'merge')
    np.testing.assert_array_equal(run(net, images()), expected)


@every_mode
@both_ways
def test_an_exported_net_computes_the_same(way, mode, tmp_path):
    net = gq.fold(quantized(way), mode)
    expected, = run(net, images())
    net.hybridize()
    net(images())
    net.export(str(tmp_path / 'net'))
    again = gluon.SymbolBlock.imports(str(tmp_path / 'net-symbol.json'), ['data'], str(tmp_path / 'net-0000.params'))
    assert_near_on_a_grid(run(again, images())[0], expected)


@both_ways
def test_an_exported_merged_net_has_no_batchnorm(way, tmp_path):
    net = gq.fold(as_way(way, small()))
    net.hybridize()
    expected, = run(net, images())
    net.export(str(tmp_path / 'net'))
    text = (tmp_path / 'net-symbol.json').read_text()
    assert 'BatchNorm' not in text and 'gamma' not in text
    again = gluon.SymbolBlock.imports(str(tmp_path / 'net-symbol.json'), ['data'], str(tmp_path / 'net-0000.params'))
    assert_near(run(again, images())[0], expected, FLOAT)


# ---------------------------------------------------------------- nets without values

@training_modes
@both_ways
def test_a_net_that_is_not_initialized_is_folded(way, mode):
    net = gq.fold(quantized(way, build(), calibrate=False), mode)
    net.initialize(mx.init.Xavier())
    gq.calibrate(net, [images(1)])
    assert np.isfinite(losses(net, 2)).all()


@training_modes
@both_ways
def test_a_net_that_has_not_run_is_folded(way, mode):
    net = build()
    net.initialize(mx.init.Xavier())
    net = gq.fold(quantized(way, net, calibrate=False), mode)
    net.hybridize(**STATIC)
    gq.calibrate(net, [images(1)])
    assert np.isfinite(losses(net, 2)).all()


@training_modes
@both_ways
def test_values_loaded_after_folding_are_those_that_count(way, mode, tmp_path):
    small().save_parameters(str(tmp_path / 'float'))
    net = gq.fold(quantized(way, build(), calibrate=False), mode)
    net.load_parameters(str(tmp_path / 'float'), allow_missing=True)
    gq.calibrate(net, [images(1)])
    expected = gq.fold(quantized(way, calibrate=False), mode)
    gq.calibrate(expected, [images(1)])
    np.testing.assert_array_equal(run(net, images()), run(expected, images()))


@both_ways
@pytest.mark.parametrize('initialized', [False, True])
def test_merging_a_net_without_values_is_refused(way, initialized):
    net = build()
    if initialized:
        net.initialize()
    net = as_way(way, net)
    with pytest.raises(RuntimeError, match="Parameter 'net_conv0_weight' has no value yet: run one batch through the "
                                           'net, or load its Parameters'):
        gq.fold(net)
    assert remaining(net) == 4


# ---------------------------------------------------------------- what cannot be folded

@both_ways
@pytest.mark.parametrize('mode', ['freeze', None, '', 'MERGE', 1])
def test_an_unknown_mode_is_refused(way, mode):
    with pytest.raises(ValueError, match=f"mode={mode!r}: pass one of 'merge', 'frozen', 'batch'"):
        gq.fold(as_way(way, small()), mode)


@training_modes
def test_float_blocks_cannot_be_folded_for_training(mode):
    net = small()
    before = Snapshot(net)
    with pytest.raises(ValueError, match="layer '0' is float: convert the net first, or merge"):
        gq.fold(net, mode)
    before.check()


@training_modes
def test_layers_that_were_excluded_do_not_keep_the_others_from_being_folded(mode):
    net = quantized('blocks', exclude=['0'])
    gq.fold(net, mode)
    assert isinstance(net[4], FoldedBatchNorm)


@both_ways
@every_mode
def test_a_net_without_batchnorm_is_refused(way, mode):
    net = quantized(way, chain(nn.Conv2D(4, 3), nn.Dense(3)))
    with pytest.raises(ValueError, match=f'no BatchNorm of {type(net).__name__} can be folded: it has none'):
        gq.fold(net, mode)


@both_ways
@every_mode
def test_a_net_whose_batchnorm_cannot_be_folded_is_refused_with_the_reason(way, mode):
    net = quantized(way, chain(nn.BatchNorm(), nn.Conv2D(4, 3), nn.Dense(3)))
    with pytest.raises(ValueError, match="can be folded: .* stays: it reads 'data' .null., which has no weight"):
        gq.fold(net, mode)


@both_ways
@training_modes
def test_a_net_in_which_nothing_can_be_folded_stays_as_it_is(way, mode):
    net = quantized(way, chain(nn.BatchNorm(), nn.Conv2D(4, 3), nn.Dense(3)))
    gq.freeze_batchnorm(net, mode == 'batch')
    with pytest.raises(ValueError, match='no BatchNorm'):
        gq.fold(net, mode)
    before = state(net)['0.running_mean']
    moved = not np.array_equal(step(net)[2]['0.running_mean'], before)
    assert moved == (mode == 'frozen')


@both_ways
@every_mode
def test_a_merged_net_has_nothing_left_to_fold(way, mode):
    net = gq.fold(quantized(way))
    with pytest.raises(ValueError, match='no BatchNorm of .* can be folded: it has none'):
        gq.fold(net, mode)


@both_ways
@pytest.mark.parametrize('first, second', [('frozen', 'batch'), ('batch', 'frozen')])
def test_folding_a_folded_net_in_the_other_mode_changes_it_or_is_refused(way, first, second):
    net = gq.fold(quantized(way), first)
    try:
        gq.fold(net, second)
    except ValueError:
        np.testing.assert_array_equal(step(net)[0], step(gq.fold(quantized(way), first))[0])
    else:
        np.testing.assert_array_equal(step(net)[0], step(gq.fold(quantized(way), second))[0])


@both_ways
@training_modes
def test_a_batchnorm_that_stays_is_frozen_or_not_as_before(way, mode):
    """`fold` says nothing about a BatchNorm that it does not fold."""
    net = quantized(way, chain(nn.BatchNorm(), nn.Conv2D(4, 3), nn.BatchNorm(), nn.Dense(3)))
    gq.freeze_batchnorm(net, mode == 'batch')
    gq.fold(net, mode)
    before = state(net)['0.running_mean']
    moved = not np.array_equal(step(net)[2]['0.running_mean'], before)
    assert moved == (mode == 'frozen')


def test_a_net_that_is_no_hybrid_block_is_refused():
    class Plain(gluon.Block):
        def __init__(self):
            super().__init__()
            self.body = small()

        def forward(self, x):
            return self.body(x)
    with pytest.raises(TypeError, match='Plain is no HybridBlock: fold its parts'):
        gq.fold(Plain())


def test_something_that_is_no_net_is_refused():
    with pytest.raises(TypeError, match='str is no HybridBlock'):
        gq.fold('net-symbol.json')


def test_blocks_with_two_inputs_are_merged_or_the_message_says_how():
    net = Net(lambda net, F, x, y: net.norm(net.conv(x)) + y, conv=nn.Conv2D(3, 3, padding=1), norm=nn.BatchNorm())
    net.initialize()
    net(images(), images())
    with pytest.raises(TypeError, match='Net cannot be traced: .*as_graph'):
        gq.fold(net)


def test_a_graph_with_two_inputs_is_merged():
    net = Net(lambda net, F, x, y: net.norm(net.conv(x)) + y, conv=nn.Conv2D(3, 3, padding=1), norm=nn.BatchNorm())
    net.initialize()
    expected = net(images(), images(1))
    net = gq.fold(as_graph(net, inputs=('x', 'y')))
    assert remaining(net) == 0
    assert_near(net(images(), images(1)).asnumpy(), expected.asnumpy(), FLOAT)


@both_ways
def test_several_outputs_are_kept(way):
    def forward(net, F, x):
        y = net.norm(net.conv(x))
        return y, [F.relu(y), net.fc(y)]
    net = as_way(way, ready(forward, conv=nn.Conv2D(4, 3), norm=nn.BatchNorm(), fc=nn.Dense(3)))
    expected = run(net, images())
    gq.fold(net)
    assert isinstance(net(images())[1], (list, tuple))
    for out, reference_out in zip(run(net, images()), expected, strict=True):
        assert_near(out, reference_out, FLOAT)


def test_a_net_that_cannot_be_traced_is_refused():
    net = Net(lambda net, F, x: net.norm(net.conv(x)) * x.shape[0], conv=nn.Conv2D(4, 3), norm=nn.BatchNorm())
    net = shaken(net, images())
    before = Snapshot(net)
    with pytest.raises(TypeError, match='Net cannot be traced: AttributeError'):
        gq.fold(net)
    before.check()


def test_an_attached_net_inside_of_another_block_is_folded():
    outer = nn.HybridSequential()
    outer.add(quantized('graph'))
    gq.fold(outer)
    assert remaining(outer[0]) == 0


def test_a_symbol_block_is_merged_or_the_message_says_how():
    net = small()
    net.hybridize()
    out = net(mx.sym.var('data'))
    block = gluon.SymbolBlock(out, mx.sym.var('data'), net.collect_params())
    with pytest.raises((ValueError, TypeError), match='as_graph'):
        gq.fold(block)


@training_modes
@both_ways
def test_a_net_that_fails_to_be_folded_trains_on(way, mode):
    net = quantized(way, chain(nn.BatchNorm(), nn.Conv2D(4, 3), nn.Dense(3)))
    with pytest.raises(ValueError, match='no BatchNorm'):
        gq.fold(net, mode)
    assert np.isfinite(losses(net, 2)).all()


# ---------------------------------------------------------------- FQN, the whole recipe

@pytest.fixture(scope='module')
def digits():
    from sklearn.datasets import load_digits
    found = load_digits()
    return (nd.array(found.images[:256, None] / 8 - 1), nd.array(found.target[:256]))


def digit_net(x, y):
    mx.random.seed(3)
    np.random.seed(3)
    net = nn.HybridSequential(prefix='digits_')
    with net.name_scope():
        net.add(nn.Conv2D(8, 3, padding=1, use_bias=False), nn.BatchNorm(), nn.Activation('relu'), nn.MaxPool2D(),
                nn.Conv2D(16, 3, padding=1, use_bias=False), nn.BatchNorm(), nn.Activation('relu'), nn.Dense(10))
    net.initialize(mx.init.Xavier())
    learn(net, x, y, 8, 0.1)
    return net


def learn(net, x, y, steps, lr):
    loss_of = gluon.loss.SoftmaxCrossEntropyLoss()
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': lr, 'momentum': 0.5}, kvstore=None)
    found = []
    for _ in range(steps):
        with autograd.record():
            loss = loss_of(net(x), y).mean()
        loss.backward()
        trainer.step(1)
        found.append(loss.asscalar())
    nd.waitall()
    return found


@training_modes
@both_ways
@pytest.mark.parametrize('bits', [4, 8])
def test_fqn_learns_digits(way, mode, bits, digits):
    x, y = digits
    net = digit_net(x, y)
    net = gq.convert(net, bits=bits, method='fqn') if way == 'blocks' else gq.attach(net, bits=bits, method='fqn')
    gq.fold(net, mode)
    gq.calibrate(net, [x])
    before = state(net)['1.running_mean']
    net.hybridize(**STATIC)
    found = learn(net, x, y, 10, 0.02)
    assert np.array_equal(state(net)['1.running_mean'], before) == (mode == 'frozen')
    # One batch over and over: with a small rate the loss falls from its beginning to its end.
    assert found[-1] < 0.8 * found[0] and np.mean(found[5:]) < np.mean(found[:5])


@both_ways
def test_fqn_on_digits_survives_being_merged(way, digits):
    x, y = digits
    net = digit_net(x, y)
    net = gq.convert(net, bits=8, method='fqn') if way == 'blocks' else gq.attach(net, bits=8, method='fqn')
    gq.fold(net, 'frozen')
    gq.calibrate(net, [x])
    learn(net, x, y, 5, 0.02)
    expected = net(x)
    gq.fold(net, 'merge')
    assert_near_on_a_grid(net(x).asnumpy(), expected.asnumpy(), share=0.05)
    assert (net(x).argmax(1) == expected.argmax(1)).mean().asscalar() > 0.99


# ---------------------------------------------------------------- the zoos

def foldable(symbol):
    """How many BatchNorms of a symbol alone read a layer, counted in its JSON; and how many there are."""
    nodes = json.loads(symbol.tojson())
    heads, nodes = nodes['heads'], nodes['nodes']
    readers = [number for node in nodes for number, *_ in node['inputs']] + [number for number, *_ in heads]
    norms = [node for node in nodes if node['op'] == 'BatchNorm']
    return sum(nodes[norm['inputs'][0][0]]['op'] in LAYERS and readers.count(norm['inputs'][0][0]) == 1
               for norm in norms), len(norms)


@pytest.fixture
def quick(monkeypatch):
    # Searching a graph for common subexpressions takes time quadratic in its size: minutes for the deepest nets.
    monkeypatch.setenv('MXNET_ELIMINATE_COMMON_EXPR', '0')
    yield
    gc.collect()


def has_batchnorm(entry):
    return not any(part in entry.name for part in ('alexnet', 'squeezenet')) and \
        entry.name not in ('vgg11', 'vgg13', 'vgg16', 'vgg19')


WITH_NORM = [pytest.param(entry, id=entry_id(entry), marks=[] if entry.fast else pytest.mark.slow)
             for entry in ZOO if has_batchnorm(entry)]


def rounding_error(entry, net, x, expected, path):
    """How far the float32 net itself is from the same net in float64, in units of the largest output."""
    net.save_parameters(path)
    wide = build_zoo(entry)
    wide.load_parameters(path)
    wide.cast('float64')
    exact = run(wide, x.astype('float64'))
    return max(abs(out - true).max() / abs(true).max() for out, true in zip(expected, exact))


@pytest.mark.parametrize('entry', WITH_NORM)
def test_zoo_nets_are_merged_as_blocks_and_as_graphs(entry, quick, tmp_path):
    """To 1e-5 of the largest output; where the float32 net is not as exact itself, to some of its rounding error."""
    trains = entry.train or os.environ.get('MXNET_MKLDNN_ENABLED') == '0'    # see zoo.py
    if not trains:
        pytest.skip('statistics come from a training step, which this net cannot make: see zoo.py')
    x = nd.array(np.random.default_rng(1).uniform(-1, 1, (8, 3, entry.size, entry.size)))
    net, x = shaken(build_zoo(entry), x), x[:2]
    expected = run(net, x)
    count, total = foldable(mx.sym.Group(outputs(net(mx.sym.var('data')))))
    assert 0 < count <= total

    graph = gq.fold(as_graph(net))
    assert remaining(graph) == total - count
    merged = run(graph, x)
    difference = max(abs(out - float_out).max() / abs(float_out).max() for out, float_out in zip(merged, expected))
    tolerance = FLOAT
    if difference > FLOAT:
        tolerance = 4 * rounding_error(entry, net, x, expected, str(tmp_path / 'net.params'))
    assert difference <= tolerance
    for out, float_out in zip(run(net, x), expected):
        np.testing.assert_array_equal(out, float_out)       # the graph has taken Parameters of its own

    gq.fold(net)
    assert sum(isinstance(block, FoldedBatchNorm) for _, block in named_blocks(net)) == count
    for out, float_out in zip(run(net, x), expected):
        assert_near(out, float_out, tolerance)


@pytest.mark.parametrize('name, keeps', [('resnet18_v1', 0), ('resnet18_v2', 10), ('densenet121', 62)])
def test_what_stays_in_nets_that_normalize_before_they_convolve(name, keeps):
    """Pre-activation nets normalize sums and concatenations, which have no weights."""
    net = as_graph(gluon.model_zoo.vision.get_model(name, classes=10))
    told = net.fold_batchnorm()
    assert sum(sentence.startswith('stays') for sentence in told.values()) == keeps


def test_a_graph_of_a_graph_is_a_graph(path):
    """Folding goes through `Graph.dump`, as copies and files do."""
    net = gq.fold(quantized('graph'), 'frozen')
    again = Graph.read(net.graph.dump())
    assert [node.op for node in again.nodes()] == [node.op for node in net.graph.nodes()]
