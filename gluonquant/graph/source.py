"""Where a graph comes from: a block that can be traced, a symbol, files."""
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, SymbolBlock
from mxnet.gluon.block import _flatten

from ..layers import layers, quantizers
from ..registry import nearest
from ..symbol_graph import FOLDED, TWIN, VARIABLE, Graph, integers
from ..trace import LAYER_OPS, renew_variables
from .converted import fold_again, marked, place_quantizers
from .names import layer_path, scope_of, short_name
from .net import ONLY_INFERS, GraphNet, Training
from .parameters import make_parameters

# What Gluon's layers start with, by place; None: what the net is initialized with.
_INITIALIZERS = {**dict.fromkeys(('Convolution', 'Deconvolution', 'FullyConnected'), (None, None, 'zeros')),
                 'BatchNorm': (None, 'ones', 'zeros', 'zeros', 'ones')}


@dataclass
class Source:
    """The arguments of a `GraphNet`, before anything is quantized."""
    graph: Graph
    parameters: Dict[str, Any]
    inputs: List[str]
    paths: Dict[str, str]
    form: Any = None
    scope: Dict[str, str] = field(default_factory=dict)
    training: Any = None        # see `GraphNet`

    def net(self, decisions=(), known=None):
        """The `GraphNet`."""
        return GraphNet(self.graph, self.parameters, self.inputs, self.paths, self.form, self.scope, decisions,
                        self.training, known)

    def shapes(self):
        """{name: shape} of the Parameters whose shape is known."""
        return {name: parameter.shape for name, parameter in self.parameters.items()
                if parameter.shape and all(size > 0 for size in parameter.shape)}

    def label(self, node):
        """See `short_name`; that of the node it stands for in training."""
        return short_name(node.attrs.get(TWIN, node.name), self.scope)

    def path(self, node):
        """The path of the layer that a node belongs to, or its label."""
        return layer_path(node, self.paths) or self.label(node)


def read(net, params=None, inputs='data', training_inputs=None):
    """The `Source` of what `attach` is given.

    Parameters
    ----------
    net : HybridBlock, Symbol, Graph, str
        A str is the path of a ``*-symbol.json`` file.
    params : str or dict, optional
        With anything but a block: the path of a ``.params`` file, or {name: NDArray}; names may begin with 'arg:' and
        'aux:'. None: Parameters without values.
    inputs : str or sequence of str
        Names of the tensors that are passed; for a block, as many as it takes.
    training_inputs : str or sequence of str, optional
        Of a block that takes others in training.

    Raises
    ------
    ValueError
        See `Graph.read`; a Parameter that the file does not have, or has in another shape.
    """
    inputs = _names(inputs)
    if isinstance(net, Block) and not isinstance(net, (GraphNet, SymbolBlock)):
        _check_float(net)
        return _traced(net, inputs, _names(training_inputs, inputs))
    if training_inputs is not None:
        raise ValueError(f'training_inputs={training_inputs!r}: a {type(net).__name__} has no other graph for training '
                         'than the one in it')
    if isinstance(net, GraphNet):
        return _again(net)
    if isinstance(net, SymbolBlock):
        return _from_symbol_block(net)
    if isinstance(net, (str, os.PathLike)):
        try:
            with open(net, encoding='utf8') as file:
                graph = Graph.read(file.read())
        except ValueError as error:
            raise ValueError(f'{net}: {error}') from None
    elif isinstance(net, mx.sym.Symbol):
        graph = Graph.read(net.tojson(remove_amp_cast=False))
    elif isinstance(net, Graph):
        graph = net.copy()
    else:
        raise TypeError(f'net is a {type(net).__name__}: pass a HybridBlock, a Symbol, or the path of a symbol file')
    arrays = _arrays(params)
    return Source(graph, _parameters(graph, arrays, inputs), inputs, {})


def as_graph(net, params=None, inputs='data'):
    """A net as a `GraphNet`, which shares its Parameters.

    Of a float net, symbol or symbol file: one that `gluonquant.fold` merges, `draw` draws and `attach` quantizes. Of a
    net that `convert` has changed: one that shares its quantizers, too. Arguments and errors as for `read`.
    """
    if isinstance(net, Block) and not isinstance(net, GraphNet) and quantizers(net):
        with marked(net) as marks:
            found = _traced(net, _names(inputs))
            if _include_training(found.graph.copy(), net, found.inputs, found.inputs) is not None:
                found.training = ONLY_INFERS
        known = place_quantizers(found.graph, marks)
        fold_again(found.graph, net)
        made = found.net(known=known)
        made.hybridize(False)
        return made
    return read(net, params, inputs).net()


def inference_graph(net, inputs='data'):
    """A net as a `GraphNet` that shares its Parameters and quantizers, of what it does in inference only."""
    return net.inference() if isinstance(net, GraphNet) else as_graph(net, inputs=inputs)


