"""The fused operators called by name, the plain operators they stand for, and quantizers to call both with."""
import itertools
from contextlib import contextmanager

import numpy as np
import pytest
from mxnet import autograd, gluon, nd

from gluonquant import ops, quantizers

COMPILED = ops.TIERS[1:]
STATIC = {'static_alloc': True, 'static_shape': True}
WAYS = {'imperative': None, 'hybridized': {}, 'static': STATIC}
SIZES = (1, 7, 8, 15, 16, 17, 63, 8191, 8192, 8193, 40000)      # tails of vectors, edges of blocks, several threads

# name: (method, bits, options, values of Parameters)
ACTIVATIONS = {
    'pact': ('pact', 4, {'signed': False}, {'alpha': 0.9, 'initialized': 1}),
    'pact signed': ('pact', 3, {'signed': True}, {'alpha': 0.9, 'initialized': 1}),
    'int8': ('int8', 8, {}, {'amax': 1.1}),
    'int8 first batch': ('int8', 4, {}, {}),
    'int8 clip': ('int8', 4, {'grad_mode': 'clip'}, {'amax': 1.1}),
    'int8 unsigned': ('int8', 4, {'signed': False}, {'amax': 1.1}),
    'int8 unsigned clip': ('int8', 4, {'signed': False, 'grad_mode': 'clip'}, {'amax': 1.1}),
    'int8 delayed': ('int8', 4, {'delay_quant': 1}, {'amax': 1.1}),
    'affine': ('affine', 4, {}, {'lo': -0.7, 'hi': 1.3, 'initialized': 1}),
    'affine first batch': ('affine', 8, {'grad_mode': 'ste'}, {}),
    'percentile': ('affine', 4, {'percentile': 99.9, 'ema_decay': 0.5}, {'lo': -0.7, 'hi': 1.3, 'initialized': 1}),
    'lsq': ('lsq', 4, {'signed': False}, {'scale': 0.11, 'initialized': 1}),
    'lsq signed': ('lsq', 3, {'signed': True}, {'scale': 0.11, 'initialized': 1}),
    'lsqplus': ('lsqplus', 4, {}, {'scale': 0.13, 'offset': -0.37, 'initialized': 1}),
    'lsqplus nudged': ('lsqplus', 4, {'nudge_offset': True}, {'scale': 0.13, 'offset': -0.37, 'initialized': 1}),
    'qil': ('qil', 4, {}, {'center': 0.7, 'distance': 0.45, 'initialized': 1}),
    'qil as published': ('qil', 3, {'rescale': False}, {'center': 0.7, 'distance': 0.45, 'initialized': 1}),
    'gdrq': ('gdrq', 4, {'lam': 0.3}, {'threshold': 0.9}),
    'gdrq signed': ('gdrq', 4, {'signed': True, 'lam': 0.3, 'grad_mode': 'ste'}, {'threshold': 0.9}),
    'gdrq reshaping': ('gdrq', 4, {'signed': True, 'do_quant': False}, {'threshold': 0.9}),
    'dorefa': ('dorefa', 4, {}, {}),
    'cliprelu': ('cliprelu', 4, {'threshold': 1.1}, {}),
}
# Every kernel and every way of keeping what the backward pass needs.
FEW = ('pact signed', 'int8', 'int8 clip', 'affine', 'lsq', 'lsqplus', 'qil', 'gdrq')

WEIGHTS = {
    'int8': ('int8', 4, {}, {}),
    'affine': ('affine', 4, {}, {}),
    'lsq': ('lsq', 3, {}, {}),
    'lsqplus': ('lsqplus', 4, {}, {}),
    'sawb': ('sawb', 4, {}, {}),
    'sawb clip': ('sawb', 4, {'grad_mode': 'clip'}, {}),
    'sawb tread': ('sawb', 4, {'grid': 'tread', 'grad_mode': 'clip'}, {}),
    'dorefa': ('dorefa', 4, {}, {}),
    'dorefa one bit': ('dorefa', 1, {}, {}),
    'dorefa rescaled': ('dorefa', 3, {'rescale': 'max', 'detach_max': True}, {}),
    'qil': ('qil', 4, {}, {'center': 0.35, 'distance': 0.3}),
    'qil gamma': ('qil', 3, {'rescale': False, 'train_gamma': True}, {'center': 0.35, 'distance': 0.3, 'gamma': 1.3}),
    'gdrq': ('gdrq', 4, {'ktimes': 3.0}, {}),
    'gdrq clip': ('gdrq', 4, {'grad_mode': 'clip'}, {}),
    'gdrq groups': ('gdrq', 4, {'group_size': 2, 'grad_mode': 'clip'}, {}),
    'gdrq reshaping': ('gdrq', 4, {'group_size': 2, 'grad_mode': 'clip', 'do_quant': False}, {}),
}

