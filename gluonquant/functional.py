"""The arithmetic all quantizers share, written once for ``F = mxnet.ndarray`` and ``F = mxnet.symbol``.

Tensors arrive here as *rows*: a matrix ``(R, K)`` whose rows each have their own scale ``(R, 1)``
(one row for a whole tensor, one per output channel, one per group of channels).

Gradients are built from exact zeros. ``zero_with_gradient(x)`` is 0 for every finite x, with the gradient of x,
so ``value + mask * zero_with_gradient(x)`` equals ``value`` to the last bit while the gradient is ``mask``. NaN and
Inf turn the zero into NaN: a broken activation is never hidden by a clip.
"""
import atexit
import os
import warnings

import mxnet as mx
from mxnet._ctypes.symbol import _symbol_creator

from .symbol_graph import operator

EPS = 1e-8                      # the smallest range that becomes a scale
BIG = 1e38                      # further out than any activation; still finite in float32
_ROUND = 1.5 * 2 ** 23          # float32 has unit spacing here, so adding it rounds half to even


def round_half_even(F, x):
    """R(x) for \\|x\\| < 2**22, ties to the even neighbour; the gradient is 1 (straight-through)."""
    return (x + _ROUND) - _ROUND


def limit(F, x, low, high):
    """x clipped to the numbers [low, high]; several times faster than ``F.clip``."""
    return F.minimum(F.maximum(x, low), high)


def zero_with_gradient(F, x):
    """0 with the gradient of x (NaN where x is not finite)."""
    return x - F.BlockGrad(x)


def floored(F, x, least):
    """max(x, least) that passes the whole gradient on, so that a parameter below its floor can recover."""
    return F.BlockGrad(F.maximum(x, least)) + zero_with_gradient(F, x)


def times(F, rows, factor):
    """rows (R, K) times factor (R, 1). A matrix product: its gradient, a sum over K, is a fast one."""
    product = F.batch_dot(F.expand_dims(rows, axis=2), F.expand_dims(factor, axis=2))
    return F.reshape(product, shape=(0, 0))


def row_mean(F, rows):
    """The mean of each row, (R, 1), added up in float64: scales made of it do not depend on the order."""
    return F.cast(F.mean(F.cast(rows, 'float64'), axis=1, keepdims=True), 'float32')


def inside(F, x, low, high):
    """1 where low <= x <= high (arrays that broadcast against x), else 0."""
    return F.broadcast_greater_equal(x, low) * F.broadcast_lesser_equal(x, high)


def choose(F, flag, yes, no):
    """``yes`` where the one-element ``flag`` is 1, ``no`` where it is 0; exact for finite values of any shape."""
    return F.broadcast_mul(yes, flag) + F.broadcast_mul(no, 1 - flag)


def is_finite(F, x):
    """1 where x is neither NaN nor infinite, else 0."""
    return F.abs(x) < 3.4e38


def is_training(F):
    """1 in training mode, 0 in inference, shape (1,), decided at run time even inside a hybridized graph.

    A cached graph serves both modes and has no input that tells which one runs. Dropout knows: with p = 1 it is
    0/0 in training and the identity otherwise.
    """
    ones = F.Dropout(F.ones((1,)), p=1.0)
    return F.broadcast_not_equal(ones, ones)


def assign(F, state, value):
    """Write ``value`` into the Parameter array ``state`` during the forward pass; returns the value written.

    No plain operator writes to an input, but the optimizers' do: SGD with momentum 0 and learning rate -1 sets its
    momentum to the gradient it is given. The result is blocked from gradients on both sides, because the operator
    has none.
    """
    arguments = [F.zeros_like(state), F.BlockGrad(value), state]
    if F is mx.nd:
        written = F.sgd_mom_update(*arguments, lr=-1.0, momentum=0.0, wd=0.0)
    else:
        # mx.sym.sgd_mom_update passes inputs by names that the operator does not declare; by position it works.
        written = _symbol_creator(operator('sgd_mom_update'), arguments, None, ['lr', 'momentum', 'wd'],
                                  [-1.0, 0.0, 0.0], None, False)
    return F.BlockGrad(written)


def computed_deconvolution(F, run, *tensors):
    """``run(*tensors)``, a deconvolution whose weight was computed; None among the tensors stays None.

    oneDNN's deconvolution of MXNet 1.9.1 fails in the backward pass of such a weight ("could not execute a primitive").
    In float64 MXNet takes its own; only the gradient goes that way, the value does not.
    """
    value = run(*(None if tensor is None else F.BlockGrad(tensor) for tensor in tensors))
    wide = run(*(None if tensor is None else F.cast(tensor, 'float64') for tensor in tensors))
    return value + zero_with_gradient(F, F.cast(wide, 'float32'))


