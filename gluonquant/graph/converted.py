"""Tracing a net that `convert` has changed: the quantizers of its layers become nodes of the graph."""
import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import mxnet as mx

from ..layers import layers
from ..symbol_graph import FOLDED, QUANTIZE
from .names import bound_variable
from .nested import graphs

_MARK = '__gluonquant__'


@contextmanager
def marked(net):
    """For a while, quantizers of ``net`` leave marks in symbols, and layers do no more than infer.

    A BatchNorm that is folded into a layer stands behind it again. Yields {path: (quantizer, what makes its like)}.
    """
    marks, undo, inner = {}, [], graphs(net)
    for path, layer in layers(net).items():
        for role, quantizer in (('weight', layer.weight_quantizer), ('input', layer.input_quantizer)):
            name = f'{path}.{role}_quantizer'
            if 'forward' not in quantizer.__dict__:     # else it is shared, and has the name of its first layer
                marks[name] = quantizer, _spec(layer, role)
                quantizer.forward = lambda x, name=name: mx.sym.identity(x, attr={_MARK: name})
        undo.append((layer, layer.config, layer._norm))
        layer.only_infers = True
        layer.config = replace(layer.config, gradient_bits=None)
        if layer._norm is not None:
            norm, layer.__dict__['_norm'] = layer._norm, None
            norm.__dict__['_folded_class'], norm.__class__ = type(norm), norm._float_class
    whole = {part: part.graph for part in inner.values()}
    for path, part in inner.items():
        part.graph, part._nodes, part.only_infers = _unfolded(part.graph), {}, True
        for node in part.graph.nodes():
            if node.op == QUANTIZE and f"{path}.{node.attrs['quantizer']}" not in marks:
                name, quantizer = f"{path}.{node.attrs['quantizer']}", part._children[node.attrs['quantizer']]
                marks[name] = quantizer, node.attrs['spec']
                quantizer.forward = lambda x, name=name: mx.sym.identity(x, attr={_MARK: name})
    try:
        yield marks
    finally:
        for part, graph in whole.items():
            part.graph, part._nodes = graph, {}
            del part.only_infers
        for quantizer, _ in marks.values():
            del quantizer.forward
        for layer, config, norm in undo:
            layer.config = config
            del layer.only_infers
            if norm is not None:
                layer.__dict__['_norm'] = norm
                norm.__class__ = norm.__dict__.pop('_folded_class')


def _unfolded(graph):
    graph = graph.copy()
    for node in graph.nodes():
        if node.op == FOLDED:
            graph.unfold(node)
    return graph


def _spec(layer, role):
    """The JSON from which `GraphNet` makes the quantizer of a layer's weight or input anew."""
    described = {**asdict(layer.config.weight if role == 'weight' else layer.config.activation),
                 'role': 'weight' if role == 'weight' else 'activation'}
    if role == 'weight':
        described['axis'] = layer.weight_axis
        described['options'] = {name: value for name, value in described['options'].items() if name != 'axis'}
    return json.dumps(described, default=lambda number: number.item())


def place_quantizers(graph, marks):
    """Make nodes of quantizers of the marks in ``graph``; returns {path: Quantizer}."""
    found = {}
    for node in graph.nodes():
        path = node.attrs.pop(_MARK, None)
        if path is not None:
            quantizer, spec = marks[path]
            node.op, node.attrs, node.name = QUANTIZE, {'quantizer': path, 'spec': spec}, graph.free_name(path)
            found[path] = quantizer
    return found


def fold_again(graph, net):
    """Fold those BatchNorms of ``graph`` that are folded in ``net``."""
    weights = {layer.weight.name for layer in layers(net).values() if layer._norm is not None}
    weights.update(bound_variable(node.inputs[1]) for part in graphs(net).values() for node in part.graph.nodes()
                   if node.op == FOLDED)
    for node in graph.nodes():
        if node.op in ('Convolution', 'FullyConnected', 'Deconvolution') and weights:
            weight = node.inputs[1].node
            weight = weight.inputs[0].node if weight.op == QUANTIZE else weight
            if weight.name in weights:
                graph.fold(node, graph.readers(node)[0])
