"""The fused operators by name: every method, merge, layout, size and instruction set, beside the plain operators."""
import itertools
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, nd
from operator_cases import (
    ACTIVATIONS,
    COMPILED,
    FEW,
    MERGED,
    SIZES,
    WAYS,
    WEIGHTS,
    Fused,
    activation,
    assert_same,
    battery,
    eighths,
    integers,
    learned,
    made,
    passed,
    running,
    weight_passed,
)

from gluonquant import ops

pytestmark = pytest.mark.native

# MXNet's search for common subexpressions merges two reads of a Parameter around a write to it.
no_merging = pytest.mark.usefixtures('separate')


@pytest.fixture(params=COMPILED)
def tier(request):
    """Runs on the operators of this tier."""
    with running(request.param):
        yield request.param


@pytest.fixture
def separate(monkeypatch):
    monkeypatch.setenv('MXNET_ELIMINATE_COMMON_EXPR', '0')


def tensors(shape, seed=0):
    """Two inputs and two head gradients."""
    rng = np.random.default_rng(seed)
    return [eighths(rng, shape), eighths(rng, shape) / 2], [integers(rng, shape) for _ in range(2)]


# ---------------------------------------------------------------- activations


@lru_cache(maxsize=None)
def plain(name, clamp, add, keep, shape, training=True):
    with running('pure'):
        inputs, heads = tensors(shape)
        block, q = made('pure', name, clamp=clamp, keep=keep)
        return passed(block, q, inputs[:1 + add], heads, training)


def assert_as_plain(tier, name, way, clamp, add, keep, shape=(2, 3, 4, 4), training=True):
    inputs, heads = tensors(shape)
    block, q = made(tier, name, way, clamp, keep)
    assert_same(passed(block, q, inputs[:1 + add], heads, training), plain(name, clamp, add, keep, shape, training),
                heads, f'{clamp} add={add} keep={keep} {shape}')


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_whatever_an_operator_takes_in_it_computes_the_same(tier, name):
    for clamp, add, keep in MERGED:
        if clamp in ('nothing', 'relu', 'relu6'):
            assert_as_plain(tier, name, 'imperative', clamp, add, keep)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_in_a_graph_an_operator_computes_the_same(tier, name):
    for clamp, add, keep in [('nothing', False, False), ('clip', False, True), ('relu', True, True)]:
        assert_as_plain(tier, name, 'static', clamp, add, keep)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*not calibrated')
@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.parametrize('way', WAYS)
def test_whatever_an_operator_takes_in_it_computes_the_same_in_inference_too(tier, name, way):
    for (clamp, add, keep), training in itertools.product(MERGED, (True, False)):
        assert_as_plain(tier, name, way, clamp, add, keep, training=training)


@pytest.mark.parametrize('name', [*FEW, 'pact', 'percentile', 'gdrq reshaping', 'dorefa'])
@pytest.mark.parametrize('size', SIZES)
def test_tails_of_vectors_and_edges_of_blocks_are_computed(tier, name, size):
    assert_as_plain(tier, name, 'imperative', 'relu6', True, True, shape=(size,))


def test_the_function_that_blocks_call_returns_the_quantized_tensor_whatever_is_kept(tier):
    x = nd.array([-1, 0.26, 3])
    out = ops.fake_quantize(nd, ops.name('activation'), {'data': x, 'mode': nd.array([2])}, method='dorefa', qmin=0,
                            qmax=2, gate=True, keep=True)
    np.testing.assert_array_equal(out.asnumpy(), [0, 0.5, 1])


@pytest.mark.parametrize('wrong, message', [
    ({'method': 'magic'}, "unknown method 'magic'"), ({'inputs': 'data,mode,speed'}, "unknown input 'speed'"),
    ({'inputs': 'mode,data'}, "the first input must be 'data'"),
    ({'inputs': 'data,other,mode'}, "'other' must be the last input")])
def test_an_attribute_that_makes_no_sense_is_an_error_and_not_a_crash(tier, wrong, message):
    attrs = {'method': 'dorefa', 'inputs': 'data,mode', 'qmax': 3, **wrong}
    inputs = [nd.ones((1,)) for _ in attrs['inputs'].split(',')]
    with pytest.raises(mx.MXNetError, match=message):
        getattr(nd._internal, ops.name('activation'))(*inputs, **attrs).wait_to_read()


