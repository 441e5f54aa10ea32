"""MXNet's operators in terms of ONNX's: one function for each, from a node to a value.

A writer takes the `Lowering` and the node; it returns a value of `values`, or a list of them. Operators that only move
elements return `Moved`, so that they can run on codes; clamps return `Clamped`, so that they can become a part of the
quantizer behind them.
"""
import math

import numpy as np

from ..symbol_graph import integers
from .values import Clamped, Moved, Real

WRITERS = {}


def writes(*ops):
    """Function decorator: writes these operators of MXNet."""
    def enter(function):
        WRITERS.update(dict.fromkeys(ops, function))
        return function
    return enter


def _real(to, node, op, inputs, **attrs):
    """Write one operator on real tensors."""
    return Real(to.write(op, inputs, to.name(node), **attrs))


def _inputs(to, node):
    return [to.real(to.value(entry)) for entry in node.inputs]


def _moved(to, node, op, *others, fill=None, **attrs):
    """``op`` moves the first input; ``others`` are names of its further inputs."""
    def write(name, sources, grid):
        more = [] if fill is None else [fill(grid)]
        return to.write(op, [*sources, *others, *more], name, **attrs)
    return Moved(to.net.label(node), (to.value(node.inputs[0]),), write)


def _indices(to, node, what, values):
    return to.constant(f'{to.net.label(node)}.{what}', np.asarray(values, np.int64))


# Layers

@writes('Convolution')
def convolution(to, node):
    axes = len(integers(node.attrs['kernel']))
    if node.attrs.get('layout', 'None') not in ('None', 'NCW', 'NCHW', 'NCDHW'):
        raise to.refused(node, f'its layout is {node.attrs["layout"]}, ONNX has channels first')
    weight, scale = to.weight(node)
    source = _layer_input(to, to.value(node.inputs[0]), scale, to.net.label(node))
    return _real(to, node, 'Conv', [source, weight, *to.bias(node, scale)],
                 kernel_shape=_sizes(node, 'kernel', axes), group=int(node.attrs.get('num_group', 1)),
                 **_window(node, axes))


@writes('Deconvolution')
def deconvolution(to, node):
    axes = len(integers(node.attrs['kernel']))
    if integers(node.attrs.get('target_shape', '')):
        raise to.refused(node, 'its target_shape takes the place of pads; give pads')
    weight, scale = to.weight(node)
    adj = _sizes(node, 'adj', axes, 0)
    return _real(to, node, 'ConvTranspose', [to.real(to.value(node.inputs[0])), weight, *to.bias(node, scale)],
                 kernel_shape=_sizes(node, 'kernel', axes), group=int(node.attrs.get('num_group', 1)),
                 output_padding=adj if any(adj) else None, **_window(node, axes))


def _sizes(node, name, axes, default=1):
    return list(integers(node.attrs.get(name, ''))) or [default] * axes


def _window(node, axes):
    return {'strides': _sizes(node, 'stride', axes), 'pads': _sizes(node, 'pad', axes, 0) * 2,
            'dilations': _sizes(node, 'dilate', axes)}


@writes('FullyConnected')
def fully_connected(to, node):
    weight, scale = to.weight(node)
    bias, source, shape = to.bias(node, scale), to.value(node.inputs[0]), to.shape(node.inputs[0])
    label, wide = to.net.label(node), node.attrs.get('flatten', 'True') not in ('True', 'true', '1')
    if wide and len(shape) != 2:        # every row by itself
        source = _rows(to, f'{label}.rows', source, [-1, shape[-1]])
    elif len(shape) != 2:
        source = Moved(f'{label}.flat', (source,),
                       lambda name, sources, grid: to.write('Flatten', sources, name, axis=1))
    made = _real(to, node, 'Gemm', [_layer_input(to, source, scale, label), weight, *bias], transB=1)
    if wide and len(shape) != 2:
        return _rows(to, f'{label}.out', made, [size or -1 for size in to.shapes[node, 0]])
    return made


def _rows(to, name, source, sizes):
    shape = to.constant(f'{name}.shape', np.asarray(sizes, np.int64))
    return Moved(name, (source,), lambda free, sources, grid: to.write('Reshape', [*sources, shape], free))