def moving_average(F, old, batch, decay, learning, unset):
    """One step of an exponential moving average, shape (1,).

    Where ``learning`` is 0 or the batch is not finite the old value stays; where ``unset`` is 1 the batch replaces it.
    """
    blended = decay * old + (1 - decay) * batch
    return F.where(learning * is_finite(F, batch), F.where(unset, batch, blended), old)


def percentile(F, values, percent):
    """The percentile of a flat array, linear between order statistics, shape (1,); sorts, so it is slow."""
    ordered = F.sort(values, axis=0)
    place = (F.cast(F.size_array(values), 'float64') - 1) * (percent / 100)
    below = F.floor(place)
    weight = F.cast(place - below, 'float32')
    low, high = F.take(ordered, below), F.take(ordered, F.ceil(place))
    return low + weight * (high - low)


# MXNet can hang at exit while Python operators still run.
atexit.register(mx.nd.waitall)


class _GradientProp(mx.operator.CustomOpProp):
    """(data, helper) -> data; a subclass says by ``change`` what becomes of the gradient of data."""

    def __init__(self):
        super().__init__(need_top_grad=True)

    def list_arguments(self):
        return ['data', 'helper']

    def infer_shape(self, in_shape):
        return [in_shape[0], in_shape[0]], [in_shape[0]], []

    def create_operator(self, ctx, shapes, dtypes):
        return _GradientOperator(self.change)

    def change(self, gradient, helper):
        """The gradient of data, from that of the output."""
        raise NotImplementedError


class _GradientOperator(mx.operator.CustomOp):
    def __init__(self, change):
        super().__init__()
        self._change = change

    def forward(self, is_train, req, in_data, out_data, aux):
        self.assign(out_data[0], req[0], in_data[0])

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        self.assign(in_grad[0], req[0], self._change(out_grad[0], in_data[1]))
        self.assign(in_grad[1], req[1], mx.nd.zeros_like(in_data[1]))


@mx.operator.register('gluonquant_scale_gradient')
class _ScaleGradientProp(_GradientProp):
    """The gradient g becomes g * (1 + delta * sign(g) * error)."""

    def __init__(self, delta='0.2'):
        super().__init__()
        self._delta = float(delta)

    def change(self, gradient, error):
        return gradient * (1 + self._delta * mx.nd.sign(gradient) * error)


@mx.operator.register('gluonquant_quantize_gradient')
class _QuantizeGradientProp(_GradientProp):
    """The gradient is quantized to ``bits`` per sample, with uniform noise in [-1/2, 1/2] steps."""

    def __init__(self, bits='8'):
        super().__init__()
        self._steps = 2 ** int(bits) - 1

    def change(self, gradient, noise):
        reach = mx.nd.maximum(mx.nd.max(mx.nd.abs(gradient), axis=0, exclude=True, keepdims=True), 1e-30)
        unit = mx.nd.broadcast_div(gradient, 2 * reach) + 0.5 + noise / self._steps
        code = round_half_even(mx.nd, limit(mx.nd, unit, 0.0, 1.0) * self._steps)
        return mx.nd.broadcast_mul(code / self._steps - 0.5, 2 * reach)


def elementwise_gradient_scaling(F, x, error, delta):
    """EWGS (Lee et al., CVPR 2021): x, whose gradient g becomes g * (1 + delta * sign(g) * error).

    The only rule that is not linear in g, hence a Python operator; ``error`` is clip(v) - R(clip(v)) in code space.
    """
    return F.Custom(x, F.BlockGrad(error), op_type='gluonquant_scale_gradient', delta=delta)


def quantize_gradient(F, x, bits):
    """x, whose gradient is rounded stochastically to ``bits`` bits on the range of each sample (arXiv:1606.06160).

    For imperative training: between hybridized convolutions, MXNet 1.9.1 runs Python operators before their inputs are
    there, unless MXNET_ENGINE_TYPE=NaiveEngine.
    """
    if F is mx.sym and os.environ.get('MXNET_ENGINE_TYPE') != 'NaiveEngine':
        warnings.warn('hybridized, gradients may be quantized before they are computed, a fault of MXNet 1.9.1: train '
                      'imperatively, or set MXNET_ENGINE_TYPE=NaiveEngine before the import', stacklevel=2)
    noise = F.random.uniform_like(F.BlockGrad(x), low=-0.5, high=0.5)
    # A Python operator reads oneDNN's blocked arrays as if they were not; products are in the default layout.
    return F.Custom(x * 1, F.BlockGrad(noise), op_type='gluonquant_quantize_gradient', bits=bits) * 1
