"""A graph with quantizers in it, as a block that trains."""
import copy
import json
from contextlib import contextmanager
from functools import partial
from typing import Any, List, NamedTuple

import mxnet as mx
import numpy as np
from mxnet import autograd
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
    TWIN,
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


class Training(NamedTuple):
    """What a net takes and returns in training, where that is not what it does in inference.

    inputs : list of str.  form : as of a `GraphNet`.  heads : int, how many of the graph's last heads these are.
    """
    inputs: List[str]
    form: Any
    heads: int


ONLY_INFERS = 'this one holds what it does in inference. Train the net that it was made of, and make it anew'

# What a hybridized block keeps of its graph.
_CACHE = ('_cached_graph', '_cached_op', '_cached_op_args', '_in_format', '_out_format')


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
    training : Training or str, optional
        What it does in training, as detectors do: the graph has all that both need, and hybridized, the net keeps a
        graph of each. A str says why it cannot train, and what to do. None: the same as in inference.
    known : dict, {path: Quantizer}, optional
        Quantizers to share with another net, where new ones are made by default.

    Inputs:  a tensor for each of ``inputs``.
    Outputs: those of the graph.
    """

    only_infers = False     # as of a QuantizedLayer

    def __init__(self, graph, parameters, inputs, paths=None, form=None, scope=None, decisions=(), training=None,
                 known=None):
        super().__init__(prefix='')             # Parameters keep their names
        self._own_prefix = mx.name.NameManager.current.get(None, 'graphnet') + '_'      # of the quantizers' Parameters
        self.graph = graph
        self.inputs = list(inputs)
        self.paths = {name: (paths or {}).get(name, name) for name in parameters}
        self.form = form
        self.scope = dict(scope or {})
        self.decisions = list(decisions)
        self.training = Training(*training) if isinstance(training, (list, tuple)) else training
        self._mode, self._kept = False, {}      # whether the cached graph is that of training; the other one
        self._variables = {path: name for name, path in self.paths.items()}
        self._nodes, self._grids, self._prefixes = {}, None, set()
        for name, parameter in parameters.items():
            self.params.update({parameter.name: parameter})
            self._reg_params[self.paths[name]] = parameter
        self._check_variables()
        for node in graph.nodes():
            if node.op == QUANTIZE or 'quantizer' in node.attrs:
                self._add_quantizer(node, known or {})
                if node.attrs['quantizer'] not in (known or {}):
                    self._note_tensor(node)
        for node in graph.nodes():
            if node.op == BIAS:
                self._add_bias_quantizer(node)

    def _note_tensor(self, node):
        tensors, source = self._children[node.attrs['quantizer']].tensors, node.inputs[0].node
        name = short_name(source.attrs.get(TWIN, source.name), self.scope)
        if TWIN not in source.attrs or name not in tensors:     # twins: the same tensor, in inference and in training
            tensors.append(name)

    def _check_variables(self):
        variables = self.graph.variables()
        trained = self.training.inputs if isinstance(self.training, Training) else []
        for name in [*self.inputs, *trained]:
            if name not in variables or name in self.paths:
                raise ValueError(f'the graph has no input {name!r}.{nearest(name, variables)}')
        for name in variables:
            if name not in self.paths and name not in self.inputs and name not in trained:
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
        return layer_path(node, self.paths) or short_name(node.attrs.get(TWIN, node.name), self.scope)

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
        self._nodes, self._grids = {}, None
        self._clear_cached_op()

    def _clear_cached_op(self):
        super()._clear_cached_op()
        self.__dict__['_kept'] = {}

    def forward(self, x, *args):
        self._enter(autograd.is_training())
        return super().forward(x, *args)

    def export(self, *args, **kwargs):
        """As `HybridBlock.export`: what the net does in inference."""
        self._enter(False)
        if self._kept.get('_cached_graph') and not self._cached_graph:
            raise RuntimeError('the net has run in training only: run one batch in inference, which is exported')
        return super().export(*args, **kwargs)

    def _enter(self, training):
        """Take the cached graph of this mode and keep the other one, if there are two."""
        if self.training is not None and training != self._mode:
            kept = {name: self.__dict__[name] for name in _CACHE}
            other, self._kept = self._kept, kept
            if not other:
                super()._clear_cached_op()
            self.__dict__.update(other)
            self._mode = training

    def hybrid_forward(self, F, x, /, *args, **params):
        trains = self.training is not None and autograd.is_training()
        if trains and isinstance(self.training, str):
            raise RuntimeError(f'the net does something else in training than in inference: {self.training}')
        inputs, form = self.training[:2] if trains else (self.inputs, self.form)
        if len(args) + 1 != len(inputs):
            raise ValueError(f'the net takes {len(inputs)} inputs ({", ".join(inputs)}), not {len(args) + 1}')
        if trains not in self._nodes:
            heads = Node(self.graph.heads.op, '', {}, self.heads(trains), [])
            nodes = [*ancestors(heads.inputs), heads]
            self._nodes[trains] = nodes, without_gradient(nodes)
        nodes, stopped = self._nodes[trains]
        values = {self._variables[path]: value for path, value in params.items()}
        values.update(zip(inputs, (x, *args)))

        def run(F, node, inputs):
            if F is mx.nd and node in stopped:      # some operators crash where nobody wants their gradient
                with autograd.pause(train_mode=autograd.is_training()):
                    return self._run(F, node, inputs)
            return self._run(F, node, inputs)
        out = evaluate(F, nodes, values, run)[nodes[-1]]
        return _regroup(out, form) if form is not None else out[0] if len(out) == 1 else out

    def heads(self, training=False):
        """The entries that the net returns."""
        count = self.training.heads if isinstance(self.training, Training) else 0
        heads = self.graph.heads.inputs
        return heads[len(heads) - count:] if training and count else heads[:len(heads) - count]

    def inference(self):
        """What the net does in inference only, with the same Parameters and quantizers; itself if it does no more."""
        return self if self.training is None else self.returning(self.heads(), self.form, ONLY_INFERS)

    def returning(self, heads, form=None, training=None):
        """A net of what the entries ``heads`` need, which returns these, with the same Parameters and quantizers."""
        graph = self.graph.part(heads)
        names = [name for name in graph.variables() if name in self.paths]
        return GraphNet(graph, {name: self.parameter(name) for name in names}, self.inputs, self.paths, form,
                        self.scope, self.decisions, training, dict(self._children))

    def nodes_by_name(self):
        """{name or label: node}; a label that several nodes have is that of the first."""
        known = {}
        for node in self.graph.nodes():
            known.setdefault(self.label(node), node)
            known.setdefault(node.name, node)
        return known

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
        return [*found, [(number[entry.node], entry.index) for entry in self.graph.heads.inputs],
                self.training and self.training[0], self.training and self.training[-1]]

    def take_frozen(self, other):
        """Freeze those BatchNorms that are frozen in an equal net."""
        with self.rewriting() as graph:
            for mine, theirs in zip(graph.nodes(), other.graph.nodes()):
                if mine.op in ('BatchNorm', FOLDED):
                    mine.attrs = theirs.attrs

    def describe(self):
        """Plain values, for JSON, from which `from_description` makes an equal net, but for Parameters' values."""
        return {'graph': self.graph.dump(), 'inputs': self.inputs, 'form': self.form, 'scope': self.scope,
                'decisions': self.decisions, 'training': self.training,
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
                   [Decision(*decision) for decision in values['decisions']], values.get('training'))

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


def without_gradient(nodes):
    """Those of ``nodes``, each behind its inputs, from which no gradient comes back: all that read them block it."""
    readers = {}
    for node in nodes:
        for entry in node.inputs:
            readers.setdefault(entry.node, []).append(node)
    stopped = set()
    for node in reversed(nodes):
        if node in readers and all(reader.op == 'BlockGrad' or reader in stopped for reader in readers[node]):
            stopped.add(node)
    return stopped


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