def _layer_input(to, source, scale, label):
    """The real input of a layer whose weight has ``scale``, None for a float weight.

    Beside codes, ONNX Runtime quantizes a float weight by itself, to 8 bits for the whole tensor. It does not if
    something stands between the codes and the layer: the largest of one tensor.
    """
    name = to.real(source)
    if scale is None and to.grid(source) is not None and to.engine.quantizes_weights:
        return to.write('Max', [name], to.free(f'{label}.input'))
    return name


@writes('BatchNorm')
def batch_norm(to, node):
    if int(node.attrs.get('axis', 1)) != 1:
        raise to.refused(node, f'it normalizes axis {node.attrs["axis"]}, ONNX only axis 1')
    inputs = _inputs(to, node)
    if node.attrs.get('fix_gamma', 'True') in ('True', 'true', '1'):
        gamma = to.net.parameter(node.inputs[1].node.name)
        inputs[1] = to.constant(f'{to.net.label(node)}.gamma', np.ones(gamma.shape, np.float32))
    return _real(to, node, 'BatchNormalization', inputs, epsilon=float(node.attrs.get('eps', 1e-3)))


# Poolings

@writes('Pooling')
def pooling(to, node):
    kind, shape = node.attrs.get('pool_type', 'max'), to.shape(node.inputs[0])
    axes = len(shape) - 2
    if kind not in ('max', 'avg'):
        raise to.refused(node, f'ONNX has no pooling of type {kind}')
    if node.attrs.get('layout', 'None') not in ('None', 'NCW', 'NCHW', 'NCDHW'):
        raise to.refused(node, f'its layout is {node.attrs["layout"]}, ONNX has channels first')
    if node.says('global_pool'):
        if kind == 'max':       # GlobalMaxPool takes no integers
            return _moved(to, node, 'MaxPool', kernel_shape=list(shape[2:]), strides=[1] * axes)
        return _real(to, node, 'GlobalAveragePool', [to.real(to.value(node.inputs[0]))])
    kernel, window = _sizes(node, 'kernel', axes), _window(node, axes)
    del window['dilations']
    full = node.attrs.get('pooling_convention', 'valid')
    if full not in ('valid', 'full'):
        raise to.refused(node, f'ONNX has no pooling convention {full!r}')
    extra = _overhang(shape[2:], kernel, window, full == 'full')
    if any(pad + more >= wide for pad, more, wide in zip(window['pads'][axes:], extra, kernel)):
        raise to.refused(node, f'its last window of size {tuple(kernel)} sees pads only')
    if kind == 'max':
        window['pads'] = [*window['pads'][:axes], *(size + more for size, more in zip(window['pads'][axes:], extra))]
        return _moved(to, node, 'MaxPool', kernel_shape=kernel, **window)
    included = node.attrs.get('count_include_pad', 'True') in ('True', 'true', '1')
    if any(extra) and included and any(window['pads']):
        raise to.refused(node, 'it counts pads and its last window reaches beyond them')
    if any(extra):      # beyond the pads nothing counts
        window['pads'] = [*window['pads'][:axes], *(size + more for size, more in zip(window['pads'][axes:], extra))]
        included = False
    return _real(to, node, 'AveragePool', [to.real(to.value(node.inputs[0]))], kernel_shape=kernel,
                 count_include_pad=int(included), **window)


def _overhang(sizes, kernel, window, full):
    """By how much the last window of each axis reaches beyond the pads, where sizes are rounded up."""
    axes = len(sizes)
    rest = [(size + 2 * pad - wide) % stride for size, wide, pad, stride
            in zip(sizes, kernel, window['pads'], window['strides'])]
    return [stride - over if full and over else 0 for over, stride in zip(rest, window['strides'])][:axes]


