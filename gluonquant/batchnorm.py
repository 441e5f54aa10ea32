"""BatchNorm folded into the layer before it: which can be, and the arithmetic, once for graphs and blocks.

With k = gamma / sqrt(var + eps), a layer with weight w and bias b and the BatchNorm behind it are the layer with weight
k w and bias (b - mean) k + beta. Sources: Jacob et al., arXiv:1712.05877; Krishnamoorthi, arXiv:1806.08342 (correction
to running statistics); Li et al., CVPR 2019 (frozen statistics).
"""
import json
from typing import NamedTuple

import numpy as np

from . import functional as Q
from .symbol_graph import QUANTIZE, VARIABLE, Node, integers
from .trace import LAYER_OPS


class Settings(NamedTuple):
    """What a BatchNorm is told: ``frozen`` = it uses its running statistics in training too."""
    eps: float
    momentum: float
    fix_gamma: bool
    frozen: bool

    @classmethod
    def of(cls, attrs):
        """From attributes of an operator, strings, or from the keywords of a block."""
        def says(name, default):
            return str(attrs.get(name, default)) in ('True', 'true', '1')
        return cls(float(attrs.get('eps', 1e-3)), float(attrs.get('momentum', 0.9)), says('fix_gamma', True),
                   says('use_global_stats', False))


class Layer(NamedTuple):
    """The geometry of a layer: which axis of the weight counts output channels, of how many axes; groups."""
    axis: int
    ndim: int
    groups: int = 1

    @classmethod
    def of(cls, op, attrs):
        """From the attributes of an operator."""
        if op == 'FullyConnected':
            return cls(0, 2)
        return cls(int(op == 'Deconvolution'), 2 + len(integers(str(attrs['kernel']))), int(attrs.get('num_group', 1)))

    @property
    def along_weight(self):
        """The shape in which a value per channel meets the weight."""
        return tuple(-1 if place == self.axis else 1 for place in range(self.ndim))

    @property
    def along_output(self):
        """The shape in which a value per channel meets the layer's output."""
        return tuple(-1 if place == 1 else 1 for place in range(self.ndim))


class Pair(NamedTuple):
    """A layer and the BatchNorm that reads its output, and nothing else does."""
    layer: Node
    norm: Node


def parts(node):
    """(operator, attributes) of the layer, and `Settings` of the BatchNorm, of a node made by `Graph.fold`."""
    layer, norm = json.loads(node.attrs['layer']), json.loads(node.attrs['norm'])
    return layer['op'], layer['attrs'], Settings.of(norm['attrs'])


def pairs(graph):
    """(list of Pair, {BatchNorm node: reason}): what can be folded in a graph, and why the others cannot."""
    found, refused = [], {}
    for node in graph.nodes():
        if node.op == 'BatchNorm':
            layer = node.inputs[0].node
            reason = _obstacle(graph, layer, node)
            if reason is None:
                found.append(Pair(layer, node))
            else:
                refused[node] = reason
    return found, refused


def _obstacle(graph, layer, node):
    if layer.op not in LAYER_OPS:
        return f'it reads {layer.name!r} ({layer.op}), which has no weight'
    others = [reader.name or 'the output of the net' for reader in graph.readers(layer) if reader is not node]
    if others or len(graph.readers(layer)) > 1:
        return f'{", ".join(map(repr, others)) or "it"} reads {layer.name!r} too'
    if any(entry.index for reader in graph.readers(node) for entry in reader.inputs if entry.node is node):
        return 'its mean or variance is read'
    if any(entry.node.op != VARIABLE for entry in [*layer.inputs[2:], *node.inputs[1:]]):
        return f'a Parameter of it, or the bias of {layer.name!r}, is computed'
    axis, layout = int(node.attrs.get('axis', 1)), layer.attrs.get('layout', 'None')
    wide = layer.op == 'FullyConnected' and str(layer.attrs.get('flatten', 'True')) not in ('True', 'true', '1')
    if wide or axis != 1 or layout not in ('None', 'NCW', 'NCHW', 'NCDHW'):
        return f'its axis {axis} is not known to be the channels of {layer.name!r}'
    weight = layer.inputs[1].node
    if weight.op == QUANTIZE and graph.readers(weight) == [layer]:
        weight = weight.inputs[0].node
    if weight.op != VARIABLE or graph.readers(weight)[1:]:
        return f'the weight of {layer.name!r} is computed, or shared with another layer'
    if graph.readers(node.inputs[1].node)[1:]:
        return 'its Parameters are shared with another'
    if layer.op == 'Deconvolution' and int(layer.attrs.get('num_group', 1)) > 1:
        return f'axis 1 of the weight of {layer.name!r} counts the channels of one group only'
    return None


