"""Operators that compute in float32."""

import numpy as np

from .elementary import FUNCTIONS
from .table import real
from .values import F32
from .window import convolve, window_settings


@real('ConvTranspose')
def conv_transpose(attrs, x, weight, bias=None):
    axes, group = weight.ndim - 2, attrs.get('group', 1)
    window = window_settings(attrs, axes)
    spread = np.zeros((*x.shape[:2], *((size - 1) * stride + 1 for size, stride in zip(x.shape[2:], window['strides']))
                       ), x.dtype)
    spread[(..., *(slice(None, None, stride) for stride in window['strides']))] = x
    # The transposed convolution is a convolution of the spread input with the turned kernel.
    turned = np.flip(weight.reshape(group, -1, *weight.shape[1:]), tuple(range(3, 3 + axes))).swapaxes(1, 2)
    turned = turned.reshape(-1, *turned.shape[2:])
    reach = [(size - 1) * dilation for size, dilation in zip(weight.shape[2:], window['dilations'])]
    extra = attrs.get('output_padding') or [0] * axes
    pads = [reach[axis] - window['pads'][axis] for axis in range(axes)]
    pads += [reach[axis] - window['pads'][axis + axes] + extra[axis] for axis in range(axes)]
    crop = tuple(slice(max(-pads[axis], 0), size - max(-pads[axis + axes], 0))
                 for axis, size in enumerate(spread.shape[2:]))
    out = convolve(spread[(..., *crop)], turned, [1] * axes, [max(size, 0) for size in pads], window['dilations'],
                   group)
    return out if bias is None else out + bias.reshape((-1,) + (1,) * axes)


@real('BatchNormalization')
def batch_norm(attrs, x, gamma, beta, mean, variance):
    gamma, beta, mean, variance = (each.reshape([-1 if axis == 1 else 1 for axis in range(x.ndim)])
                                   for each in (gamma, beta, mean, variance))
    return (x - mean) * (gamma / np.sqrt(variance + F32(attrs.get('epsilon', 1e-5)))) + beta


@real('LRN')
def local_response(attrs, x):
    size = attrs['size']
    squares = np.pad(np.square(x), [(0, 0), ((size - 1) // 2, size // 2), (0, 0), (0, 0)])
    total = sum(squares[:, place:place + x.shape[1]] for place in range(size))
    return x / (F32(attrs.get('bias', 1)) + F32(attrs['alpha'] / size) * total) ** F32(attrs['beta'])


@real('LogSoftmax')
def log_softmax(attrs, x):
    axis = attrs.get('axis', -1)
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


@real('LpNormalization')
def lp_normalization(attrs, x):
    norm = np.linalg.norm(x, attrs.get('p', 2), axis=attrs.get('axis', -1), keepdims=True)
    return x / norm


@real('PRelu')
def prelu(attrs, x, slope):
    return np.where(x < 0, x * slope, x)


@real('Where')
def where(attrs, condition, first, second):
    return np.where(condition, first, second)


def _reduction(function):
    def compute(attrs, x, axes=None):
        axes = attrs.get('axes') if axes is None else axes
        axes = None if axes is None else tuple(int(axis) for axis in axes)
        return function(x, axis=axes, keepdims=bool(attrs.get('keepdims', 1)))
    return compute


for _name, _function in {'ReduceMean': np.mean, 'ReduceSum': np.sum, 'ReduceMax': np.max, 'ReduceMin': np.min,
                         'ReduceProd': np.prod}.items():
    real(_name)(_reduction(_function))
real('ReduceL2')(_reduction(lambda x, **given: np.sqrt(np.square(x).sum(**given))))

for _name, _function in FUNCTIONS.items():
    real(_name)(lambda attrs, *arrays, function=_function: function(*arrays))


@real('LeakyRelu')
def leaky_relu(attrs, x):
    return np.where(x < 0, x * F32(attrs.get('alpha', 0.01)), x)


@real('Elu')
def elu(attrs, x):
    return np.where(x < 0, F32(attrs.get('alpha', 1)) * np.expm1(np.minimum(x, 0)), x)


@real('Selu')
def selu(attrs, x):
    return F32(attrs['gamma']) * np.where(x < 0, F32(attrs['alpha']) * np.expm1(np.minimum(x, 0)), x)


@real('HardSigmoid')
def hard_sigmoid(attrs, x):
    return np.clip(x * F32(attrs.get('alpha', 0.2)) + F32(attrs.get('beta', 0.5)), 0, 1)
