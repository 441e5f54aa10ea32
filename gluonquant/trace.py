"""What the traced symbol tells about a net's layers: their order, what they read, whether it can be negative."""
import logging
from collections import namedtuple

import mxnet as mx

from .symbol_graph import VARIABLE, Graph

_log = logging.getLogger(__name__)

Reading = namedtuple('Reading', 'order tensor nonnegative uses last', defaults=(False,))
Reading.__doc__ = """One layer's place in the graph.

order : int, position in topological order.   tensor : Entry, what it reads; None if several or unknown.
nonnegative : bool, whether everything it reads is provably >= 0.   uses : int, how often it is called in one pass;
0 if it is not part of the graph.   last : bool, whether no other layer depends on it, see `last_layers`."""

LAYER_OPS = ('Convolution', 'Deconvolution', 'FullyConnected')
# Never negative, whatever goes in.
_POSITIVE = {'relu', 'sigmoid', 'softmax', 'abs', 'square', 'exp', 'sqrt', 'hard_sigmoid', 'ones_like', 'zeros_like',
             '_ones', '_zeros', 'softmax_cross_entropy'}
# Not negative if no input is.
_KEEPING = {'Pooling', 'Concat', 'elemwise_add', 'broadcast_add', 'broadcast_plus', '_plus', '_Plus', 'add_n',
            'ElementWiseSum', '_sum', 'elemwise_mul', 'broadcast_mul', '_mul', '_Mul', 'elemwise_div',
            'broadcast_div', 'Flatten', 'Reshape', 'reshape', 'transpose', 'SwapAxis', 'swapaxes', 'Dropout',
            'identity', '_copy', 'BlockGrad', 'Cast', 'amp_cast', 'expand_dims', 'squeeze', 'slice', 'slice_axis',
            'slice_like', 'SliceChannel', 'split', 'stack', 'tile', 'repeat', 'mean', 'sum', 'max', 'min',
            'UpSampling', '_contrib_AdaptiveAvgPooling2D', '_contrib_BilinearResize2D', 'broadcast_like',
            'broadcast_maximum', 'broadcast_minimum', 'broadcast_to', 'broadcast_axis', 'reshape_like'}
_ACTIVATIONS = {'relu', 'sigmoid', 'softrelu'}
# What makes maps of activations of maps of activations.
_MAPS = {'BatchNorm', 'LayerNorm', 'InstanceNorm', 'L2Normalization', 'Activation', 'relu', 'clip', 'LeakyReLU',
         'Pooling', 'Concat', 'elemwise_add', 'broadcast_add', 'add_n', 'elemwise_mul', 'broadcast_mul', 'mean',
         'Dropout', '_copy', 'identity', 'Pad', 'pad', 'UpSampling', '_contrib_AdaptiveAvgPooling2D',
         '_contrib_BilinearResize2D', 'slice_like', '_contrib_ROIAlign', 'ROIPooling', 'BlockGrad', 'Cast', 'amp_cast'}
# Slots of the inputs whose values count, of operators that read only the shape of others,
_BUT_SHAPES = {**dict.fromkeys(('slice_like', 'broadcast_like', 'reshape_like'), (0,)),
               **dict.fromkeys(('zeros_like', 'ones_like', 'shape_array', 'size_array'), ())}
# and of those that read others to know where to look.
_BUT_PLACES = {**dict.fromkeys(('take', 'batch_take', 'pick', 'gather_nd', 'SequenceMask', '_contrib_boolean_mask',
                                'ROIPooling', '_contrib_ROIAlign', '_contrib_RROIAlign', '_contrib_PSROIPooling',
                                '_contrib_DeformablePSROIPooling'), (0,)),
               **dict.fromkeys(('argmax', 'argmin', 'argsort', 'one_hot'), ()), 'where': (1, 2), 'Embedding': (1,)}