def factor_and_shift(settings, gamma, beta, mean, var, bias=None):
    """k and the folded bias (b - mean) k + beta, in float64 from arrays (channels,)."""
    gamma, beta, mean, var = (np.asarray(array, dtype='float64') for array in (gamma, beta, mean, var))
    factor = (np.ones_like(gamma) if settings.fix_gamma else gamma) / np.sqrt(var + settings.eps)
    bias = np.zeros_like(mean) if bias is None else np.asarray(bias, dtype='float64')
    return factor, (bias - mean) * factor + beta


def folded_weight(F, geometry, settings, weight, gamma, var, dtype='float32'):
    """k w."""
    weight, gamma, var = _wide(F, dtype, weight, gamma, var)
    gamma, running = _gamma_and_deviation(F, settings, gamma, var)
    product = F.broadcast_mul(weight, F.reshape(gamma / running, shape=geometry.along_weight))
    # Adding zeros of the weight lets MXNet infer its shape from the layer, against the direction of the product.
    return _narrow(F, dtype, product + F.zeros_like(weight))


def _gamma_and_deviation(F, settings, gamma, var):
    return F.ones_like(gamma) if settings.fix_gamma else gamma, F.sqrt(F.BlockGrad(var) + settings.eps)


def _wide(F, dtype, *tensors):
    """Tensors in the type that a net of ``dtype`` folds in: BatchNorm is float32 in a net of float16."""
    if dtype == 'float32':
        return tensors
    wide = 'float64' if dtype == 'float64' else 'float32'
    return [None if tensor is None else F.cast(tensor, wide) for tensor in tensors]


def _narrow(F, dtype, tensor):
    return F.cast(tensor, dtype) if dtype == 'float16' else tensor


def folded(F, run, quantize, geometry, settings, x, weight, bias, gamma, beta, mean, var, dtype='float32'):
    """A layer and its BatchNorm with the folded weight quantized, differentiable in all of their Parameters.

    Frozen: run(x, quantize(k w)) + (b - mean) k + beta. Else the output is that of the batch's statistics, although the
    weight is quantized with the running ones, so that it does not jitter:
    run(x, quantize(k w)) sqrt(var + eps) / sqrt(var_B + eps) + beta - mean_B k_B; a second run, with the float weight,
    gives mean_B and var_B, and the running statistics are updated. Inference uses those.

    Parameters
    ----------
    run : callable(x, weight, bias or None), the layer
    quantize : callable(weight)
    geometry : Layer
    settings : Settings
    x : tensor; the others as the layer's and the BatchNorm's Parameters, bias may be None
    dtype : str, of the layer
    """
    quantized = quantize(folded_weight(F, geometry, settings, weight, gamma, var, dtype))
    states = mean, var
    bias, gamma, beta, mean, var = _wide(F, dtype, bias, gamma, beta, mean, var)
    gamma, running = _gamma_and_deviation(F, settings, gamma, var)
    factor = gamma / running
    centre = F.BlockGrad(mean) if bias is None else F.BlockGrad(mean) - bias
    if settings.frozen:
        return run(x, quantized, _narrow(F, dtype, beta - centre * factor))
    plain, = _wide(F, dtype, run(x, weight, None))
    batch_mean = F.mean(plain, axis=1, exclude=True)
    centred = F.broadcast_sub(plain, F.reshape(batch_mean, shape=geometry.along_output))
    batch_var = F.mean(F.square(centred), axis=1, exclude=True)
    flag, = _wide(F, dtype, Q.is_training(F))
    training = F.broadcast_mul(F.ones_like(running), flag)
    deviation = F.where(training, F.sqrt(batch_var + settings.eps), running)
    shift = beta - F.where(training, batch_mean, centre) * gamma / deviation
    seen_mean = batch_mean if bias is None else batch_mean + bias
    for state, old, seen in zip(states, (mean, var), (seen_mean, batch_var)):
        old, seen = F.BlockGrad(old), F.BlockGrad(seen)
        blended = settings.momentum * old + (1 - settings.momentum) * seen
        shift = shift + 0 * Q.assign(F, state, F.where(training, blended, old))
    out, = _wide(F, dtype, run(x, quantized, None))
    out = F.broadcast_mul(out, F.reshape(running / deviation, shape=geometry.along_output))
    return _narrow(F, dtype, F.broadcast_add(out, F.reshape(shift, shape=geometry.along_output)))