def test_other_types_than_float32_are_an_error_that_says_what_to_do(tier):
    q = activation('dorefa')
    with pytest.raises(mx.MXNetError, match='fused operators take float32, not MXNet type 1; cast the quantizer'):
        Fused(q)(nd.ones((2,), dtype='float64')).wait_to_read()


# ---------------------------------------------------------------- broken and extreme numbers

EXTREME = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 1e10, 2.0 ** 24, 2.0 ** 23 + 1, 1e-42, -1e-42, -0.0, 0.0, 6.0,
                    6.0000005, 0.9, -0.9, 1.1, 1.3, -0.7, 1.0, 0.25, 0.75, 0.5, -0.5], np.float32)
FINITE = np.isfinite(EXTREME)
# GDRQ's mean of these overflows in float32, and float64 has it.
FOLLOWS_MEAN = {'gdrq', 'gdrq signed', 'gdrq reshaping'}


def both(tier, name, clamp, keep, x, heads, training=True):
    """What the plain operators and the fused one make of x."""
    for where in ('pure', tier):
        with running(where):
            block, q = made(where, name, clamp=clamp, keep=keep)
            yield passed(block, q, [x], heads, training)


@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.filterwarnings('ignore:.*not calibrated')
def test_nan_and_infinity_come_out_where_the_plain_operators_have_them_and_leave_the_range_alone(tier, name):
    for clamp, keep in [('nothing', False), ('relu6', True), ('positive', False)]:
        expected, actual = both(tier, name, clamp, keep, EXTREME, [np.ones_like(EXTREME)] * 2)
        for part in expected:
            if not part.startswith('gradient'):
                np.testing.assert_array_equal(actual[part], expected[part], err_msg=f'{part} {clamp}')
        assert clamp != 'nothing' or np.isnan(actual['output 0'][~FINITE]).all()


@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.filterwarnings('ignore:.*not calibrated')
def test_extreme_finite_numbers_get_the_codes_and_gradients_of_the_plain_operators(tier, name):
    x, g = EXTREME[FINITE], integers(np.random.default_rng(3), FINITE.sum())
    for clamp in ('nothing', 'relu6', 'high'):
        expected, actual = both(tier, name, clamp, False, x, [g], training=name not in FOLLOWS_MEAN)
        assert_same(actual, expected, [g], clamp)


# ---------------------------------------------------------------- oneDNN's layouts

# Producers, and the groups of their convolution. oneDNN 2.4 writes blocks of 16 and of 8 channels, of 4 (groups), the
# default layout (other widths), and in inference channels last. Weights and data are multiples of 1/4: what the
# operator reads is exact in any order of summation.
LAYOUTS = {'convolution': lambda channels: 1, 'groups': lambda channels: 2, 'depthwise': lambda channels: channels,
           'pooling': lambda channels: 1, 'default': None}


def quarters(shape):
    return np.random.default_rng(shape[0]).choice([-0.25, 0, 0.25], shape, p=[0.1, 0.8, 0.1])