def trace(net):
    """{weight Parameter name: Reading} of the layers of ``net``; {} if it cannot be traced with one input.

    Only blocks whose ``hybrid_forward`` accepts symbols can be traced; shapes are not needed.
    """
    graph, error = traced(net)
    if graph is None:
        _log.info('%s cannot be traced (%s): its inputs count as signed, its layers as ordered by registration',
                  type(net).__name__, error)
        return {}
    positive, last = nonnegative(graph), last_layers(graph)
    found = {}
    for node in graph.nodes():
        if node.op in LAYER_OPS:
            data, weight = node.inputs[:2]
            name = weight.node.name
            reading = Reading(len(found), data, positive[data.node], 1, node in last)
            if name in found:       # a layer called twice, or a shared weight
                before = found[name]
                reading = Reading(before.order, data if data == before.tensor else None,
                                  before.nonnegative and reading.nonnegative, before.uses + 1,
                                  before.last or reading.last)
            found[name] = reading
    return found


def traced(net):
    """(Graph, None) of a net with one input, or (None, why it cannot be traced)."""
    try:
        return Graph.of(_group(net(mx.sym.var('data')))), None
    except Exception as error:      # any net code may run here, and fail in its own way: then nothing is known
        return None, f'{type(error).__name__}: {error}'
    finally:
        renew_variables(net)


def renew_variables(net):
    """Let Parameters make their variables anew: a variable keeps the shape that was known when it was made."""
    for parameter in net._collect_params_with_prefix().values():
        parameter._var = None


def _group(out):
    if isinstance(out, mx.sym.Symbol):
        return out
    parts = []
    for part in out:
        parts.extend(_group(part) if not isinstance(part, mx.sym.Symbol) else [part])
    return mx.sym.Group(parts)


def last_layers(graph):
    """The layers that no other layer depends on: the last Dense of a classifier, all the heads of a detector.

    Where a region proposal says to look is no dependence.
    """
    leading = leads(graph)
    return {node for node in graph.nodes() if node.op in LAYER_OPS and node not in leading}


def leads(graph):
    """The nodes whose values a layer depends on."""
    found = set()
    for node in reversed(graph.nodes()):
        if node.op in LAYER_OPS or node in found:
            found.update(entry.node for entry in values(node))
    return found


def decisions(graph):
    """Nodes that only decode and select what layers have predicted, as a detector's boxes are: no layer depends on
    them, and what they read has been reshaped, squashed or cut since it left a layer.
    """
    leading, behind, maps, found = leads(graph), set(), set(), set()
    for node in graph.nodes():
        sources = {entry.node for entry in values(node)}
        if node.op in LAYER_OPS or sources & behind:
            behind.add(node)
        if node.op in (VARIABLE, *LAYER_OPS) or (node.op in _MAPS and sources & maps):
            maps.add(node)
        if node in behind and node.op not in LAYER_OPS and node not in leading and not sources & maps:
            found.add(node)
    return found


def values(node):
    """The inputs of a node whose values go into its output, not only their shape or a place that they name."""
    return _slots(node, _BUT_PLACES if node.op in _BUT_PLACES else _BUT_SHAPES)


def moves(node):
    """The inputs of a node on whose values, not only on whose shape, its output depends."""
    return _slots(node, _BUT_SHAPES)


def _slots(node, table):
    return [entry for slot, entry in enumerate(node.inputs) if slot in table.get(node.op, (slot,))]


def nonnegative(graph):
    """{node: whether all its outputs are provably >= 0}."""
    known = {}
    for node in graph.nodes():
        op, attrs = node.op, node.attrs
        inputs = [known[entry.node] for entry in node.inputs]
        if op in _POSITIVE or (op == 'Activation' and attrs.get('act_type') in _ACTIVATIONS):
            known[node] = True
        elif op == 'clip':
            known[node] = float(attrs['a_min']) >= 0
        elif op == '_maximum_scalar':
            known[node] = float(attrs['scalar']) >= 0 or inputs[0]
        elif op in ('_plus_scalar', '_mul_scalar', '_div_scalar'):
            known[node] = float(attrs['scalar']) >= 0 and inputs[0]
        elif op in ('Pad', 'pad'):
            known[node] = float(attrs.get('constant_value', 0)) >= 0 and inputs[0]
        else:
            known[node] = op in _KEEPING and bool(inputs) and all(inputs)
    return known
