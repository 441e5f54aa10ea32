"""A graph with quantizers in it, as a block that trains."""
import json
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Optional

import mxnet as mx
from mxnet.gluon import HybridBlock, Parameter
from mxnet.gluon.block import _regroup

from .. import functional as Q
from .. import quantizers
from ..fuse import FusedGraph
from ..symbol_graph import QUANTIZE, VARIABLE, Graph, ancestors, evaluate, invoke
from ..trace import LAYER_OPS


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
    scope : str
        What the names of nodes begin with that came from the traced net: left out where people read them.
    decisions : list of Decision
        What `explain` tells.

    Inputs:  a tensor for each of ``inputs``.
    Outputs: those of the graph.
    """

    def __init__(self, graph, parameters, inputs, paths=None, form=None, scope='', decisions=()):
        super().__init__(prefix='')
        self.graph = graph
        self.inputs = list(inputs)
        self.paths = {name: (paths or {}).get(name, name) for name in parameters}
        self.form = form
        self.scope = scope
        self.decisions = list(decisions)
        self._variables = {path: name for name, path in self.paths.items()}
        self._nodes = None
        for name, parameter in parameters.items():
            self.params.update({parameter.name: parameter})
            self._reg_params[self.paths[name]] = parameter
        for node in graph.nodes():
            if node.op == QUANTIZE and node.attrs['quantizer'] not in self._children:
                self._add_quantizer(node)

    def _add_quantizer(self, node):
        path, spec = node.attrs['quantizer'], json.loads(node.attrs['spec'])
        method, bits, options = spec.pop('method'), spec.pop('bits'), spec.pop('options')
        prefix, bound = path.replace('.', '_') + '_', None
        if spec['role'] == 'weight':
            bound = self.parameter(bound_variable(node.inputs[0]))
            options['shape'] = tuple(max(size, 0) for size in bound.shape or ()) or None
            prefix = f'{bound.name}_quantizer_'
        try:
            quantizer = quantizers.create(method, bits, prefix=prefix, **spec, **options)
        except (ValueError, TypeError) as error:
            raise type(error)(f'{path}: {error}. Change it by a rule, or keep what reads it float with '
                              'exclude') from None
        if bound is not None:
            computed = node.inputs[0].node.op != VARIABLE
            quantizer.bind(bound, partial(self.compute, node.inputs[0]) if computed else None)
        like = next(iter(self.params.values()), None) if bound is None else bound
        for parameter in quantizer.params.values():
            parameter.like = like
        quantizer.nested, quantizer.where = True, path
        self.register_child(quantizer, path)

    def parameter(self, name):
        """The Parameter of a variable."""
        return self._reg_params[self.paths[name]]

    def quantizer(self, entry):
        """The quantizer that a tensor is the output of, or None."""
        node = entry.node
        return self._children[node.attrs['quantizer']] if node.op == QUANTIZE else None

    def label(self, node):
        """The name of a node as users read it: the path of the layer whose weight it reads, or its short name."""
        return layer_path(node, self.paths) or short_name(node, self.scope)

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
        self._nodes = None
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

    def _run(self, F, node, inputs):
        if node.op == QUANTIZE:
            return self._children[node.attrs['quantizer']](*inputs)
        if node.op == self.graph.heads.op:
            return inputs
        if node.op == 'Deconvolution' and node.inputs[1].node.op != VARIABLE:
            return Q.computed_deconvolution(F, lambda *tensors: invoke(F, node, tensors), *inputs)
        return invoke(F, node, inputs)

    def settings(self):
        """What tells this net from others: operators, edges, attributes, quantizers; not the names of nodes."""
        nodes = self.graph.nodes()
        number = {node: place for place, node in enumerate(nodes)}
        return [(node.op, self.paths.get(node.name) if node.op == VARIABLE else
                 {key: value for key, value in node.parameters.items() if key != 'use_global_stats'},
                 [(number[entry.node], entry.index) for entry in node.inputs]) for node in nodes]

    def describe(self):
        """Plain values, for JSON, from which `from_description` makes an equal net, but for Parameters' values."""
        return {'graph': self.graph.dump(), 'inputs': self.inputs, 'paths': self.paths, 'form': self.form,
                'scope': self.scope, 'decisions': self.decisions}

    @classmethod
    def from_description(cls, values, parameters=None):
        """The inverse of `describe`.

        Parameters
        ----------
        parameters : dict, {path: Parameter}, optional
            Those of another net, to be shared; default: new ones. ValueError names one that is missing.
        """
        graph, paths = Graph.read(values['graph']), values['paths']
        if parameters is None:
            own = make_parameters(graph, paths)
        else:
            for path in paths.values():
                if path not in parameters:
                    raise ValueError(f'Parameter {path!r} of the graph is missing in the net')
            own = {name: parameters[path] for name, path in paths.items()}
        return cls(graph, own, values['inputs'], paths, values['form'], values['scope'],
                   [Decision(*decision) for decision in values['decisions']])

    def __reduce_ex__(self, protocol):
        parameters = {self.paths[name]: self.parameter(name) for name in self.paths}
        state = {path: {name: quantizer.value(name) for name, parameter in quantizer._reg_params.items()
                        if parameter._data is not None} for path, quantizer in self._children.items()}
        hybrid = {name: self.__dict__[name] for name in ('_active', '_flags')}
        return _restore, (self.describe(), parameters, state, hybrid)

    def __repr__(self):
        count = len(self._children)
        return f'GraphNet({", ".join(self.inputs)}: {len(self.graph.nodes())} nodes, {count} quantizers)'


def short_name(node, scope):
    """The name of a node without that of the net it was traced from, which is numbered differently in each process."""
    return node.name[len(scope):] if node.name.startswith(scope) else node.name


def layer_path(node, paths):
    """The path of the layer whose weight ``node`` reads; None if it reads none that is known by a path."""
    if node.op not in LAYER_OPS or len(node.inputs) < 2:
        return None
    path = paths.get(bound_variable(node.inputs[1]), '')
    return path[:-len('.weight')] if path.endswith('.weight') else None


def bound_variable(entry):
    """The name of the weight that ``entry`` is, or that is the first input of what computes it."""
    while entry.node.op != VARIABLE:
        entry = entry.node.inputs[0]
    return entry.node.name


def _restore(description, parameters, state, hybrid):
    net = GraphNet.from_description(description, parameters)
    for path, values in state.items():
        net._children[path].write(**values)
    net.__dict__.update(hybrid)
    return net


def make_parameters(graph, names, arrays=None):
    """{name: Parameter} for the variables of a symbol file, with their notes and, if given, arrays from a file."""
    plain = graph.copy()
    plain.strip()
    auxiliary = set(plain.symbol().list_auxiliary_states())
    variables = graph.variables()
    return {name: _parameter(variables[name], None if arrays is None else arrays[name], name in auxiliary)
            for name in names}


def _parameter(node, array, auxiliary):
    notes = node.hidden
    shape = array.shape if array is not None else _shape(notes.get('__shape__'))
    parameter = Parameter(node.name, grad_req='null' if auxiliary else 'write', shape=shape,
                          dtype=array.dtype if array is not None else 'float32',
                          lr_mult=float(notes.get('__lr_mult__', 1)), wd_mult=float(notes.get('__wd_mult__', 1)),
                          init=notes.get('__init__'), allow_deferred_init=True)
    if array is not None:
        parameter.initialize(init='zeros')
        parameter.set_data(array)
    return parameter


def _shape(text):
    return None if text is None else tuple(max(int(size), 0) for size in text.strip('()[] ').split(',') if size.strip())