@writes('_contrib_AdaptiveAvgPooling2D')
def adaptive_pooling(to, node):
    size = integers(node.attrs.get('output_size', '')) or (1,)
    height, width = to.shape(node.inputs[0])[2:]
    rows, columns = size * 2 if len(size) == 1 else size
    source = to.real(to.value(node.inputs[0]))
    if (rows, columns) == (1, 1):
        return _real(to, node, 'GlobalAveragePool', [source])
    if height % rows == 0 and width % columns == 0:
        window = [height // rows, width // columns]
        return _real(to, node, 'AveragePool', [source], kernel_shape=window, strides=window)
    label = to.net.label(node)      # windows differ in size and overlap: the mean over each axis is a matrix
    right = to.constant(f'{label}.columns', _means(width, columns).T)
    inner = to.write('MatMul', [source, right], to.free(f'{label}.narrowed'))
    return _real(to, node, 'MatMul', [to.constant(f'{label}.rows', _means(height, rows)), inner])


def _means(size, count):
    """The matrix (count, size) that averages over the windows of adaptive pooling."""
    matrix = np.zeros((count, size), np.float32)
    for number in range(count):
        window = slice(number * size // count, -(-(number + 1) * size // count))
        matrix[number, window] = 1 / len(matrix[number, window])
    return matrix


# Activations

@writes('relu')
def relu(to, node):
    return Clamped(to.net.label(node), to.value(node.inputs[0]), 0.0, None)


@writes('clip')
def clip(to, node):
    return Clamped(to.net.label(node), to.value(node.inputs[0]), float(node.attrs['a_min']),
                   float(node.attrs['a_max']))


@writes('Activation')
def activation(to, node):
    kind = node.attrs['act_type']
    if kind == 'relu':
        return relu(to, node)
    known = {'sigmoid': 'Sigmoid', 'tanh': 'Tanh', 'softrelu': 'Softplus', 'softsign': 'Softsign'}
    if kind not in known:
        raise to.refused(node, f'ONNX has no activation {kind!r}')
    return _real(to, node, known[kind], _inputs(to, node))


@writes('LeakyReLU')
def leaky_relu(to, node):
    kind, slope = node.attrs.get('act_type', 'leaky'), float(node.attrs.get('slope', 0.25))
    source = to.real(to.value(node.inputs[0]))
    if kind == 'leaky':
        return _real(to, node, 'LeakyRelu', [source], alpha=slope)
    if kind == 'elu':
        return _real(to, node, 'Elu', [source], alpha=slope)
    if kind == 'selu':
        return _real(to, node, 'Selu', [source], alpha=1.6732632423543772, gamma=1.0507009873554805)
    if kind == 'prelu':
        slopes = to.net.compute(node.inputs[1]).asnumpy().reshape([-1] + [1] * (len(to.shape(node.inputs[0])) - 2))
        return _real(to, node, 'PRelu', [source, to.constant(f'{to.net.label(node)}.slope', slopes)])
    if kind == 'gelu':
        label = to.net.label(node)
        inner = to.write('Div', [source, to.number(math.sqrt(2))], to.free(f'{label}.scaled'))
        inner = to.write('Erf', [inner], to.free(f'{label}.erf'))
        inner = to.write('Add', [inner, to.number(1)], to.free(f'{label}.shifted'))
        inner = to.write('Mul', [inner, to.number(0.5)], to.free(f'{label}.share'))
        return _real(to, node, 'Mul', [source, inner])
    raise to.refused(node, f'ONNX has no activation {kind!r}')


@writes('hard_sigmoid')
def hard_sigmoid(to, node):
    return _real(to, node, 'HardSigmoid', _inputs(to, node), alpha=float(node.attrs.get('alpha', 0.2)),
                 beta=float(node.attrs.get('beta', 0.5)))


@writes('softmax', 'log_softmax')
def softmax(to, node):
    if len(node.inputs) > 1 or node.attrs.get('temperature', 'None') not in ('None', '1.0', '1'):
        raise to.refused(node, 'ONNX has no softmax with a length or a temperature')
    return _real(to, node, 'Softmax' if node.op == 'softmax' else 'LogSoftmax', _inputs(to, node),
                 axis=int(node.attrs.get('axis', -1)))


# Arithmetic

_BINARY = {'elemwise_add': 'Add', 'broadcast_add': 'Add', 'elemwise_sub': 'Sub', 'broadcast_sub': 'Sub',
           'elemwise_mul': 'Mul', 'broadcast_mul': 'Mul', 'elemwise_div': 'Div', 'broadcast_div': 'Div',
           'broadcast_maximum': 'Max', 'broadcast_minimum': 'Min', '_maximum': 'Max', '_minimum': 'Min',
           'broadcast_power': 'Pow', '_power': 'Pow'}
_UNARY = {'sqrt': 'Sqrt', 'exp': 'Exp', 'log': 'Log', 'abs': 'Abs', 'negative': 'Neg', 'tanh': 'Tanh',
          'sigmoid': 'Sigmoid', 'reciprocal': 'Reciprocal', 'softsign': 'Softsign', 'floor': 'Floor', 'ceil': 'Ceil',
          'erf': 'Erf', 'sin': 'Sin', 'cos': 'Cos'}
_SCALAR = {'_plus_scalar': 'Add', '_minus_scalar': 'Sub', '_mul_scalar': 'Mul', '_div_scalar': 'Div',
           '_power_scalar': 'Pow', '_maximum_scalar': 'Max', '_minimum_scalar': 'Min'}
_REVERSED = {'_rminus_scalar': 'Sub', '_rdiv_scalar': 'Div', '_rpower_scalar': 'Pow'}


@writes(*_BINARY)
def binary(to, node):
    return _real(to, node, _BINARY[node.op], _inputs(to, node))


@writes(*_UNARY)
def unary(to, node):
    return _real(to, node, _UNARY[node.op], _inputs(to, node))


@writes(*_SCALAR, *_REVERSED)
def scalar(to, node):
    inputs = [*_inputs(to, node), to.number(float(node.attrs['scalar']))]
    if node.op in _REVERSED:
        return _real(to, node, _REVERSED[node.op], inputs[::-1])
    return _real(to, node, _SCALAR[node.op], inputs)


@writes('add_n')
def add_n(to, node):
    total, *others = _inputs(to, node)
    for other in others:
        total = to.write('Add', [total, other], to.name(node))
    return Real(total)


@writes('square')
def square(to, node):
    return _real(to, node, 'Mul', _inputs(to, node) * 2)


@writes('ones_like', 'zeros_like')
def filled(to, node):
    """A number; one that meets tensors of its shape need not have it."""
    value = float(node.op == 'ones_like')
    if all(reader.op in _BINARY and reader.inputs[0].node is not reader.inputs[1].node
           for reader in to.net.graph.readers(node)):
        return Real(to.number(value))
    zeros = to.write('Mul', [*_inputs(to, node), to.number(0)], to.name(node))
    return Real(to.write('Add', [zeros, to.number(1)], to.name(node)) if value else zeros)


@writes('mean', 'sum', 'max', 'min')
def reduce(to, node):
    ndim = len(to.shape(node.inputs[0]))
    axes = sorted(axis % ndim for axis in integers(node.attrs.get('axis', ''))) or list(range(ndim))
    if node.says('exclude'):
        axes = [axis for axis in range(ndim) if axis not in axes]
    keep, source = int(node.says('keepdims')), to.real(to.value(node.inputs[0]))
    if node.op == 'mean' and ndim == 4 and axes == [2, 3]:
        pooled = to.write('GlobalAveragePool', [source], to.name(node))
        if keep:
            return Real(pooled)
        return Moved(f'{to.net.label(node)}.flat', (Real(pooled),),
                     lambda name, sources, grid: to.write('Flatten', sources, name, axis=1))
    if node.op == 'sum':
        return _real(to, node, 'ReduceSum', [source, _indices(to, node, 'axes', axes)], keepdims=keep)
    op = f'Reduce{node.op.capitalize()}'
    if to.opset >= 18:
        return _real(to, node, op, [source, _indices(to, node, 'axes', axes)], keepdims=keep)
    return _real(to, node, op, [source], axes=axes, keepdims=keep)


@writes('L2Normalization')
def l2_normalization(to, node):
    mode, ndim = node.attrs.get('mode', 'instance'), len(to.shape(node.inputs[0]))
    axes = {'instance': list(range(1, ndim)), 'channel': [1], 'spatial': list(range(2, ndim))}[mode]
    label, source = to.net.label(node), to.real(to.value(node.inputs[0]))
    squares = to.write('Mul', [source, source], to.free(f'{label}.squares'))
    total = to.write('ReduceSum', [squares, _indices(to, node, 'axes', axes)], to.free(f'{label}.sum'), keepdims=1)
    total = to.write('Add', [total, to.number(float(node.attrs.get('eps', 1e-10)))], to.free(f'{label}.guarded'))
    norm = to.write('Sqrt', [total], to.free(f'{label}.norm'))
    return _real(to, node, 'Div', [source, norm])


@writes('LRN')
def local_response(to, node):
    return _real(to, node, 'LRN', _inputs(to, node), size=int(node.attrs['nsize']),
                 alpha=float(node.attrs.get('alpha', 1e-4)), beta=float(node.attrs.get('beta', 0.75)),
                 bias=float(node.attrs.get('knorm', 2)))


# Operators that move or select elements

@writes('Dropout', '_copy', 'BlockGrad', 'Cast', 'amp_cast')
def passed(to, node):
    return to.value(node.inputs[0])


@writes('amp_multicast')
def passed_together(to, node):
    return [to.value(entry) for entry in node.inputs]


@writes('Concat')
def concat(to, node):
    axis = int(node.attrs.get('dim', 1))
    return Moved(to.net.label(node), tuple(to.value(entry) for entry in node.inputs),
                 lambda name, sources, grid: to.write('Concat', sources, name, axis=axis))


@writes('Flatten')
def flatten(to, node):
    return _moved(to, node, 'Flatten', axis=1)


@writes('Reshape', 'reshape_like')
def reshape(to, node):
    shape = to.shapes[node, 0]
    first = to.shape(node.inputs[0])[:1]
    if sum(size == 0 for size in shape) > 1:
        raise to.refused(node, 'the batch is part of several axes of its output')
    sizes = [size or -1 for size in shape]
    if shape[:1] == first == (0,):
        sizes[0] = 0        # stays as it is
    return _moved(to, node, 'Reshape', _indices(to, node, 'shape', sizes))


@writes('transpose')
def transpose(to, node):
    ndim = len(to.shape(node.inputs[0]))
    return _moved(to, node, 'Transpose', perm=list(integers(node.attrs.get('axes', ''))) or list(range(ndim))[::-1])


@writes('SwapAxis')
def swap(to, node):
    order = list(range(len(to.shape(node.inputs[0]))))
    first, second = int(node.attrs.get('dim1', 0)), int(node.attrs.get('dim2', 0))
    order[first], order[second] = order[second], order[first]
    return _moved(to, node, 'Transpose', perm=order)


@writes('expand_dims')
def expand(to, node):
    axis = int(node.attrs['axis']) % len(to.shapes[node, 0])
    return _moved(to, node, 'Unsqueeze', _indices(to, node, 'axes', [axis]))


@writes('squeeze')
def squeeze(to, node):
    shape = to.shape(node.inputs[0])
    given = integers(node.attrs.get('axis', ''))
    axes = [axis % len(shape) for axis in given] or [axis for axis, size in enumerate(shape) if size == 1]
    return _moved(to, node, 'Squeeze', _indices(to, node, 'axes', axes))


@writes('slice_axis')
def slice_axis(to, node):
    axis = int(node.attrs['axis']) % len(to.shape(node.inputs[0]))
    return _sliced(to, node, [(axis, _bound(node.attrs['begin'], 0), _bound(node.attrs['end'], _FAR), 1)])


@writes('slice')
def cut(to, node):
    begin, end = (_bounds(node.attrs[name]) for name in ('begin', 'end'))
    steps = _bounds(node.attrs.get('step', '')) or [None] * len(begin)
    parts = []
    for axis, (start, stop, step) in enumerate(zip(begin, end, steps)):
        if (start, stop, step) != (None, None, None):
            step = step or 1
            parts.append((axis, (0 if step > 0 else _FAR) if start is None else start,
                          (_FAR if step > 0 else -_FAR) if stop is None else stop, step))
    return _sliced(to, node, parts)


@writes('slice_like')
def slice_like(to, node):
    shape, like = (to.shape(entry) for entry in node.inputs)
    axes = integers(node.attrs.get('axes', '')) or range(len(shape))
    return _sliced(to, node, [(axis % len(shape), 0, like[axis], 1) for axis in axes if shape[axis] != like[axis]])


_FAR = 2 ** 31 - 1


def _bound(text, default):
    return default if text == 'None' else int(text)


def _bounds(text):
    parts = text.strip('()[] ').split(',')
    return [None if part.strip() == 'None' else int(part) for part in parts if part.strip()]


def _sliced(to, node, parts):
    if not parts:
        return to.value(node.inputs[0])
    axes, starts, ends, steps = zip(*parts)
    return _moved(to, node, 'Slice', *(_indices(to, node, what, values) for what, values in (
        ('starts', starts), ('ends', ends), ('axes', axes), ('steps', steps))))


@writes('SliceChannel')
def split(to, node):
    axis, count = int(node.attrs.get('axis', 1)), int(node.attrs['num_outputs'])
    size = to.shape(node.inputs[0])[axis] // count
    made = []
    for number in range(count):
        bounds = [_indices(to, node, what, [value]) for what, value in (
            ('starts', number * size), ('ends', (number + 1) * size), ('axes', axis), ('steps', 1))]
        part = _moved(to, node, 'Slice', *bounds)
        if node.says('squeeze_axis'):
            axes = _indices(to, node, 'axes', [axis])
            part = Moved(part.name, (part,), lambda name, sources, grid, axes=axes: to.write(
                'Squeeze', [*sources, axes], name))
        made.append(part)
    return made


@writes('Pad')
def pad(to, node):
    width, mode = integers(node.attrs['pad_width']), node.attrs['mode']
    value = float(node.attrs.get('constant_value', 0))
    pads = _indices(to, node, 'pads', [*width[::2], *width[1::2]])
    if mode != 'constant':
        return _moved(to, node, 'Pad', pads, mode=mode)
    if value:
        return _real(to, node, 'Pad', [to.real(to.value(node.inputs[0])), pads, to.number(value)], mode=mode)
    return _moved(to, node, 'Pad', pads, mode=mode, fill=lambda grid: to.number(
        0 if grid is None else grid.zero_point, 'float32' if grid is None else grid.dtype))


@writes('UpSampling')
def upsampling(to, node):
    if node.attrs['sample_type'] != 'nearest' or len(node.inputs) > 1:
        raise to.refused(node, 'only nearest neighbours of one input are expressible')
    scales = to.constant(f'{to.net.label(node)}.scales', np.array([1, 1] + 2 * [int(node.attrs['scale'])], np.float32))
    return _moved(to, node, 'Resize', '', scales, mode='nearest', coordinate_transformation_mode='asymmetric',
                  nearest_mode='floor')


@writes('_contrib_BilinearResize2D')
def bilinear(to, node):
    aligned = node.attrs.get('align_corners', 'True') in ('True', 'true', '1')
    shape = to.shapes[node, 0]
    old = to.shape(node.inputs[0])
    if 0 in old[1:]:
        raise to.refused(node, 'the size of its input is unknown')
    scales = to.constant(f'{to.net.label(node)}.scales',
                         np.array([1, 1, *map(_scale, shape[2:], old[2:])], np.float32))
    return _real(to, node, 'Resize', [to.real(to.value(node.inputs[0])), '', scales], mode='linear',
                 coordinate_transformation_mode='align_corners' if aligned else 'half_pixel')


def _scale(new, old):
    """The scale by which an axis grows, in float32, such that their product, rounded down, is the new size."""
    scale = np.float32(new / old)
    while int(np.float32(old) * scale) < new:
        scale = np.nextafter(scale, np.float32(np.inf))
    return scale


@writes('depth_to_space', 'space_to_depth')
def rearranged(to, node):
    op = 'DepthToSpace' if node.op == 'depth_to_space' else 'SpaceToDepth'
    return _moved(to, node, op, blocksize=int(node.attrs['block_size']))


@writes('tile')
def tiled(to, node):
    repeats = list(integers(node.attrs['reps']))
    ndim = len(to.shape(node.inputs[0]))
    if len(repeats) > ndim:
        raise to.refused(node, 'it adds axes')
    return _moved(to, node, 'Tile', _indices(to, node, 'repeats', [1] * (ndim - len(repeats)) + repeats))


@writes('reverse')
def reverse(to, node):
    axes = integers(node.attrs['axis'])
    return _sliced(to, node, [(axis, _FAR, -_FAR, -1) for axis in axes])