def _names(inputs, default=None):
    return default if inputs is None else [inputs] if isinstance(inputs, str) else list(inputs)


def _again(net):
    if net._children:
        raise RuntimeError('quantizers are attached already: attach to the float net instead')
    if any(node.op == FOLDED for node in net.graph.nodes()):
        raise RuntimeError('BatchNorm is folded already: attach first, then fold')
    return Source(net.graph.copy(), {name: net.parameter(name) for name in net.paths}, net.inputs, net.paths, net.form,
                  net.scope, net.training)


def _from_symbol_block(block):
    inputs, out = block._cached_graph
    graph, names = Graph.of(out), [symbol.name for symbol in inputs]
    known = block.collect_params()
    parameters = {name: known[name] for name in graph.variables() if name not in names}
    paths = {parameter.name: path for path, parameter in block._collect_params_with_prefix().items()}
    begins = {name[:-len(path)] for name, path in paths.items() if name.endswith(path)}     # all names with it
    scope = {begin: '' for begin in begins if begin and len(begins) == 1}
    _note_shapes(graph, parameters)
    return Source(graph, parameters, names, {name: paths[name] for name in parameters}, block._out_format, scope)


def _check_float(net):
    if layers(net):
        raise RuntimeError(f'the net is already converted: {next(iter(layers(net)))!r} is quantized. Attach to a fresh '
                           'float net instead')
    if quantizers(net):
        raise RuntimeError(f'quantizers are attached already: the net has {next(iter(quantizers(net)))!r}. Attach to a '
                           'fresh float net instead')


def _traced(net, inputs, training_inputs=None):
    """The `Source` of a block; with ``training_inputs``, of what it does in training, too."""
    if not isinstance(net, HybridBlock):
        raise TypeError(f'{type(net).__name__} is no HybridBlock, so there is no graph. Use gq.convert')
    try:
        with autograd.pause(train_mode=False):
            graph, form = _graph_of(net, inputs)
    except Exception as error:      # any net code may run here, and fail in its own way
        raise ValueError(f'{type(net).__name__} cannot be traced with the inputs {", ".join(inputs)} '
                         f'({type(error).__name__}: {error}). Name its inputs with inputs=(...), or use gq.convert'
                         ) from error
    training = _include_training(graph, net, inputs, training_inputs) if training_inputs is not None else None
    known = {parameter.name: parameter for parameter in net.collect_params().values()}
    parameters = {name: known[name] for name in graph.variables() if name in known}
    given = [*inputs, *(training_inputs or ())]
    missing = [name for name in graph.variables() if name not in known and name not in given]
    if missing:
        raise ValueError(f'{missing[0]!r} is neither a Parameter of the net nor one of the inputs {given}')
    _note_shapes(graph, parameters)
    paths = {}
    for path, parameter in net._collect_params_with_prefix().items():
        paths.setdefault(parameter.name, path)
    return Source(graph, parameters, inputs, {name: paths[name] for name in parameters}, form,
                  scope_of(net), training)


def _note_shapes(graph, parameters):
    """Of Parameters whose shape a SymbolBlock left open, note what is known of it.

    These are the shapes of loaded arrays, which Gluon does not note, and what operators tell of the others: quantizers
    of weights need to know how many axes there are.
    """
    left_open = {name: parameter for name, parameter in parameters.items() if not parameter.shape}
    told = _known(graph)[0] if left_open else {}
    for name, parameter in left_open.items():
        parameter.shape = parameter.list_data()[0].shape if parameter._data is not None else told.get(name)


def _graph_of(net, inputs):
    try:
        out = net(*(mx.sym.var(name) for name in inputs))
        flat, form = _flatten(out, 'output')
    finally:
        renew_variables(net)
    return Graph.of(mx.sym.Group(flat)), form


def _include_training(graph, net, inputs, training_inputs):
    """Let ``graph`` return what ``net`` returns in training, too, if that is something else; see `GraphNet`."""
    try:
        with autograd.record():
            other, form = _graph_of(net, training_inputs)
        known = {*training_inputs, *(parameter.name for parameter in net.collect_params().values())}
        for name in other.variables():      # None is a variable to operators
            if name not in known:
                raise ValueError(f'{name} is missing')
    except Exception as error:      # it may need targets there, for example
        if training_inputs != inputs:
            raise ValueError(f'{type(net).__name__} cannot be traced in training with the inputs '
                             f'{", ".join(training_inputs)} ({type(error).__name__}: {error})') from error
        return (f'it cannot be traced with {", ".join(inputs)} there ({type(error).__name__}: {error}). Name what it '
                'takes: gq.attach(net, training_inputs=(...))')
    before = len(graph.nodes()), len(graph.heads.inputs)
    graph.include(other)
    if training_inputs == inputs and len(graph.nodes()) == before[0] and \
            graph.heads.inputs[:before[1]] == graph.heads.inputs[before[1]:]:
        graph.connect(graph.heads, graph.heads.inputs[:before[1]])
        return None
    return Training(training_inputs, form, len(other.heads.inputs))


