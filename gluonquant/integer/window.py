"""Windows that slide along the last axes: convolutions, exact for integers, and poolings."""
import math

import numpy as np

from .table import moving, operator
from .values import F32, Average, Quantized, Real


def window_settings(attrs, axes):
    """Strides, pads and dilations of a window that slides along ``axes`` axes."""
    if attrs.get('auto_pad', 'NOTSET') != 'NOTSET':
        raise ValueError(f'auto_pad={attrs["auto_pad"]!r} does not run here: write the pads')
    return {'strides': attrs.get('strides') or [1] * axes, 'pads': attrs.get('pads') or [0] * 2 * axes,
            'dilations': attrs.get('dilations') or [1] * axes}


def convolve(x, weight, strides, pads, dilations, group=1):
    """Convolution of (N, C, ...) with (O, C / group, ...): exact int32 for integers, float32 for reals.

    A matrix product with what the window sees, place by place.
    """
    if np.issubdtype(x.dtype, np.integer):
        largest = np.abs(x).max(initial=0) * np.abs(weight).reshape(len(weight), -1).sum(1).max(initial=0)
        exact = _exact(largest)
        return convolve(x.astype(exact), weight.astype(exact), strides, pads, dilations, group).astype(np.int32)
    x = padded(x, pads)
    sizes = [(size - (kernel - 1) * dilation - 1) // stride + 1 for size, kernel, dilation, stride
             in zip(x.shape[2:], weight.shape[2:], dilations, strides)]
    seen = list(_slices(weight.shape[2:], sizes, strides, dilations))
    if weight.shape[1] == 1 and group == x.shape[1]:
        parts = weight.reshape(len(weight), -1).T.reshape(len(seen), -1, *[1] * len(sizes))
        return sum(np.repeat(x[place], len(weight) // group, axis=1) * part for place, part in zip(seen, parts))
    # For each image, one product of matrices: (O, places * C) with (places * C, outputs).
    rows = np.moveaxis(weight.reshape(group, -1, weight.shape[1], len(seen)), 3, 2).reshape(group, -1, len(seen)
                                                                                        * weight.shape[1])
    total = np.empty((len(x), group, rows.shape[1], math.prod(sizes)), x.dtype)
    for image, out in zip(x, total):
        columns = np.stack([image[place] for place in seen]).reshape(len(seen), group, weight.shape[1], -1)
        np.matmul(rows, columns.swapaxes(0, 1).reshape(group, rows.shape[2], -1), out=out)
    return total.reshape(len(x), len(weight), *sizes)


def _slices(kernel, sizes, strides, dilations):
    """What each place of a window sees as it slides: indices of the last axes."""
    for place in np.ndindex(*kernel):
        yield (..., *(slice(at * dilation, at * dilation + (size - 1) * stride + 1, stride)
                      for at, dilation, size, stride in zip(place, dilations, sizes, strides)))


def matmul(first, second):
    """The product of two integer matrices, exact, int32."""
    largest = np.abs(first).max(initial=0) * np.abs(second).sum(-2).max(initial=0)
    exact = _exact(largest)
    return (first.astype(exact) @ second.astype(exact)).astype(np.int32)


def _exact(largest):
    """The type in which sums up to ``largest`` are exact whatever their order, so that fast float products serve."""
    return np.float32 if largest < 2 ** 24 else np.float64


def padded(x, pads, value=0):
    """x with ``value`` around its last axes: pads before, for each axis, then pads behind."""
    if not any(pads):
        return x
    half = len(pads) // 2
    return np.pad(x, [(0, 0)] * (x.ndim - half) + list(zip(pads[:half], pads[half:])), constant_values=value)


@moving('MaxPool')
def max_pool(attrs, x):
    kernel = attrs['kernel_shape']
    window = window_settings(attrs, len(kernel))
    info = np.iinfo(x.dtype) if np.issubdtype(x.dtype, np.integer) else np.finfo(x.dtype)
    lowest = info.min if np.issubdtype(x.dtype, np.integer) else -np.inf
    places = window_places(x, kernel, window, attrs.get('ceil_mode', 0), lowest)
    return np.maximum.reduce(places)


def window_places(x, kernel, window, ceil, value):
    """What each place of a pooling window sees: arrays of the output's shape."""
    pads, sizes = list(window['pads']), []
    axes = len(kernel)
    for axis, (size, wide, stride, dilation) in enumerate(zip(x.shape[-axes:], kernel, window['strides'],
                                                              window['dilations'])):
        room = size + pads[axis] + pads[axis + axes] - (wide - 1) * dilation - 1
        count = -(-room // stride) + 1 if ceil else room // stride + 1
        if ceil and (count - 1) * stride >= size + pads[axis]:      # a window that would see padding only
            count -= 1
        pads[axis + axes] = max(pads[axis + axes], (count - 1) * stride + (wide - 1) * dilation + 1 - size - pads[axis])
        sizes.append(count)
    x = padded(x, pads, value)
    return [x[seen] for seen in _slices(kernel, sizes, window['strides'], window['dilations'])]


@moving('GlobalMaxPool')
def global_max(attrs, x):
    return x.max(tuple(range(2, x.ndim)), keepdims=True)


@operator('AveragePool')
def average_pool(attrs, x):
    mean = _windowed_mean(attrs, x.real())
    return Average(mean) if isinstance(x, Quantized) else Real(mean)


def _windowed_mean(attrs, x):
    kernel = attrs['kernel_shape']
    window = window_settings(attrs, len(kernel))
    ceil = attrs.get('ceil_mode', 0)
    total = sum(window_places(x, kernel, window, ceil, F32(0)))
    if attrs.get('count_include_pad', 0):
        inside = padded(np.ones_like(x[:1, :1]), window['pads'], F32(1))
        window = {**window, 'pads': [0] * len(window['pads'])}
    else:
        inside = np.ones_like(x[:1, :1])
    return total / sum(window_places(inside, kernel, window, ceil, F32(0)))
