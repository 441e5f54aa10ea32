"""BatchNorm in graphs: folded for training, merged into the Parameters for deployment."""
import mxnet as mx
import numpy as np

from ..batchnorm import Layer, Settings, factor_and_shift, pairs
from ..symbol_graph import FOLDED, QUANTIZE, Entry


def merge(graph, arrays=None):
    """Merge each BatchNorm that stands behind a layer into the layer's weight and bias.

    Where the weight is quantized, codes and grid stay as they are: what comes out of the quantizer is multiplied by one
    factor per channel, which integer engines take into their scales. Where a BatchNorm is folded already, the quantizer
    sees the weight that it saw before.

    Parameters
    ----------
    graph : Graph, changed in place
    arrays : dict, {name of variable: array}, optional
        Values of the Parameters. None: the graph alone, for Parameters that have been merged elsewhere.

    Returns
    -------
    (dict, dict)
        Arrays that are new or changed, {name: float32 array}, empty without ``arrays``; and what became of each
        BatchNorm, {name: sentence}.

    Raises
    ------
    ValueError
        ``arrays`` lacks a Parameter; the node is named. Nothing is changed then.
    """
    changed, told = {}, {}
    found, refused = pairs(graph)
    if arrays is not None:
        folded = [node for node in graph.nodes() if node.op == FOLDED]
        for node in [*folded, *(node for pair in found for node in pair)]:
            for entry in node.inputs[1:]:
                source = entry.node.inputs[0].node if entry.node.op == QUANTIZE else entry.node
                if source.name not in arrays:
                    raise ValueError(f'node {node.name!r} reads {source.name!r}, for which there is no array')
    for node, reason in refused.items():
        told[node.name] = f'stays: {reason}'
    ready = [(layer, norm, False) for layer, norm in found]
    ready += [(*graph.unfold(node), True) for node in graph.nodes() if node.op == FOLDED]
    for layer, norm, folded in ready:
        changed.update(_merge_pair(graph, layer, norm, folded, arrays))
        told[norm.name] = f'merged into {layer.name!r}'
    return changed, told


def _merge_pair(graph, layer, norm, folded, arrays):
    geometry, settings = Layer.of(layer.op, layer.attrs), Settings.of(norm.attrs)
    weight, bias = layer.inputs[1], layer.inputs[2] if len(layer.inputs) > 2 else None
    quantized = weight.node.op == QUANTIZE
    source = weight.node.inputs[0].node if quantized else weight.node
    name = bias.node.name if bias else _bias_name(source, layer)
    if bias is None or len(graph.readers(bias.node)) > 1:
        bias = Entry(graph.add('null', name, []))
    names = [source.name, layer.inputs[2].node.name if len(layer.inputs) > 2 else None,
             *(entry.node.name for entry in norm.inputs[1:])]
    layer.attrs['no_bias'] = 'False'
    scaled, changed = None, {}
    if arrays is not None:
        values = [None if key is None else _float64(arrays[key]) for key in names]
        factor, shift = factor_and_shift(settings, *values[2:], bias=values[1])
        dtype = arrays[source.name].dtype
        changed[bias.node.name] = shift.astype(dtype)
        factor = factor.reshape(geometry.along_weight)
    if quantized and not folded:
        scaled = graph.add('null', f'{layer.name}_factor', [])
        weight = Entry(graph.add('broadcast_mul', f'{layer.name}_scaled', [weight, Entry(scaled)]))
        if arrays is not None:
            changed[scaled.name] = factor.astype(dtype)
    elif arrays is not None:
        changed[source.name] = (values[0] * factor).astype(dtype)
    graph.connect(layer, [layer.inputs[0], weight, bias])
    graph.redirect(Entry(norm), Entry(layer))
    return changed


def _bias_name(weight, layer):
    return f'{weight.name[:-len("weight")]}bias' if weight.name.endswith('weight') else f'{layer.name}_bias'


def _float64(array):
    array = array.asnumpy() if isinstance(array, mx.nd.NDArray) else np.asarray(array)
    return array.astype('float64')