# What `fuse` writes for a clamp, and the plain operator.
CLAMPS = {
    'nothing': ({}, lambda F, x: x * 1),
    'relu': ({'low': 0, 'high': 'inf', 'relu': 1}, lambda F, x: F.relu(x)),
    'relu6': ({'low': 0, 'high': 6}, lambda F, x: F.clip(x, 0, 6)),
    'clip': ({'low': -0.5, 'high': 1}, lambda F, x: F.clip(x, -0.5, 1)),
    'low': ({'low': -0.25}, lambda F, x: F.clip(x, -0.25, np.inf)),
    'high': ({'high': 0.75}, lambda F, x: F.clip(x, -np.inf, 0.75)),
    'positive': ({'low': 0.25, 'high': 1}, lambda F, x: F.clip(x, 0.25, 1)),
}
MERGED = list(itertools.product(CLAMPS, (False, True), (False, True)))      # clamp, add, keep


@contextmanager
def running(tier):
    """In this tier of operators; skips the test where it cannot run."""
    try:
        previous = ops.use(tier)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    try:
        yield
    finally:
        ops.use(previous)


def activation(name):
    """A new quantizer of activations with its range."""
    method, bits, options, values = ACTIVATIONS[name]
    q = quantizers.create(method, bits, 'activation', **options)
    q.initialize()
    q.write(**values)
    return q


class Fused(gluon.HybridBlock):
    """The operator of a quantizer of activations with what it has taken in; inputs a, and b to be added to it."""

    def __init__(self, q, clamp='nothing', keep=False):
        super().__init__()
        self._quantizer = lambda: q         # no child, but its Parameters are ours
        self._keep = keep
        self._merged = {**CLAMPS[clamp][0], **({'keep': 1} if keep else {})}
        for name, parameter in q._reg_params.items():
            setattr(self, name, parameter)
        self.params.update(q.params)

    def hybrid_forward(self, F, a, b=None, **params):
        q = self._quantizer()
        tensors = q.operands(F, a, params.pop('mode'), params)
        names, values = list(tensors), list(tensors.values())
        while len(names) < 4:
            names.append('mode')
            values.append(tensors['mode'])
        if b is not None:
            names.append('other')
            values.append(b if ops.in_layout() else F.identity(b))
        options = {'signed': q.grid.signed, 'gate': q.grad_mode == 'clip', **q.fused_options()}
        options = {name: int(value) if isinstance(value, bool) else value for name, value in options.items()}
        out = getattr(F._internal, ops.name('activation'))(
            *values, inputs=','.join(names), method=q.fused, qmin=q.grid.qmin, qmax=q.grid.qmax, **options,
            **self._merged)
        out = [out] if isinstance(out, nd.NDArray) else list(out)
        return [out[0], out[-1]] if self._keep else out[0]


class Plain(gluon.HybridBlock):
    """The same, composed of MXNet's own operators in the pure tier."""

    def __init__(self, q, clamp='nothing', keep=False):
        super().__init__()
        self.quantizer = q
        self._clamp, self._keep = CLAMPS[clamp][1], keep

    def hybrid_forward(self, F, a, b=None):
        x = self._clamp(F, a if b is None else a + b)
        y = self.quantizer(x)
        return [y, x] if self._keep else y


def made(tier, name, way='imperative', clamp='nothing', keep=False, around=None):
    """(block, its quantizer); ``around`` puts the operator into another block."""
    q = activation(name)
    block = (Plain if tier == 'pure' else Fused)(q, clamp, keep)
    if around is not None:
        block = around(block)
    if WAYS[way] is not None:
        block.hybridize(**WAYS[way])
    return block, q


