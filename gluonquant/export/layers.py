"""Writers of layers and poolings."""

import numpy as np

from ..symbol_graph import integers
from .table import moved, real, real_inputs, sizes, window_of, writes
from .values import Moved


@writes('Convolution')
def convolution(to, node):
    axes = len(integers(node.attrs['kernel']))
    if node.attrs.get('layout', 'None') not in ('None', 'NCW', 'NCHW', 'NCDHW'):
        raise to.refused(node, f'its layout is {node.attrs["layout"]}, ONNX has channels first')
    if to.engine.dense_points and _is_dense(to, node, axes):
        return _dense_convolution(to, node)
    weight, scale = to.weight(node)
    source = _layer_input(to, to.value(node.inputs[0]), scale, to.net.label(node))
    return real(to, node, 'Conv', [source, weight, *to.bias(node, scale)],
                kernel_shape=sizes(node, 'kernel', axes), group=int(node.attrs.get('num_group', 1)),
                **window_of(node, axes))


def _is_dense(to, node, axes):
    """Whether a convolution sees one place only, so that it is a dense layer."""
    window = window_of(node, axes)
    one = all(size == 1 for size in (*to.shape(node.inputs[0])[2:], *sizes(node, 'kernel', axes)))
    whole = int(node.attrs.get('num_group', 1)) == 1 and not any(window['pads'])
    return one and whole and to.constant_input(node.inputs[1])


def _dense_convolution(to, node):
    """As a dense layer, which engines compute on integers even if no quantizer follows."""
    label, (channels, *places) = to.net.label(node), to.shape(node.inputs[0])[1:]
    weight, scale = to.weight(node, (-1, channels))
    source = _flat(to, f'{label}.flat', to.value(node.inputs[0]))
    made = real(to, node, 'Gemm', [_layer_input(to, source, scale, label), weight, *to.bias(node, scale)], transB=1)
    return _rows(to, f'{label}.out', made, [-1, int(node.attrs['num_filter']), *places])


@writes('Deconvolution')
def deconvolution(to, node):
    axes = len(integers(node.attrs['kernel']))
    if integers(node.attrs.get('target_shape', '')):
        raise to.refused(node, 'its target_shape takes the place of pads; give pads')
    weight, scale = to.weight(node)
    adj = sizes(node, 'adj', axes, 0)
    return real(to, node, 'ConvTranspose', [to.real(to.value(node.inputs[0])), weight, *to.bias(node, scale)],
                kernel_shape=sizes(node, 'kernel', axes), group=int(node.attrs.get('num_group', 1)),
                output_padding=adj if any(adj) else None, **window_of(node, axes))


@writes('FullyConnected')
def fully_connected(to, node):
    weight, scale = to.weight(node)
    bias, source, shape = to.bias(node, scale), to.value(node.inputs[0]), to.shape(node.inputs[0])
    label, wide = to.net.label(node), node.attrs.get('flatten', 'True') not in ('True', 'true', '1')
    if wide and len(shape) != 2:        # every row by itself
        source = _rows(to, f'{label}.rows', source, [-1, shape[-1]])
    elif len(shape) != 2:
        source = _flat(to, f'{label}.flat', source)
    made = real(to, node, 'Gemm', [_layer_input(to, source, scale, label), weight, *bias], transB=1)
    if wide and len(shape) != 2:
        return _rows(to, f'{label}.out', made, [size or -1 for size in to.shapes[node, 0]])
    return made


def _flat(to, name, source):
    return Moved(name, (source,), lambda free, sources, grid: to.write('Flatten', sources, free, axis=1))


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
    inputs = real_inputs(to, node)
    if node.attrs.get('fix_gamma', 'True') in ('True', 'true', '1'):
        gamma = to.net.parameter(node.inputs[1].node.name)
        inputs[1] = to.constant(f'{to.net.label(node)}.gamma', np.ones(gamma.shape, np.float32))
    return real(to, node, 'BatchNormalization', inputs, epsilon=float(node.attrs.get('eps', 1e-3)))


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
            return moved(to, node, 'MaxPool', kernel_shape=list(shape[2:]), strides=[1] * axes)
        return real(to, node, 'GlobalAveragePool', [to.real(to.value(node.inputs[0]))])
    kernel, window = sizes(node, 'kernel', axes), window_of(node, axes)
    del window['dilations']
    full = node.attrs.get('pooling_convention', 'valid')
    if full not in ('valid', 'full'):
        raise to.refused(node, f'ONNX has no pooling convention {full!r}')
    extra = _overhang(shape[2:], kernel, window, full == 'full')
    if any(pad + more >= wide for pad, more, wide in zip(window['pads'][axes:], extra, kernel)):
        raise to.refused(node, f'its last window of size {tuple(kernel)} sees pads only')
    counted = any(window['pads'])
    window['pads'] = [*window['pads'][:axes], *(size + more for size, more in zip(window['pads'][axes:], extra))]
    if kind == 'max':
        return moved(to, node, 'MaxPool', kernel_shape=kernel, **window)
    included = node.attrs.get('count_include_pad', 'True') in ('True', 'true', '1')
    if any(extra) and included and counted:
        raise to.refused(node, 'it counts pads and its last window reaches beyond them')
    included = included and not any(extra)      # beyond the pads nothing counts
    return real(to, node, 'AveragePool', [to.real(to.value(node.inputs[0]))], kernel_shape=kernel,
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
        return real(to, node, 'GlobalAveragePool', [source])
    if height % rows == 0 and width % columns == 0:
        window = [height // rows, width // columns]
        return real(to, node, 'AveragePool', [source], kernel_shape=window, strides=window)
    label = to.net.label(node)      # windows differ in size and overlap: the mean over each axis is a matrix
    right = to.constant(f'{label}.columns', _means(width, columns).T)
    inner = to.write('MatMul', [source, right], to.free(f'{label}.narrowed'))
    return real(to, node, 'MatMul', [to.constant(f'{label}.rows', _means(height, rows)), inner])


def _means(size, count):
    """The matrix (count, size) that averages over the windows of adaptive pooling."""
    matrix = np.zeros((count, size), np.float32)
    for number in range(count):
        window = slice(number * size // count, -(-(number + 1) * size // count))
        matrix[number, window] = 1 / len(matrix[number, window])
    return matrix
