"""The ONNX operators that exported graphs use, on `values`.

A function takes the attributes and the inputs: arrays of codes or of constants, and values. It returns a value, an
array of codes, or a list of them.
"""
import math

import numpy as np

from .elementary import FUNCTIONS
from .values import F32, Average, Clamped, Mean, Multiplied, Products, Quantized, Real, Shares, Sum

TABLE = {}


def operator(*names):
    """Function decorator: computes these operators."""
    def enter(function):
        TABLE.update(dict.fromkeys(names, function))
        return function
    return enter


def moving(*names):
    """Function decorator: ``function(attrs, array, *others)`` moves or selects elements, of whatever type."""
    def enter(function):
        return operator(*names)(moved(function))
    return enter


def moved(function):
    """``function``, see `moving`, on values."""
    def compute(attrs, value, *others):
        others = [other if other is None or isinstance(other, np.ndarray) else other.real() for other in others]
        if isinstance(value, Quantized):
            return _each(function(attrs, value.array, *others), lambda array: Quantized(array, value.grid))
        if isinstance(value, np.ndarray) and value.dtype != F32:
            return function(attrs, value, *others)
        return _each(function(attrs, _real(value), *others), Real)      # a real constant becomes a value
    return compute


def real(*names):
    """Function decorator: ``function(attrs, *arrays)`` computes in float32."""
    def enter(function):
        def compute(attrs, *values):
            arrays = [value if value is None or isinstance(value, np.ndarray) else value.real() for value in values]
            return _each(function(attrs, *arrays), lambda array: Real(np.asarray(array, F32)))
        return operator(*names)(compute)
    return enter


def _each(made, wrap):
    return [wrap(array) for array in made] if isinstance(made, list) else wrap(made)


# Integer operators

@operator('Conv')
def conv(attrs, x, weight, bias=None):
    settings = _window(attrs, weight_of(weight).ndim - 2)
    if isinstance(x, Quantized) and isinstance(weight, Quantized) and _integer_bias(bias):
        total = convolve(x.offsets(), weight.offsets(), **settings, group=attrs.get('group', 1))
        return _products(total, x, weight, bias)
    out = convolve(_real(x), _real(weight), **settings, group=attrs.get('group', 1))
    return Real(out if bias is None else out + _real(bias).reshape((-1,) + (1,) * (out.ndim - 2)))


@operator('Gemm')
def gemm(attrs, x, weight, bias=None):
    first, second = bool(attrs.get('transA', 0)), bool(attrs.get('transB', 0))
    if isinstance(x, Quantized) and isinstance(weight, Quantized) and _integer_bias(bias):
        return _products(matmul(_turned(x.offsets(), first), _turned(weight.offsets(), second)), x, weight, bias)
    out = _turned(_real(x), first) @ _turned(_real(weight), second)
    return Real(out if bias is None else out + _real(bias))


@operator('MatMul')
def matrix_product(attrs, x, weight):
    if isinstance(x, Quantized) and isinstance(weight, Quantized) and not np.ndim(weight.grid.scale):
        return Products(matmul(x.offsets(), weight.offsets()), F32(x.grid.scale) * F32(weight.grid.scale))
    return Real(_real(x) @ _real(weight))


@operator('Add')
def add(attrs, first, second):
    if _are_codes(first, second):
        return Sum(first, second)
    return Real(_real(first) + _real(second))


@operator('Mul')
def multiply(attrs, first, second):
    if _are_codes(first, second):
        return Multiplied(first, second)
    return Real(_real(first) * _real(second))


@operator('Softmax')
def softmax(attrs, x):
    axis = attrs.get('axis', -1)
    if _are_codes(x) and axis in (-1, x.array.ndim - 1):
        return Shares(x)
    x = x.real()
    powers = np.exp(x - x.max(axis, keepdims=True))
    return Real(powers / powers.sum(axis, keepdims=True))


@operator('Relu')
def relu(attrs, x):
    return Clamped(x)


@operator('GlobalAveragePool')
def global_average(attrs, x):
    axes = tuple(range(2, _array(x).ndim))
    if isinstance(x, Quantized):
        count = math.prod(x.array.shape[2:])
        return Mean(x.offsets().sum(axes, keepdims=True, dtype=np.int32), x.grid.scale, count)
    return Real(_real(x).mean(axes, keepdims=True, dtype=F32))


def _are_codes(*values):
    """Whether all are 8-bit codes."""
    return all(isinstance(value, Quantized) and value.array.dtype in (np.int8, np.uint8) for value in values)


def _products(total, x, weight, bias):
    if bias is not None:
        total = total + bias.array.reshape([-1 if axis == 1 else 1 for axis in range(total.ndim)])
    return Products(total.astype(np.int32), F32(x.grid.scale) * np.asarray(weight.grid.scale, F32))


def _integer_bias(bias):
    return bias is None or (isinstance(bias, Quantized) and bias.array.dtype == np.int32)


def weight_of(weight):
    """The array of a weight, codes or real."""
    return _array(weight)


