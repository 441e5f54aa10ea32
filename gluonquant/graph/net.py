"""A graph with quantizers in it, as a block that trains."""
import copy
import json
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Optional

import mxnet as mx
import numpy as np
from mxnet.gluon import HybridBlock, Parameter, ParameterDict
from mxnet.gluon.block import _regroup

from .. import functional as Q
from .. import quantizers
from ..batchnorm import Layer, folded, folded_weight, pairs, parts
from ..fuse import FusedGraph
from ..registry import nearest
from ..symbol_graph import (
    BIAS,
    FOLDED,
    QUANTIZE,
    VARIABLE,
    Entry,
    Graph,
    Node,
    ancestors,
    evaluate,
    integers,
    invoke,
    numbered,
)
from ..trace import LAYER_OPS
from .fold import merge
from .names import bound_variable, layer_path, short_name
from .target import grids


class Decision(NamedTuple):
    """Why one input of a node is quantized, or not. ``quantizer`` is its path in the net; None: float."""
    node: str
    op: str
    input: str
    quantizer: Optional[str]
    reason: str


class GraphNet(FusedGraph, HybridBlock):
    """Runs a `Graph` whose quantizers are blocks: hybridizes, trains, saves and exports as any other net.

    `attach` makes it. Parameters are those of the float net, the same objects under the same names.

    Parameters
    ----------
    graph : Graph
        The nodes that are quantizers say which one by the attribute ``quantizer``, its path in this block, and how it
        is made by ``spec``, JSON for `quantizers.create`.
    parameters : dict, {name of a variable: Parameter}
    inputs : list of str
        The other variables, in the order in which tensors are passed.
    paths : dict, {name of a variable: path of the Parameter}, optional
        As in checkpoints of the float net; default: the names.
    form : nested list of int, optional
        How outputs are grouped, as Gluon notes it.
    scope : dict, {str: str}
        What the names of nodes begin with, and what people read in its place: names of blocks are numbered differently
        in each process.
    decisions : list of Decision
        What `explain` tells.
    known : dict, {path: Quantizer}, optional
        Quantizers to share with another net, where new ones are made by default.

    Inputs:  a tensor for each of ``inputs``.
    Outputs: those of the graph.
    """

    def __init__(self, graph, parameters, inputs, paths=None, form=None, scope=None, decisions=(), known=None):
        super().__init__(prefix='')             # Parameters keep their names
        self._own_prefix = mx.name.NameManager.current.get(None, 'graphnet') + '_'      # of the quantizers' Parameters
        self.graph = graph
        self.inputs = list(inputs)
        self.paths = {name: (paths or {}).get(name, name) for name in parameters}
        self.form = form
        self.scope = dict(scope or {})
        self.decisions = list(decisions)
        self._variables = {path: name for name, path in self.paths.items()}
        self._nodes, self._grids, self._prefixes = None, None, set()
        for name, parameter in parameters.items():
            self.params.update({parameter.name: parameter})
            self._reg_params[self.paths[name]] = parameter
        self._check_variables()
        for node in graph.nodes():
            if node.op == QUANTIZE or 'quantizer' in node.attrs:
                self._add_quantizer(node, known or {})
                self._children[node.attrs['quantizer']].tensors.append(short_name(node.inputs[0].node.name, self.scope))
        for node in graph.nodes():
            if node.op == BIAS:
                self._add_bias_quantizer(node)

    def _check_variables(self):
        variables = self.graph.variables()
        for name in self.inputs:
            if name not in variables or name in self.paths:
                raise ValueError(f'the graph has no input {name!r}.{nearest(name, variables)}')
        for name in variables:
            if name not in self.paths and name not in self.inputs:
                raise ValueError(f'variable {name!r} is neither a Parameter nor an input')

    def _add_quantizer(self, node, known):
        if node.attrs.get('quantizer') in self._children:
            return
        if node.attrs.get('quantizer') in known:
            self.register_child(known[node.attrs['quantizer']], node.attrs['quantizer'])
            return
        try:
            path, spec = node.attrs['quantizer'], json.loads(node.attrs['spec'])
            method, bits, options, role = (spec[name] for name in ('method', 'bits', 'options', 'role'))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'node {node.name!r} does not say how its quantizer is made ({type(error).__name__}: '
                             f'{error})') from None
        bound = None
        if role == 'weight':
            bound = self.parameter(bound_variable(node.inputs[node.op == FOLDED]))
            options['shape'] = tuple(max(size, 0) for size in bound.shape or ()) or None
        others = {name: value for name, value in spec.items() if name not in ('method', 'bits', 'options')}
        try:
            quantizer = quantizers.create(method, bits, prefix=self._free_prefix(path), **others, **options)
        except (ValueError, TypeError) as error:
            raise type(error)(f'{path}: {error}. Change it by a rule, or keep what reads it float with '
                              'exclude') from None
        if bound is not None:
            self._bind(node, quantizer, bound)
        like = next(iter(self.params.values()), None) if bound is None else bound
        for parameter in quantizer.params.values():
            parameter.like = like
        quantizer.nested, quantizer.where, quantizer.tensors = True, path, []
        self.register_child(quantizer, path)

    def _add_bias_quantizer(self, node):
        try:
            activation, weight = (self._children[node.attrs[name]] for name in ('activation', 'weight'))
        except KeyError as error:
            raise ValueError(f'node {node.name!r}: its bias lies on a grid that no quantizer tells ({error})') from None
        self.register_child(quantizers.BiasQuantizer(activation, weight), node.attrs['bias_quantizer'])

    def quantize_biases(self):
        """Put the bias of each layer whose input and weight are quantized on the grid of their products.

        See `BiasQuantizer`. Returns the nodes of the new quantizers.
        """
        made = []
        with self.rewriting() as graph:
            for node in graph.nodes():
                bias = node.inputs[2] if node.op in ('Convolution', 'FullyConnected') and len(node.inputs) > 2 else None
                weight, factor = self.weight_parts(node) if bias is not None else (None, None)
                activation = self.quantizer(node.inputs[0]) if weight is not None else None
                floats = activation is None or None in (activation.grid, self._children[weight.attrs['quantizer']].grid)
                if floats or bias.node.op == BIAS:
                    continue
                inputs = [bias, weight.inputs[0], *([factor] if factor else [])]
                added = graph.add(BIAS, f'{self.label(node)}.bias_quantizer', inputs, weight=weight.attrs['quantizer'],
                                  activation=self._path(activation))
                added.attrs['bias_quantizer'] = added.name
                graph.connect(node, [*node.inputs[:2], Entry(added)])
                self._add_bias_quantizer(added)
                made.append(added)
        return made

    def add_factor(self, layer, bias):
        """Multiply the weight of a layer, behind its quantizer, by a new Parameter, 1 for each output channel.

        ``bias`` is the node of the layer's bias quantizer. Returns the Parameter's Entry.
        """
        with self.rewriting() as graph:
            factor = Entry(graph.add(VARIABLE, f'{layer.name}_factor', []))
            scaled = graph.add('broadcast_mul', f'{layer.name}_scaled', [layer.inputs[1], factor])
            graph.connect(layer, [layer.inputs[0], Entry(scaled), *layer.inputs[2:]])
            graph.connect(bias, [*bias.inputs, factor])
            weight = self.parameter(bound_variable(layer.inputs[1]))
            shape = (weight.shape[0],) + (1,) * (len(weight.shape) - 1)
            self._take({factor.node.name: np.ones(shape, weight.dtype)})
        return factor

    def _path(self, quantizer):
        return next(path for path, child in self._children.items() if child is quantizer)

    @staticmethod
    def weight_parts(node):
        """(the quantizer's node in front of a layer's weight or None, the factor behind it or None)."""
        weight, factor = node.inputs[1], None
        if weight.node.op == 'broadcast_mul' and weight.node.inputs[0].node.op == QUANTIZE:
            weight, factor = weight.node.inputs
        return (weight.node, factor) if weight.node.op == QUANTIZE else (None, None)

    def _free_prefix(self, path):
        base = self._own_prefix + path.replace('.', '_')
        prefix = next(name for name in numbered(base) if name not in self._prefixes)
        self._prefixes.add(prefix)
        return f'{prefix}_'

    def cast(self, dtype):
        """As `HybridBlock.cast`; the Parameters of BatchNorm stay float32 in a net of float16."""
        super().cast(dtype)
        if np.dtype(dtype) == np.float16:
            for node in self.graph.nodes():
                for entry in node.inputs[-4:] if node.op in ('BatchNorm', FOLDED) else ():
                    self.parameter(entry.node.name).cast('float32')

    def _bind(self, node, quantizer, parameter):
        """Tell a quantizer of weights how the tensor in front of it comes from the Parameter."""
        if node.op == FOLDED:
            quantizer.bind(parameter, partial(self._folded_weight, node))
        elif node.inputs[0].node.op == VARIABLE:
            quantizer.bind(parameter)
        else:
            quantizer.bind(parameter, partial(self.compute, node.inputs[0]))

    def _folded_weight(self, node):
        values = [self.parameter(entry.node.name).data() for entry in [node.inputs[1], *node.inputs[-4:]]]
        op, attrs, settings = parts(node)
        with mx.autograd.pause():
            return folded_weight(mx.nd, Layer.of(op, attrs), settings, *values[:2], values[-1], self._dtype_of(node))

    def parameter(self, name):
        """The Parameter of a variable."""
        return self._reg_params[self.paths[name]]

    def quantizer(self, entry):
        """The quantizer on whose grid a tensor lies, or None: directly, or behind what only moves values."""
        if self._grids is None:
            self._grids = grids(self.graph)
        return self._children.get(self._grids.get(entry.node))

    def quantizers_of(self, node):
        """(quantizers of the inputs, None for float ones; quantizer of the weight, or None) of an operator."""
        if node.op == FOLDED:
            return [self.quantizer(node.inputs[0])], self._children.get(node.attrs.get('quantizer'))
        found = [self.quantizer(entry) for entry in node.inputs]
        return (found[:1], found[1]) if node.op in LAYER_OPS else (found, None)

    def label(self, node):
        """The name of a node as users read it: the path of the layer whose weight it reads, or its short name."""
        return layer_path(node, self.paths) or short_name(node.name, self.scope)

    def compute(self, entry):
        """The array of a tensor that depends on Parameters only."""
        nodes = ancestors([entry])
        values = {node.name: self.parameter(node.name).data() for node in nodes if node.op == VARIABLE}
        with mx.autograd.pause():
            return evaluate(mx.nd, nodes, values, self._run)[entry.node][entry.index]

    @contextmanager
    def rewriting(self):
        """Around changes of the graph: what was traced before is forgotten."""
        yield self.graph
        self._nodes = self._grids = None
        self._clear_cached_op()

    def hybrid_forward(self, F, x, /, *args, **params):
        if len(args) + 1 != len(self.inputs):
            raise ValueError(f'the net takes {len(self.inputs)} inputs ({", ".join(self.inputs)}), not {len(args) + 1}')
        if self._nodes is None:
            self._nodes = [*self.graph.nodes(), self.graph.heads]
        values = {self._variables[path]: value for path, value in params.items()}
        values.update(zip(self.inputs, (x, *args)))
        out = evaluate(F, self._nodes, values, self._run)[self.graph.heads]
        return _regroup(out, self.form) if self.form is not None else out[0] if len(out) == 1 else out

    def freeze_batchnorm(self, frozen=True):
        """See `gluonquant.freeze_batchnorm`."""
        with self.rewriting() as graph:
            for node in graph.nodes():
                if node.op == 'BatchNorm':
                    node.attrs['use_global_stats'] = str(bool(frozen))
                elif node.op == FOLDED:
                    _freeze_folded(node, frozen)

    def fold_batchnorm(self, frozen=True):
        """Fold each BatchNorm into the layer before it, for training; returns what became of each, {node: sentence}.

        ``frozen``: with running statistics; those that are folded already become so, too, or cease to be.
        """
        found, refused = pairs(self.graph)
        told = {norm.name: f'folded into {self.label(layer)!r}' for layer, norm in found}
        told.update((norm.name, f'stays: {reason}') for norm, reason in refused.items())
        with self.rewriting() as graph:
            for node in graph.nodes():
                if node.op == FOLDED:
                    told[node.name] = f'folded into {self.label(node)!r}'
                    _freeze_folded(node, frozen)
            for layer, norm in found:
                channels = int(layer.attrs.get('num_filter', layer.attrs.get('num_hidden', 0)))
                for entry in norm.inputs[1:]:
                    self.parameter(entry.node.name).shape = (channels,)     # which nothing else would tell any more
                node = graph.fold(layer, norm)
                _freeze_folded(node, frozen)
                if 'quantizer' in node.attrs:
                    quantizer = self._children[node.attrs['quantizer']]
                    self._bind(node, quantizer, quantizer.bound)
                    quantizer.renew()
        return self._told(told)

    def merge_batchnorm(self):
        """Merge each BatchNorm into new Parameters; returns what became of each, {node: sentence}."""
        for parameter in self._reg_params.values():
            if parameter._data is None:
                raise RuntimeError(f'Parameter {parameter.name!r} has no value yet: run one batch through the net, or '
                                   'load its Parameters')
        mx.nd.waitall()     # a static graph does not tell that it writes running statistics
        with self.rewriting() as graph:
            arrays, told = merge(graph, {name: self.parameter(name)._reduce() for name in self.paths})
            self._take(arrays)
            for node in graph.nodes():
                if node.op == QUANTIZE and node.inputs[0].node.name in arrays:
                    self._bind(node, self.quantizer(Entry(node)), self.parameter(node.inputs[0].node.name))
        return self._told(told)

    def _told(self, told):
        """Note in the decisions what became of each BatchNorm; returns it by short name."""
        told = {short_name(name, self.scope): self._shortened(sentence) for name, sentence in told.items()}
        rows = {name: Decision(name, 'BatchNorm', '', None, sentence) for name, sentence in told.items()}
        self.decisions = [rows.pop(row.node, row) if row.op == 'BatchNorm' else row for row in self.decisions]
        self.decisions += rows.values()
        return told

    def _shortened(self, sentence):
        """A sentence with short names between its quotes."""
        labels = {node.name: self.label(node) for node in self.graph.nodes()}
        parts = sentence.split("'")
        parts[1::2] = [labels.get(name, name) for name in parts[1::2]]
        return "'".join(parts)

    def _take(self, arrays):
        """Give the variables in ``arrays`` Parameters of their own, and forget those that nothing reads any more."""
        contexts = next(iter(self.params.values())).list_ctx()
        variables = self.graph.variables()
        for name, parameter in make_parameters(self.graph, arrays, {name: mx.nd.array(array, dtype=array.dtype)
                                                             for name, array in arrays.items()}).items():
            parameter.reset_ctx(contexts)
            if name in self.paths:
                before = self.parameter(name)
                parameter.lr_mult, parameter.wd_mult = before.lr_mult, before.wd_mult
                parameter.grad_req = before.grad_req
            elif self.graph.readers(variables[name])[0].op == 'broadcast_mul':      # the factor of a merged BatchNorm
                parameter.grad_req = 'null'
            path = self.paths.get(name) or self._new_path(variables[name])
            self.paths[name], self._reg_params[path] = path, parameter
        self.paths = {name: path for name, path in self.paths.items() if name in variables}
        self._variables = {path: name for name, path in self.paths.items()}
        self._reg_params = {path: self._reg_params[path] for path in self._variables}
        self._params = ParameterDict('')
        for parameter in self._reg_params.values():
            self._params.update({parameter.name: parameter})

    def _new_path(self, variable):
        """Where a new Parameter stands: beside the weight of the layer that reads it, if that has a path."""
        reader = self.graph.readers(variable)[0]
        path = layer_path(reader, self.paths)
        is_bias = path and len(reader.inputs) > 2 and reader.inputs[2].node is variable
        return f'{path}.bias' if is_bias else variable.name

    def _run(self, F, node, inputs):
        if node.op == QUANTIZE:
            return self._children[node.attrs['quantizer']](*inputs)
        if node.op == BIAS:
            return self._children[node.attrs['bias_quantizer']](*inputs)
        if node.op == self.graph.heads.op:
            return inputs
        if node.op == FOLDED:
            return self._run_folded(F, node, inputs)
        if node.op == 'Deconvolution' and node.inputs[1].node.op != VARIABLE:
            return Q.computed_deconvolution(F, lambda *tensors: invoke(F, node, tensors), *inputs)
        return invoke(F, node, inputs)

    def _run_folded(self, F, node, inputs):
        op, attrs, settings = parts(node)
        path = node.attrs.get('quantizer')
        quantize = self._children[path] if path else lambda weight: weight

        def run(*tensors):
            layer = Node(op, node.name, {**attrs, 'no_bias': str(tensors[-1] is None)}, [], [])
            given = [tensor for tensor in tensors if tensor is not None]
            if op == 'Deconvolution':
                return Q.computed_deconvolution(F, lambda *wide: invoke(F, layer, wide), *given)
            return invoke(F, layer, given)
        x, weight, *bias = inputs[:-4]
        return folded(F, run, quantize, Layer.of(op, attrs), settings, x, weight, *(bias or [None]), *inputs[-4:],
                      dtype=self._dtype_of(node))

    def _dtype_of(self, node):
        return np.dtype(self.parameter(node.inputs[1].node.name).dtype).name

    def settings(self):
        """What tells this net from others: operators, edges, attributes, quantizers; not the names of nodes."""
        nodes = self.graph.nodes()
        number = {node: place for place, node in enumerate(nodes)}
        found = []
        for node in nodes:
            about = {key: value for key, value in node.parameters.items() if key != 'use_global_stats'}
            if node.op == VARIABLE:
                about = self.paths.get(node.name)
            elif node.op == FOLDED:
                op, attrs, settings = parts(node)
                about = op, attrs, settings._replace(frozen=None), node.attrs.get('spec')
            found.append((node.op, about, [(number[entry.node], entry.index) for entry in node.inputs]))
        return [*found, [(number[entry.node], entry.index) for entry in self.graph.heads.inputs]]

    def take_frozen(self, other):
        """Freeze those BatchNorms that are frozen in an equal net."""
        with self.rewriting() as graph:
            for mine, theirs in zip(graph.nodes(), other.graph.nodes()):
                if mine.op in ('BatchNorm', FOLDED):
                    mine.attrs = theirs.attrs

    def describe(self):
        """Plain values, for JSON, from which `from_description` makes an equal net, but for Parameters' values."""
        return {'graph': self.graph.dump(), 'inputs': self.inputs, 'form': self.form, 'scope': self.scope,
                'decisions': self.decisions,
                'parameters': {name: {'path': path, 'shape': self.parameter(name).shape,
                                      'dtype': np.dtype(self.parameter(name).dtype).name,
                                      'grad_req': self.parameter(name).grad_req,
                                      'lr_mult': self.parameter(name).lr_mult,
                                      'wd_mult': self.parameter(name).wd_mult}
                               for name, path in self.paths.items()}}

    @classmethod
    def from_description(cls, values, parameters=None):
        """The inverse of `describe`.

        Parameters
        ----------
        parameters : dict, {path: Parameter}, optional
            Those of another net, to be shared; default: new ones. ValueError names one that is missing.
        """
        own, paths = {}, {}
        for name, about in values['parameters'].items():
            path = paths[name] = about['path']
            if parameters is None:
                settings = {key: value for key, value in about.items() if key != 'path'}
                own[name] = Parameter(name, allow_deferred_init=True, **settings)
            elif path in parameters:
                own[name] = parameters[path]
            else:
                raise ValueError(f'Parameter {path!r} of the graph is missing in the net')
        graph = Graph.read(values['graph'])
        return cls(graph, own, values['inputs'], paths, values['form'], values['scope'],
                   [Decision(*decision) for decision in values['decisions']])

    def __deepcopy__(self, memo):
        # Not by __reduce_ex__: a Parameter knows its Trainer, that knows the quantizers, and these know the net.
        parts = list(self.__reduce_ex__(2)[1])
        parts[1] = {path: memo.setdefault(id(parameter), _cloned(parameter, memo))
                    for path, parameter in parts[1].items()}
        memo[id(self)] = net = _restore(*copy.deepcopy(parts[:1], memo), parts[1], *copy.deepcopy(parts[2:], memo))
        return net

    def __reduce_ex__(self, protocol):
        parameters = {self.paths[name]: self.parameter(name) for name in self.paths}
        state = {path: {name: quantizer.value(name) for name, parameter in quantizer._reg_params.items()
                        if parameter._data is not None} for path, quantizer in self._children.items()
                 if quantizer._reg_params}
        hybrid = {name: self.__dict__[name] for name in ('_active', '_flags')}
        types = {path: quantizer._dtype for path, quantizer in self._children.items() if quantizer.grid is not None}
        return _restore, (self.describe(), parameters, state, types, hybrid)

    def __repr__(self):
        count = len(self._children)
        return f'GraphNet({", ".join(self.inputs)}: {len(self.graph.nodes())} nodes, {count} quantizers)'


