"""Operators that move codes as they move values."""
import math

import numpy as np

from .table import moved, moving, operator, real_of
from .values import F32, Quantized, Real


@moving('Identity', 'Dropout')
def identity(attrs, x, *others):
    return x


@moving('Flatten')
def flatten(attrs, x):
    return x.reshape(math.prod(x.shape[:attrs.get('axis', 1)]), -1)


@moving('Reshape')
def reshape(attrs, x, shape):
    return x.reshape([old if new == 0 else new for new, old in zip(shape, [*x.shape, *[0] * len(shape)])])


@moving('Transpose')
def transpose(attrs, x):
    return x.transpose(attrs['perm'])


@moving('Squeeze')
def squeeze(attrs, x, axes):
    return x.squeeze(tuple(int(axis) for axis in axes))


@moving('Unsqueeze')
def unsqueeze(attrs, x, axes):
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


@moving('Slice')
def cut(attrs, x, starts, ends, axes, steps=None):
    steps = np.ones_like(starts) if steps is None else steps
    chosen = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps):
        chosen[axis] = slice(int(start), None if end <= -2 ** 31 else int(end), int(step))
    return x[tuple(chosen)]


@moving('Split')
def split(attrs, x, sizes):
    return np.split(x, np.cumsum(sizes)[:-1], axis=attrs.get('axis', 0))


@moving('Gather')
def gather(attrs, x, indices):
    return np.take(x, indices.astype(np.int64), axis=attrs.get('axis', 0))


@moving('Expand')
def expand(attrs, x, shape):
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape)))


@moving('Tile')
def tile(attrs, x, repeats):
    return np.tile(x, repeats)


@moving('DepthToSpace')
def depth_to_space(attrs, x):
    n, c, h, w = x.shape
    size = attrs['blocksize']
    return x.reshape(n, size, size, -1, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, -1, h * size, w * size)


@moving('SpaceToDepth')
def space_to_depth(attrs, x):
    n, c, h, w = x.shape
    size = attrs['blocksize']
    return x.reshape(n, c, h // size, size, w // size, size).transpose(0, 3, 5, 1, 2, 4).reshape(
        n, -1, h // size, w // size)


@operator('Resize')
def resize(attrs, x, roi=None, scales=None, sizes=None):
    mode, where = attrs.get('mode', 'nearest'), attrs.get('coordinate_transformation_mode', 'half_pixel')
    if mode == 'linear' and where in ('align_corners', 'half_pixel'):
        return Real(_bilinear(real_of(x), scales, where == 'align_corners'))
    if mode != 'nearest' or where != 'asymmetric':
        raise ValueError(f'resizing by {mode!r}, {where!r} does not run here: only nearest neighbours, asymmetric, and '
                         'linear with align_corners or half_pixel')
    return _repeated(attrs, x, scales)


def _repeat(attrs, x, scales):
    for axis, scale in enumerate(scales):
        if scale != 1:
            x = np.repeat(x, int(scale), axis=axis)
    return x


_repeated = moved(_repeat)


def _bilinear(x, scales, aligned):
    """Bilinear interpolation of the last two axes, summed in the order in which ONNX Runtime sums."""
    (top, bottom, down, up), (left, right, far, near) = (
        _neighbours(size, scale, aligned) for size, scale in zip(x.shape[2:], scales[2:]))
    down, up = down[:, None], up[:, None]
    above, below = x[:, :, top], x[:, :, bottom]
    return (near * up * above[..., left] + far * up * above[..., right]
            + near * down * below[..., left] + far * down * below[..., right])


def _neighbours(size, scale, aligned):
    """For each place of a resized axis, its two neighbours in the old axis, and the distance to each."""
    scale = F32(scale)
    new = int(F32(size) * scale)
    places = np.arange(new, dtype=F32)
    places = places * F32(size - 1) / F32(max(new - 1, 1)) if aligned else (places + F32(0.5)) / scale - F32(0.5)
    places = np.clip(places, F32(0), F32(size - 1))
    first = places.astype(np.int64)
    second = np.minimum(first + 1, size - 1)
    before, behind = np.abs(places - first.astype(F32)), np.abs(places - second.astype(F32))
    at_end = first == second
    before[at_end] = behind[at_end] = 0.5
    return first, second, before, behind


@operator('Pad')
def pad(attrs, x, pads, value=None):
    pads = [int(size) for size in pads]
    mode = {'constant': 'constant', 'edge': 'edge', 'reflect': 'reflect'}[attrs.get('mode', 'constant')]
    half = len(pads) // 2
    width = list(zip(pads[:half], pads[half:]))

    def filled(array, value):
        return np.pad(array, width, mode, **({'constant_values': value} if mode == 'constant' else {}))
    if isinstance(x, np.ndarray):
        return filled(x, 0 if value is None else value)
    value = 0 if value is None else float(real_of(value))
    if isinstance(x, Quantized) and (value == 0 or mode != 'constant'):
        return Quantized(filled(x.array, x.grid.zero_point), x.grid)
    return Real(filled(x.real(), F32(value)))


@operator('Concat')
def concat(attrs, *values):
    axis = attrs['axis']
    if all(isinstance(value, np.ndarray) and value.dtype != F32 for value in values):
        return np.concatenate(values, axis)
    if all(isinstance(value, Quantized) and value.grid.same(values[0].grid) for value in values):
        return Quantized(np.concatenate([value.array for value in values], axis), values[0].grid)
    return Real(np.concatenate([real_of(value) for value in values], axis))


@operator('Clip')
def clip(attrs, x, low=None, high=None):
    if isinstance(x, np.ndarray):
        return np.clip(x, low, high)
    low, high = (None if bound is None else F32(real_of(bound)) for bound in (low, high))
    return Real(np.clip(x.real(), low, high))