def _array(value):
    return value if isinstance(value, np.ndarray) else value.array if hasattr(value, 'array') else value.real()


def _real(value):
    return value if isinstance(value, np.ndarray) else value.real()


def _turned(matrix, turn):
    return matrix.T if turn else matrix


def _window(attrs, axes):
    """Strides, pads and dilations of a window that slides along ``axes`` axes."""
    if attrs.get('auto_pad', 'NOTSET') != 'NOTSET':
        raise ValueError(f'auto_pad={attrs["auto_pad"]!r} does not run here: write the pads')
    return {'strides': attrs.get('strides') or [1] * axes, 'pads': attrs.get('pads') or [0] * 2 * axes,
            'dilations': attrs.get('dilations') or [1] * axes}


def convolve(x, weight, strides, pads, dilations, group=1):
    """Convolution of (N, C, ...) with (O, C / group, ...): exact int32 for integers, float32 for reals.

    The sum over the places of the window of one matrix product each.
    """
    if np.issubdtype(x.dtype, np.integer):
        largest = np.abs(x).max(initial=0) * np.abs(weight).reshape(len(weight), -1).sum(1).max(initial=0)
        exact = _exact(largest)
        return convolve(x.astype(exact), weight.astype(exact), strides, pads, dilations, group).astype(np.int32)
    axes = weight.ndim - 2
    x = padded(x, pads)
    sizes = [(size - (kernel - 1) * dilation - 1) // stride + 1 for size, kernel, dilation, stride
             in zip(x.shape[2:], weight.shape[2:], dilations, strides)]
    depthwise = weight.shape[1] == 1 and group == x.shape[1]
    total = np.zeros((len(x), len(weight), *sizes), x.dtype)
    for place in np.ndindex(weight.shape[2:]):
        seen = x[(..., *(slice(at * dilation, at * dilation + (size - 1) * stride + 1, stride) for at, dilation, size,
                         stride in zip(place, dilations, sizes, strides)))]
        part = weight[(..., *place)]
        if depthwise:
            repeated = np.repeat(seen, len(weight) // group, axis=1)
            total += repeated * part.reshape((-1,) + (1,) * axes)
        else:
            rows = np.ascontiguousarray(seen).reshape(len(x), group, -1, math.prod(sizes))
            total += (part.reshape(group, -1, part.shape[1]) @ rows).reshape(total.shape)
    return total


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


# Operators that move codes as they move values

@moving('MaxPool')
def max_pool(attrs, x):
    kernel = attrs['kernel_shape']
    window = _window(attrs, len(kernel))
    info = np.iinfo(x.dtype) if np.issubdtype(x.dtype, np.integer) else np.finfo(x.dtype)
    lowest = info.min if np.issubdtype(x.dtype, np.integer) else -np.inf
    places = _places(x, kernel, window, attrs.get('ceil_mode', 0), lowest)
    return np.maximum.reduce(list(places))


def _places(x, kernel, window, ceil, value):
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
    for place in np.ndindex(*kernel):
        yield x[(..., *(slice(at * dilation, at * dilation + (size - 1) * stride + 1, stride) for at, dilation, size,
                        stride in zip(place, window['dilations'], sizes, window['strides'])))]


@moving('GlobalMaxPool')
def global_max(attrs, x):
    return x.max(tuple(range(2, x.ndim)), keepdims=True)


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
        return Real(_bilinear(_real(x), scales, where == 'align_corners'))
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
    if aligned:
        places = places * F32(size - 1) / F32(max(new - 1, 1))
    else:
        places = (places + F32(0.5)) / scale - F32(0.5)
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
    value = 0 if value is None else float(_real(value))
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
    return Real(np.concatenate([_real(value) for value in values], axis))


@operator('Clip')
def clip(attrs, x, low=None, high=None):
    if isinstance(x, np.ndarray):
        return np.clip(x, low, high)
    low, high = (None if bound is None else F32(_real(bound)) for bound in (low, high))
    return Real(np.clip(x.real(), low, high))


# Real operators

@operator('AveragePool')
def average_pool(attrs, x):
    mean = _windowed_mean(attrs, x.real())
    return Average(mean) if isinstance(x, Quantized) else Real(mean)


def _windowed_mean(attrs, x):
    kernel = attrs['kernel_shape']
    window = _window(attrs, len(kernel))
    ceil = attrs.get('ceil_mode', 0)
    total = sum(_places(x, kernel, window, ceil, F32(0)))
    if attrs.get('count_include_pad', 0):
        inside = padded(np.ones_like(x[:1, :1]), window['pads'], F32(1))
        window = {**window, 'pads': [0] * len(window['pads'])}
    else:
        inside = np.ones_like(x[:1, :1])
    return total / sum(_places(inside, kernel, window, ceil, F32(0)))


@real('ConvTranspose')
def conv_transpose(attrs, x, weight, bias=None):
    axes, group = weight.ndim - 2, attrs.get('group', 1)
    window = _window(attrs, axes)
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