def _freeze_folded(node, frozen):
    norm = json.loads(node.attrs['norm'])
    norm['attrs']['use_global_stats'] = str(bool(frozen))
    node.attrs['norm'] = json.dumps(norm)


def _cloned(parameter, memo):
    """A Parameter with the same value, without a Trainer."""
    trainer, parameter._trainer = parameter._trainer, None
    try:
        return copy.deepcopy(parameter, memo)
    finally:
        parameter._trainer = trainer


def _restore(description, parameters, state, types, hybrid):
    for parameter in parameters.values():
        if parameter._data is not None and parameter.grad_req != 'null':
            parameter._init_grad()      # copies of Parameters do not know their gradients
    net = GraphNet.from_description(description, parameters)
    for path, values in state.items():
        net._children[path].write(**values)
    for path, dtype in types.items():
        net._children[path].cast(dtype)
    net.__dict__.update(hybrid)
    return net


def make_parameters(graph, names, arrays=None, shapes=None, inits=None):
    """{name: Parameter} for the variables of a symbol file, with their notes and, if given, arrays from a file.

    ``shapes`` and ``inits`` are those of variables that have no array and note none.
    """
    plain = graph.copy()
    plain.strip()
    auxiliary = set(plain.symbol().list_auxiliary_states())
    variables = graph.variables()
    return {name: _parameter(variables[name], None if arrays is None else arrays[name], name in auxiliary,
                             (shapes or {}).get(name), (inits or {}).get(name)) for name in names}


def _parameter(node, array, auxiliary, shape, init):
    notes = node.hidden
    try:
        shape = array.shape if array is not None else _shape(notes) or shape
        multipliers = {key: float(notes.get(f'__{key}__', 1)) for key in ('lr_mult', 'wd_mult')}
    except ValueError as error:
        raise ValueError(f'variable {node.name!r} with {notes}: {error}') from None
    parameter = Parameter(node.name, grad_req='null' if auxiliary else 'write', shape=shape, **multipliers,
                          dtype=array.dtype if array is not None else 'float32', init=notes.get('__init__', init),
                          allow_deferred_init=True)
    if array is not None:
        parameter.initialize(init='zeros')
        parameter.set_data(array)
    return parameter


def _shape(notes):
    """The shape that a variable notes, None if it notes none."""
    if '__shape__' not in notes:
        return None
    sizes = tuple(max(size, 0) for size in integers(notes['__shape__']))
    if not sizes:
        raise ValueError(f"no shape: {notes['__shape__']!r}")
    return sizes