def _arrays(params):
    if params is None:
        return None
    if not isinstance(params, dict):
        path = os.fspath(params)
        with open(path, 'rb'):          # FileNotFoundError, which MXNet would hide
            pass
        try:
            params = mx.nd.load(path)
        except mx.MXNetError as error:
            raise ValueError(f'{path}: not a file of parameters ({str(error).strip().splitlines()[-1]})') from None
        if not isinstance(params, dict):
            raise ValueError(f'{path}: the arrays in it have no names')
    return {_name(name): _array(name, array) for name, array in params.items()}


def _name(name):
    if not isinstance(name, str):
        raise TypeError(f'params has the key {name!r}: pass names of variables')
    return name.split(':', 1)[-1]


def _array(name, array):
    if not isinstance(array, (mx.nd.NDArray, np.ndarray)):
        raise TypeError(f'params[{name!r}] is a {type(array).__name__}, not an array')
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f'params[{name!r}] holds {np.dtype(array.dtype)}, not real numbers')
    if isinstance(array, mx.nd.NDArray):
        return array
    return mx.nd.array(array, dtype='float32' if array.dtype == np.float64 else array.dtype)


def _parameters(graph, arrays, inputs):
    variables = graph.variables()
    if len(set(inputs)) < len(inputs):
        raise ValueError(f'inputs={inputs}: a name stands there twice')
    for name in inputs:
        if name not in variables:
            raise ValueError(f'the graph has no input {name!r}.{nearest(name, variables)}')
    names = [name for name in variables if name not in inputs]
    if arrays is not None:
        for name in names:
            if name not in arrays:
                reader = graph.readers(variables[name])[0]
                raise ValueError(f'node {reader.name!r} ({reader.op}) reads {name!r}, for which there is no Parameter.'
                                 f'{nearest(name, arrays)} If it is passed as data, name it in inputs')
        check_shapes(graph, {name: arrays[name].shape for name in names})
    return make_parameters(graph, names, arrays, *_known(graph))


def _known(graph):
    """({name: shape}, {name: initializer}) of variables, as far as operators tell; 0 for an unknown size."""
    shapes, inits = {}, {}
    for node in graph.nodes():
        for entry, shape, init in zip(node.inputs, _expected(node), _INITIALIZERS.get(node.op, ())):
            if shape is not None:
                inits[entry.node.name] = init
                if all(shape[:1]):
                    shapes[entry.node.name] = shape
    return shapes, inits


def check_shapes(graph, shapes):
    """ValueError, with the name of the node, for a Parameter whose shape its operator does not take."""
    for node in graph.nodes():
        for place, expected in enumerate(_expected(node)):
            source = node.inputs[place].node if place < len(node.inputs) else None
            found = shapes.get(source.name) if source is not None and source.op == VARIABLE else None
            if expected is None or found is None:
                continue
            if len(found) != len(expected) or any(want not in (0, size) for want, size in zip(expected, found)):
                wanted = ', '.join(str(size or '?') for size in expected)
                raise ValueError(f'node {node.name!r} ({node.op}) reads {source.name!r} of shape {tuple(found)}, but '
                                 f'takes ({wanted})')


def _channels(layer, axis):
    """The size of ``axis`` of a layer's output; 0 if that is not known to be its channels."""
    wide = layer.op == 'FullyConnected' and str(layer.attrs.get('flatten', 'True')) not in ('True', 'true', '1')
    if layer.op not in LAYER_OPS or axis != 1 or wide or layer.attrs.get('layout', 'None')[:2] not in ('No', 'NC'):
        return 0
    return int(layer.attrs.get('num_filter', layer.attrs.get('num_hidden', 0)))


def _expected(node):
    """The shape of each input, 0 for sizes and None for shapes that the node's attributes do not tell."""
    attrs = node.attrs
    if node.op in ('Convolution', 'Deconvolution'):
        if attrs.get('layout', 'None') not in ('None', 'NCW', 'NCHW', 'NCDHW'):
            return []
        kernel, filters = integers(attrs['kernel']), int(attrs['num_filter'])
        channels = (filters, 0) if node.op == 'Convolution' else (0, filters // int(attrs.get('num_group', 1)))
        return [None, channels + kernel, (filters,)]
    if node.op == 'FullyConnected':
        hidden = int(attrs['num_hidden'])
        return [None, (hidden, 0), (hidden,)]
    if node.op == 'BatchNorm':
        return [None, *[(_channels(node.inputs[0].node, int(node.attrs.get('axis', 1))),)] * 4]
    return []