def learned(block, q=None):
    """The trainable Parameters of a block, and those of its quantizer, by short name."""
    owners = [block] if q is None else [block, q]
    return {name: parameter for owner in owners for name, parameter in owner._reg_params.items()
            if parameter.grad_req != 'null'}


def passed(block, q, inputs, heads, training=True):
    """Outputs, gradients and state of one pass: {name: array}."""
    inputs = [nd.array(x) for x in inputs]
    for x in inputs:
        x.attach_grad()
    with autograd.record(train_mode=training):
        out = block(*inputs)
    out = out if isinstance(out, (list, tuple)) else [out]
    autograd.backward(list(out), [nd.array(g) for g in heads[:len(out)]], train_mode=training)
    return {**{f'output {i}': y.asnumpy() for i, y in enumerate(out)},
            **{f'gradient of input {i}': x.grad.asnumpy() for i, x in enumerate(inputs)},
            **{f'gradient of {name}': p.grad().asnumpy() for name, p in learned(block, q).items()},
            **{f'state {name}': q.value(name) for name in q._reg_params if name not in learned(q)}}


def assert_same(actual, expected, heads, what=''):
    """Outputs and state equal to the last bit, gradients to the rounding of float32."""
    assert actual.keys() == expected.keys()
    # A Parameter's gradient is a sum over all elements, in the pure tier in float32; terms are up to about |g|.
    total = 0.2 * np.abs(heads[0]).sum()
    # An element's is a few products and sums of numbers up to |g|.
    largest = max(np.abs(g).max() for g in heads)
    for name, value in expected.items():
        message = f'{name} {what}'
        if not name.startswith('gradient'):
            np.testing.assert_array_equal(actual[name], value, err_msg=message)
        else:
            bound = 1e-6 * (total if value.shape == (1,) and 'input' not in name else largest)
            np.testing.assert_allclose(actual[name], value, rtol=1e-6, atol=bound, err_msg=message)


def eighths(rng, shape, reach=2):
    """Multiples of 1/8: sums and means of them, which ranges are made of, are exact in any order and precision."""
    return (rng.integers(-8 * reach, 8 * reach + 1, shape) / 8).astype(np.float32)


def integers(rng, shape):
    """Head gradients whose sums are exact."""
    return rng.integers(-4, 5, shape).astype(np.float32)


def battery():
    """Results of every method on tensors of awkward sizes, by name."""
    results = {}

    def add(what, parts):
        results.update({f'{part} of {what}': value for part, value in parts.items()})

    with running('portable'):
        for name, size in itertools.product(ACTIVATIONS, (1, 7, 15, 17, 8193, 40000)):
            rng = np.random.default_rng(size)
            inputs, heads = [eighths(rng, size), eighths(rng, size)], [integers(rng, size) for _ in range(2)]
            add(f'{name} {size}', passed(*made('portable', name, clamp='relu6', keep=True), inputs, heads))
        for name in WEIGHTS:
            add(f'weights {name}', weight_passed(name, (18, 73, 5, 5)))
    return results


def weight(name, shape, per_channel=None, axis=0):
    """A new quantizer of weights."""
    method, bits, options, values = WEIGHTS[name]
    q = quantizers.create(method, bits, 'weight', per_channel=per_channel, axis=axis, shape=shape, **options)
    q.initialize()
    q.init_from(weight_values(shape))
    q.write(**values)
    return q


def weight_values(shape):
    """Gaussian, with a zero and a largest element."""
    values = np.random.default_rng(len(shape)).normal(0, 0.3, shape).astype(np.float32)
    values.reshape(-1)[[0, -1]] = 0, 1.4
    return nd.array(values)


def weight_passed(name, shape, way='imperative', frozen=False, **granularity):
    """`passed` for a quantizer of weights; frozen ones have held the scale of a weight half the size."""
    q = weight(name, shape, **granularity)
    if frozen:
        q.freeze(weight_values(shape) / 2)
    if WAYS[way] is not None:
        q.hybridize(**WAYS[way])
    return passed(q, q, [weight_values(shape).asnumpy()], [integers(np.random.default_rng(5), shape)])
