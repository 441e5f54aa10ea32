"""Operators that compute new integers: layers, sums, products, means."""
import math

import numpy as np

from . import elementary
from .table import array_of, operator, real_of
from .values import F32, Clamped, Mean, Multiplied, Products, Quantized, Real, Shares, Sum
from .window import convolve, matmul, window_settings


@operator('Conv')
def conv(attrs, x, weight, bias=None):
    settings = window_settings(attrs, array_of(weight).ndim - 2)
    if isinstance(x, Quantized) and isinstance(weight, Quantized) and _integer_bias(bias):
        total = convolve(x.offsets(), weight.offsets(), **settings, group=attrs.get('group', 1))
        return _products(total, x, weight, bias)
    out = convolve(real_of(x), real_of(weight), **settings, group=attrs.get('group', 1))
    return Real(out if bias is None else out + real_of(bias).reshape((-1,) + (1,) * (out.ndim - 2)))


@operator('Gemm')
def gemm(attrs, x, weight, bias=None):
    first, second = bool(attrs.get('transA', 0)), bool(attrs.get('transB', 0))
    if isinstance(x, Quantized) and isinstance(weight, Quantized) and _integer_bias(bias):
        return _products(matmul(_turned(x.offsets(), first), _turned(weight.offsets(), second)), x, weight, bias)
    out = _turned(real_of(x), first) @ _turned(real_of(weight), second)
    return Real(out if bias is None else out + real_of(bias))


@operator('MatMul')
def matrix_product(attrs, x, weight):
    if isinstance(x, Quantized) and isinstance(weight, Quantized) and not np.ndim(weight.grid.scale):
        return Products(matmul(x.offsets(), weight.offsets()), F32(x.grid.scale) * F32(weight.grid.scale))
    return Real(real_of(x) @ real_of(weight))


@operator('Add')
def add(attrs, first, second):
    if _are_codes(first, second):
        return Sum(first, second)
    return Real(real_of(first) + real_of(second))


@operator('Mul')
def multiply(attrs, first, second):
    if _are_codes(first, second):
        return Multiplied(first, second)
    return Real(real_of(first) * real_of(second))


@operator('Softmax')
def softmax(attrs, x):
    axis = attrs.get('axis', -1)
    if _are_codes(x) and axis in (-1, x.array.ndim - 1):
        return Shares(x)
    return Real(elementary.softmax(x.real(), axis))


@operator('Relu')
def relu(attrs, x):
    return Clamped(x)


@operator('GlobalAveragePool')
def global_average(attrs, x):
    axes = tuple(range(2, array_of(x).ndim))
    if isinstance(x, Quantized):
        count = math.prod(x.array.shape[2:])
        return Mean(x.offsets().sum(axes, keepdims=True, dtype=np.int32), x.grid.scale, count)
    return Real(real_of(x).mean(axes, keepdims=True, dtype=F32))


def _are_codes(*values):
    """Whether all are 8-bit codes."""
    return all(isinstance(value, Quantized) and value.array.dtype in (np.int8, np.uint8) for value in values)


def _products(total, x, weight, bias):
    if bias is not None:
        total = total + bias.array.reshape([-1 if axis == 1 else 1 for axis in range(total.ndim)])
    return Products(total.astype(np.int32), F32(x.grid.scale) * np.asarray(weight.grid.scale, F32))


def _integer_bias(bias):
    return bias is None or (isinstance(bias, Quantized) and bias.array.dtype == np.int32)


def _turned(matrix, turn):
    return matrix.T if turn else matrix