class Around(gluon.HybridBlock):
    """The operator between producers of one or two layouts and a convolution; the kept tensor is a second output."""

    def __init__(self, operator, channels, producers):
        super().__init__()
        self.operator, self._channels, self._producers = operator, channels, producers
        for place, name in [*enumerate(producers), ('behind', 'convolution')]:
            if LAYOUTS[name] is not None:
                values = nd.array(quarters((channels, channels // LAYOUTS[name](channels), 3, 3)))
                weight = self.params.get(f'weight{place}', shape=values.shape, init=mx.init.Constant(values))
                weight.initialize()
                setattr(self, f'weight{place}', weight)

    def hybrid_forward(self, F, *inputs, **weights):
        parts = [self.produce(F, x, name, weights.get(f'weight{place}'))
                 for place, (x, name) in enumerate(zip(inputs, self._producers))]
        out = self.operator(*parts)
        y, *kept = out if isinstance(out, (list, tuple)) else [out]
        return [self.produce(F, y, 'convolution', weights['weightbehind']), *(x * 1 for x in kept)]

    def produce(self, F, x, name, weight):
        if weight is None:
            return x * 1
        x = F.Convolution(x, weight, num_filter=self._channels, kernel=(3, 3), pad=(1, 1), no_bias=True,
                          num_group=LAYOUTS[name](self._channels))
        return F.Pooling(x, kernel=(3, 3), pad=(1, 1), pool_type='max') if name == 'pooling' else x


def around(tier, name, way, channels, producers, keep, training=True):
    shape = (2, channels, 5, 4)
    rng = np.random.default_rng(channels)
    inputs, heads = [eighths(rng, shape, 1) * 2 for _ in producers], [integers(rng, shape) / 2 for _ in range(2)]
    with running(tier):
        block, q = made(tier, name, way, 'relu', keep, lambda operator: Around(operator, channels, producers))
        return passed(block, q, inputs, heads, training), heads


@lru_cache(maxsize=None)
def plain_around(*case):
    with running('pure'):
        return around('pure', case[0], 'imperative', *case[1:])


def assert_same_around(tier, way, *case):
    (expected, heads), (actual, _) = plain_around(*case), around(tier, case[0], way, *case[1:])
    assert actual.keys() == expected.keys()
    for part, value in expected.items():
        if part.startswith('state') or part == 'output 1':
            np.testing.assert_array_equal(actual[part], value, err_msg=f'{part} {case}')
        else:       # sums: the convolution behind and its gradients over 9 * channels, others over all elements
            bound = 2e-7 * np.abs(heads[0]).sum() if value.shape == (1,) else 1e-6 * np.abs(value).max()
            np.testing.assert_allclose(actual[part], value, rtol=0, atol=bound, err_msg=f'{part} {case}')


@pytest.mark.parametrize('name', FEW)
@pytest.mark.parametrize('channels', [3, 16, 20, 24])
def test_between_convolutions_an_operator_computes_the_same(tier, name, channels):
    for producers in [('convolution',), ('convolution', 'convolution'), ('default', 'convolution')]:
        assert_same_around(tier, 'static', name, channels, producers, len(producers) == 2)


@pytest.mark.parametrize('first', LAYOUTS)
@pytest.mark.parametrize('second', LAYOUTS)
def test_summands_in_different_layouts_are_added_element_by_element(first, second):
    for channels, name in itertools.product((16, 24), ('pact signed', 'lsq')):
        assert_same_around('layout', 'static', name, channels, (first, second), True)


@pytest.mark.slow
@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.parametrize('channels', [16, 20, 24])
def test_every_method_in_every_layout_computes_the_same(tier, name, channels):
    for first, second, keep, way in itertools.product(LAYOUTS, LAYOUTS, (False, True), WAYS):
        assert_same_around(tier, way, name, channels, (first, second), keep)
        assert_same_around(tier, way, name, channels, (first,), keep)


@pytest.mark.parametrize('name', [*FEW, 'percentile', 'dorefa'])
def test_inference_between_convolutions_computes_the_same(tier, name):
    for channels, way in itertools.product((16, 24), WAYS):
        assert_same_around(tier, way, name, channels, ('convolution', 'groups'), True, False)


# ---------------------------------------------------------------- gradients that are added, or not wanted


class Inside(gluon.HybridBlock):
    """The operator behind other operators: hybridized, MXNet 1.9.1 adds to the wrong gradients of two summed inputs."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def hybrid_forward(self, F, *inputs):
        return self.operator(*(x * 1 for x in inputs))


def twice(tier, name, way, requests, keep=True, around=Inside):
    """Gradients of inputs and Parameters that start at 1, after two backward passes."""
    with running(tier):
        block, q = made(tier, name, way, 'relu', keep, around)
        *wanted, parameters = requests
        arrays, heads = tensors((2, 3, 4, 4))
        inputs = [nd.array(x) for x in arrays[:len(wanted)]]
        for x, request in zip(inputs, wanted):
            x.attach_grad(request)
        for parameter in learned(q).values():
            parameter.grad_req = parameters
        grads = {str(place): x.grad for place, x in enumerate(inputs) if x.grad is not None}
        grads.update({p: parameter.grad() for p, parameter in learned(q).items()})
        for grad in grads.values():
            grad[:] = 1
        for _ in range(2):
            with autograd.record():
                out = block(*inputs)
            autograd.backward(out if keep else [out], [nd.array(g) for g in heads[:1 + keep]])
        return {key: grad.asnumpy() for key, grad in grads.items()}


def requests(name, inputs):
    """What may be asked of the inputs and the Parameters, as far as there are any."""
    own = ('write', 'add', 'null') if name in ('pact signed', 'lsq', 'lsqplus', 'qil') else ('write',)
    for asked in itertools.product(('write', 'add', 'null'), repeat=inputs):
        yield from ((*asked, parameters) for parameters in own if {*asked, parameters} != {'null'} and
                    (own != ('write',) or set(asked) != {'null'}))


plain_twice = lru_cache(maxsize=None)(lambda *case: twice('pure', case[0], 'imperative', *case[1:]))


def assert_gradients_as_plain(tier, name, way, asked, keep, around):
    expected, actual = plain_twice(name, asked, keep, around), twice(tier, name, way, asked, keep, around)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():     # a Parameter's is the sum of 96 products in float32
        np.testing.assert_allclose(actual[key], value, rtol=1e-5, atol=1e-5, err_msg=f'{key} {asked}')


@pytest.mark.parametrize('name', ['pact signed', 'int8', 'lsq', 'gdrq'])
@pytest.mark.parametrize('way', ['imperative', 'static'])
def test_gradients_of_a_sum_are_written_added_or_left_out_as_asked(tier, name, way):
    for asked in requests(name, 2):
        assert_gradients_as_plain(tier, name, way, asked, True, Inside)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_gradients_of_what_an_operator_reads_directly_are_written_or_added_as_asked(tier, name):
    for way, keep in itertools.product(('imperative', 'static'), (False, True)):
        for asked in [('add', 'write'), ('write', 'add')]:
            assert_gradients_as_plain(tier, name, way, asked, keep, None)


def test_two_backward_passes_double_the_gradient(tier):
    for name in ('pact signed', 'int8', 'lsq', 'lsqplus', 'qil'):      # whose range does not move in between
        with running(tier):
            once, doubled = (twice(tier, name, 'static', (req,) * 3)['0'] for req in ('write', 'add'))
            np.testing.assert_allclose(doubled, 1 + 2 * once, rtol=1e-6, err_msg=name)     # one float32 addition


# ---------------------------------------------------------------- who reads what


class Use(gluon.HybridBlock):
    """Something made of the quantized and the kept tensor."""

    def __init__(self, use, operator):
        super().__init__()
        self.operator, self._use = operator, USES[use]

    def hybrid_forward(self, F, a):
        return self._use(F, self.operator, a)


USES = {
    'only the quantized tensor': lambda F, q, a: q(a * 2, a)[0],
    'only the kept tensor has a gradient': lambda F, q, a: (lambda y, x: F.BlockGrad(y) + x * 3)(*q(a * 2, a)),
    'only the quantized tensor has a gradient': lambda F, q, a: (lambda y, x: F.BlockGrad(x) + y * 3)(*q(a * 2, a)),
    'both, several times': lambda F, q, a: (lambda y, x: y * x + F.tanh(x) + y)(*q(a * 2, a)),
    'a tensor is added to itself': lambda F, q, a: (lambda y, x: y + x * 2)(*q(a, a)),
    'an operator twice': lambda F, q, a: q(a * 2, a)[0] - q(F.flip(a, axis=3), a)[0] * 3,
    'an operator on its own output': lambda F, q, a: q(*q(a * 2, a))[0],
}


@pytest.mark.parametrize('use', USES)
@pytest.mark.parametrize('way', WAYS)
@no_merging
def test_outputs_may_be_read_in_any_way(tier, use, way):
    for name in ('pact signed', 'int8 clip', 'lsq', 'gdrq'):
        assert_same(used(tier, name, way, use), plain_used(name, use), tensors((2, 3, 4, 4))[1], name)


def used(tier, name, way, use):
    (x, _), heads = tensors((2, 3, 4, 4))
    with running(tier):
        block, q = made(tier, name, way, 'relu', True, lambda operator: Use(use, operator))
        return passed(block, q, [x], heads[:1])


# Hybridized: MXNet 1.9.1 crashes on BlockGrad of a reshaped product, which is how plain gradients are made.
plain_used = lru_cache(maxsize=None)(lambda name, use: used('pure', name, 'hybridized', use))


def test_two_forward_passes_before_one_backward_pass(tier):
    arrays, (g, _) = tensors((2, 3, 4, 4))
    for name, way in itertools.product(FEW, ('imperative', 'hybridized')):     # static memory holds one pass
        results = []
        for where, how in [('pure', 'imperative'), (tier, way)]:
            with running(where):
                block, q = made(where, name, how, 'relu')
                inputs = [nd.array(x) for x in arrays]
                for x in inputs:
                    x.attach_grad()
                with autograd.record():
                    first, second = (block(x) for x in inputs)
                    out = first - 2 * second
                out.backward(nd.array(g))
                results.append([out, *(x.grad for x in inputs), *(p.grad() for p in learned(q).values())])
        for actual, expected in zip(*reversed(results)):    # a sum of 192 products in float32 at most
            np.testing.assert_allclose(actual.asnumpy(), expected.asnumpy(), rtol=1e-5, atol=1e-5, err_msg=name)


# ---------------------------------------------------------------- weights

SHAPES = [(4, 3), (6, 5, 3, 3), (2, 7, 1, 1), (6, 17, 2), (2, 9001)]
GRANULARITIES = [{'per_channel': False}, {'per_channel': True}, {'per_channel': True, 'axis': 1}]


def weight_cases():
    for name in WEIGHTS:
        if 'group_size' in WEIGHTS[name][2]:
            yield name, {}
        else:
            yield from ((name, granularity) for granularity in GRANULARITIES
                        if not (name[:3] in ('dor', 'qil') and granularity['per_channel']))


@pytest.mark.parametrize('name, granularity', weight_cases())
def test_weights_of_every_shape_and_granularity_are_computed_the_same(tier, name, granularity):
    for shape in SHAPES:
        assert_weights_as_plain(tier, name, shape, 'imperative', False, granularity)
    for shape in SHAPES[:2]:
        assert_weights_as_plain(tier, name, shape, 'static', False, granularity)


@pytest.mark.parametrize('name, granularity', weight_cases())
def test_frozen_weights_keep_the_scale_they_have_held(tier, name, granularity):
    for way in ('imperative', 'static'):
        assert_weights_as_plain(tier, name, (6, 5, 3, 3), way, True, granularity)


@lru_cache(maxsize=None)
def plain_weight(name, shape, frozen, granularity):
    with running('pure'):
        return weight_passed(name, shape, 'imperative', frozen, **dict(granularity))


def assert_weights_as_plain(tier, name, shape, way, frozen, granularity):
    expected = plain_weight(name, shape, frozen, tuple(granularity.items()))
    actual = weight_passed(name, shape, way, frozen, **granularity)
    assert actual.keys() == expected.keys()
    for part, value in expected.items():
        if part.startswith('output'):
            np.testing.assert_array_equal(actual[part], value, err_msg=f'{part} {shape}')
        else:       # gradients of Parameters are sums of up to 18,000 products; DoReFa's is computed in float64
            bound = 1e-6 * np.abs(value).max() if 'input' in part else 1e-7 * 4 * np.prod(shape)
            np.testing.assert_allclose(actual[part], value, rtol=2e-6, atol=bound, err_msg=f'{part} {shape}')


# ---------------------------------------------------------------- processors and threads

BATTERY = f"""
import ctypes, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from operator_cases import battery
from gluonquant import ops
np.savez(sys.argv[1], **battery())
library = ctypes.CDLL(ops.backend().path)
library.gluonquant_isa.restype = ctypes.c_char_p
print(library.gluonquant_isa().decode())"""


@pytest.fixture(scope='module')
def here():
    """The battery's results in this process, on the best instruction set."""
    with running('portable'):
        return battery()


def elsewhere(folder, isa, threads):
    """The battery's results on that instruction set with so many threads."""
    done = subprocess.run([sys.executable, '-c', BATTERY, str(folder / 'results.npz')], capture_output=True, text=True,
                          timeout=300, env={**os.environ, 'GLUONQUANT_OPS': 'portable', 'GLUONQUANT_ISA': isa,
                                            'OMP_NUM_THREADS': threads})
    assert done.returncode == 0, done.stderr
    if done.stdout.split()[-1] != isa:
        pytest.skip(f'this processor has no {isa}')
    return dict(np.load(folder / 'results.npz'))


@pytest.mark.parametrize('isa', ['baseline', pytest.param('avx2', marks=pytest.mark.slow)])
def test_every_instruction_set_computes_the_same(here, isa, tmp_path):
    for name, value in elsewhere(tmp_path, isa, '1').items():
        if name.startswith('gradient') and 'input' not in name:     # sums of up to 40,000 products up to 4, in lanes
            np.testing.assert_allclose(value, here[name], rtol=1e-5, atol=1e-3, err_msg=name)
        else:
            np.testing.assert_array_equal(value, here[name], err_msg=name)


def test_results_do_not_depend_on_the_number_of_threads(here, tmp_path):
    threads = '2' if os.environ.get('OMP_NUM_THREADS') == '1' else '1'      # others than here
    for name, value in elsewhere(tmp_path, 'avx512', threads).items():
        np.testing.assert_array_equal(value, here[name], err_msg=name)
