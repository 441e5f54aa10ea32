"""Writers of activations and of arithmetic."""
import math

from ..symbol_graph import integers
from .table import indices, real, real_inputs, writes
from .values import Clamped, Moved, Real


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
    return real(to, node, known[kind], real_inputs(to, node))


@writes('LeakyReLU')
def leaky_relu(to, node):
    kind, slope = node.attrs.get('act_type', 'leaky'), float(node.attrs.get('slope', 0.25))
    source = to.real(to.value(node.inputs[0]))
    if kind == 'leaky':
        return real(to, node, 'LeakyRelu', [source], alpha=slope)
    if kind == 'elu':
        return real(to, node, 'Elu', [source], alpha=slope)
    if kind == 'selu':
        return real(to, node, 'Selu', [source], alpha=1.6732632423543772, gamma=1.0507009873554805)
    if kind == 'prelu':
        slopes = to.net.compute(node.inputs[1]).asnumpy().reshape([-1] + [1] * (len(to.shape(node.inputs[0])) - 2))
        return real(to, node, 'PRelu', [source, to.constant(f'{to.net.label(node)}.slope', slopes)])
    if kind == 'gelu':
        label = to.net.label(node)
        inner = to.write('Div', [source, to.number(math.sqrt(2))], to.free(f'{label}.scaled'))
        inner = to.write('Erf', [inner], to.free(f'{label}.erf'))
        inner = to.write('Add', [inner, to.number(1)], to.free(f'{label}.shifted'))
        inner = to.write('Mul', [inner, to.number(0.5)], to.free(f'{label}.share'))
        return real(to, node, 'Mul', [source, inner])
    raise to.refused(node, f'ONNX has no activation {kind!r}')


@writes('hard_sigmoid')
def hard_sigmoid(to, node):
    return real(to, node, 'HardSigmoid', real_inputs(to, node), alpha=float(node.attrs.get('alpha', 0.2)),
                 beta=float(node.attrs.get('beta', 0.5)))


@writes('softmax', 'log_softmax')
def softmax(to, node):
    if len(node.inputs) > 1 or node.attrs.get('temperature', 'None') not in ('None', '1.0', '1'):
        raise to.refused(node, 'ONNX has no softmax with a length or a temperature')
    return real(to, node, 'Softmax' if node.op == 'softmax' else 'LogSoftmax', real_inputs(to, node),
                 axis=int(node.attrs.get('axis', -1)))


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
    return real(to, node, _BINARY[node.op], real_inputs(to, node))


@writes(*_UNARY)
def unary(to, node):
    return real(to, node, _UNARY[node.op], real_inputs(to, node))


@writes(*_SCALAR, *_REVERSED)
def scalar(to, node):
    inputs = [*real_inputs(to, node), to.number(float(node.attrs['scalar']))]
    if node.op in _REVERSED:
        return real(to, node, _REVERSED[node.op], inputs[::-1])
    return real(to, node, _SCALAR[node.op], inputs)


@writes('add_n')
def add_n(to, node):
    total, *others = real_inputs(to, node)
    for other in others:
        total = to.write('Add', [total, other], to.name(node))
    return Real(total)


@writes('square')
def square(to, node):
    return real(to, node, 'Mul', real_inputs(to, node) * 2)


@writes('ones_like', 'zeros_like')
def filled(to, node):
    """A number; one that meets tensors of its shape need not have it."""
    value = float(node.op == 'ones_like')
    if all(reader.op in _BINARY and reader.inputs[0].node is not reader.inputs[1].node
           for reader in to.net.graph.readers(node)):
        return Real(to.number(value))
    zeros = to.write('Mul', [*real_inputs(to, node), to.number(0)], to.name(node))
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
        return real(to, node, 'ReduceSum', [source, indices(to, node, 'axes', axes)], keepdims=keep)
    op = f'Reduce{node.op.capitalize()}'
    if to.opset >= 18:
        return real(to, node, op, [source, indices(to, node, 'axes', axes)], keepdims=keep)
    return real(to, node, op, [source], axes=axes, keepdims=keep)


@writes('L2Normalization')
def l2_normalization(to, node):
    mode, ndim = node.attrs.get('mode', 'instance'), len(to.shape(node.inputs[0]))
    axes = {'instance': list(range(1, ndim)), 'channel': [1], 'spatial': list(range(2, ndim))}[mode]
    label, source = to.net.label(node), to.real(to.value(node.inputs[0]))
    squares = to.write('Mul', [source, source], to.free(f'{label}.squares'))
    total = to.write('ReduceSum', [squares, indices(to, node, 'axes', axes)], to.free(f'{label}.sum'), keepdims=1)
    total = to.write('Add', [total, to.number(float(node.attrs.get('eps', 1e-10)))], to.free(f'{label}.guarded'))
    norm = to.write('Sqrt', [total], to.free(f'{label}.norm'))
    return real(to, node, 'Div', [source, norm])


@writes('LRN')
def local_response(to, node):
    return real(to, node, 'LRN', real_inputs(to, node), size=int(node.attrs['nsize']),
                 alpha=float(node.attrs.get('alpha', 1e-4)), beta=float(node.attrs.get('beta', 0.75)),
                 bias=float(node.attrs.get('knorm', 2)))
