"""A graph with quantizers in it, as a block that trains."""
import copy
import json
from contextlib import contextmanager
from functools import partial

import mxnet as mx
import numpy as np
from mxnet.gluon import HybridBlock, Parameter
from mxnet.gluon.block import _regroup

from .. import functional as Q
from .. import quantizers
from ..batchnorm import Layer, folded, folded_weight, parts
from ..fuse import FusedGraph
from ..registry import nearest
from ..symbol_graph import (
    BIAS,
    FOLDED,
    QUANTIZE,
    VARIABLE,
    Graph,
    Node,
    ancestors,
    evaluate,
    invoke,
    numbered,
)
from ..trace import LAYER_OPS
from .names import bound_variable, layer_path, short_name
from .rework import Decision, Reworked
from .target import grids


class GraphNet(Reworked, FusedGraph, HybridBlock):
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

    only_infers = False     # as of a QuantizedLayer

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
        values = [self.parameter(entry.node.name).list_data()[0] for entry in [node.inputs[1], *node.inputs[-4:]]]
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
        values = {node.name: self.parameter(node.name).list_data()[0] for node in nodes if node.op == VARIABLE}
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

    def _run(self, F, node, inputs):
        if node.op == QUANTIZE:
            return self._children[node.attrs['quantizer']](*inputs)
        if node.op == BIAS:
            return self._children[node.attrs['bias_quantizer']](*inputs)
        if node.op == self.graph.heads.op:
            return inputs
        if node.op == FOLDED:
            return self._run_folded(F, node, inputs)
        if node.op == 'Deconvolution' and node.inputs[1].node.op != VARIABLE and not self.only_infers:
            return Q.computed_deconvolution(F, lambda *tensors: invoke(F, node, tensors), *inputs)
        if len(inputs) > 2 and node.inputs[2].node.op == BIAS and self._rows_are_samples(node):
            geometry = Layer.of(node.op, node.attrs)
            quantizer = self._children[node.inputs[2].node.attrs['bias_quantizer']]
            return quantizer.on_codes(F, lambda *tensors: invoke(F, node, tensors), *inputs, geometry.along_weight,
                                      geometry.along_output)
        return invoke(F, node, inputs)

    @staticmethod
    def _rows_are_samples(node):
        return node.op == 'Convolution' or node.attrs.get('flatten', 'True') in ('True', 'true', '1')

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
