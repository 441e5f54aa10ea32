"""A symbol as nodes that Python can rewire: the typed view of the JSON that `Symbol.tojson` writes."""
import ctypes
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import mxnet as mx
from mxnet._ctypes.ndarray import CachedOp, _imperative_invoke
from mxnet._ctypes.symbol import _symbol_creator
from mxnet.base import _LIB, MXNetError, OpHandle, c_str, check_call

from .registry import nearest

# Our own operators in a Graph become MXNet's when they run: a quantizer, and a layer with its BatchNorm folded into it.
QUANTIZE, FOLDED = 'gluonquant', 'gluonquant_folded'
OURS = (QUANTIZE, FOLDED)
VARIABLE = 'null'           # MXNet's word


@dataclass(eq=False)
class Node:
    """An operator; a variable, if ``op`` is 'null'. Nodes are told apart by identity, not by name.

    Attributes
    ----------
    attrs : dict, {str: str}, the operator's parameters and, between double underscores, whatever else was noted.
    inputs : list of Entry
    subgraphs : list, the bodies of a control flow operator, as in the JSON
    """
    op: str
    name: str
    attrs: dict
    inputs: list
    subgraphs: list

    @property
    def parameters(self):
        """The attributes that the operator itself reads."""
        return {key: value for key, value in self.attrs.items() if not key.startswith('__')}

    @property
    def hidden(self):
        """The other attributes."""
        return {key: value for key, value in self.attrs.items() if key.startswith('__')}

    def says(self, name):
        """Whether the boolean parameter ``name`` is set."""
        return self.attrs.get(name) in ('True', 'true', '1')


class Entry(NamedTuple):
    """One output of a node. ``version`` counts the operators that have written to a variable so far."""
    node: Node
    index: int = 0
    version: int = 0


def ancestors(entries):
    """Every node that ``entries`` need, each behind its inputs, in the order in which MXNet visits them.

    ValueError names a node that reads itself through others.
    """
    order, seen, stack = [], set(), [(None, iter(entries))]
    open_nodes = set()
    while stack:
        node, inputs = stack[-1]
        entry = next((entry for entry in inputs if entry.node not in seen or entry.node in open_nodes), None)
        if entry is None:
            order.append(node)
            open_nodes.discard(node)
            stack.pop()
        elif entry.node in open_nodes:
            raise ValueError(f'node {node.name!r} ({node.op}) reads {entry.node.name!r}, which depends on it: '
                             'the graph has a cycle')
        else:
            seen.add(entry.node)
            open_nodes.add(entry.node)
            stack.append((entry.node, iter(entry.node.inputs)))
    return order[:-1]


class Graph:
    """The nodes of a symbol. Nodes that nothing reads any more leave it.

    Attributes
    ----------
    heads : Node
        Reads the graph's outputs, as any other node reads its inputs.
    attrs : dict, what the JSON says of the whole, such as the version of MXNet
    """

    def __init__(self, heads, attrs):
        self.heads = Node('heads', '', {}, list(heads), [])
        self.attrs = attrs
        self._names = None
        self._readers = defaultdict(list)
        for node in [*self.nodes(), self.heads]:
            for entry in node.inputs:
                self._readers[entry.node].append(node)

    @classmethod
    def load(cls, text):
        """From the JSON of a symbol of this MXNet, or of `dump`; `read` takes any other, too."""
        content = json.loads(text)
        nodes = [Node(node['op'], node['name'], node.get('attrs', {}), [], node.get('subgraphs', []))
                 for node in content['nodes']]

        def entries(pairs):
            return [Entry(nodes[number], *rest) for number, *rest in pairs]
        for node, described in zip(nodes, content['nodes']):
            node.inputs = entries(described['inputs'])
        return cls(entries(content['heads']), content.get('attrs', {}))

    @classmethod
    def read(cls, text):
        """From JSON of whatever source: checked, and brought up to date by MXNet if an old version wrote it.

        Raises
        ------
        ValueError
            It is no symbol: not JSON, an edge from nowhere or in a circle, an operator or an attribute that MXNet does
            not know, an input too many or too few. The message names the node. MXNet itself crashes on some of these.
        """
        _check_edges(_parsed(text))
        graph = cls.load(_up_to_date(text))
        graph.check()
        return graph

    @classmethod
    def of(cls, symbol):
        """From a Symbol."""
        return cls.load(symbol.tojson(remove_amp_cast=False))

    def check(self):
        """ValueError, with its name, for a node that MXNet could not run."""
        for node in self.nodes():
            if node.op in (VARIABLE, *OURS) or node.subgraphs:
                continue
            inputs, _ = _signature(node)
            if len(node.inputs) != inputs:
                raise ValueError(f'node {node.name!r}: {node.op} reads {inputs} inputs, but has {len(node.inputs)}')
        for node in [*self.nodes(), self.heads]:
            for source, index, _ in node.inputs:
                if not 0 <= index < _outputs(source):
                    reader = f'node {node.name!r} reads' if node is not self.heads else 'the graph returns'
                    raise ValueError(f'{reader} output {index} of {source.name!r} ({source.op}), which has '
                                     f'{_outputs(source)}')

    def dump(self):
        """The JSON of the symbol."""
        nodes = self.nodes()
        number = {node: place for place, node in enumerate(nodes)}

        def entries(node):
            return [[number[entry.node], entry.index, entry.version] for entry in node.inputs]
        described = []
        for node in nodes:
            described.append({'op': node.op, 'name': node.name, 'attrs': node.attrs, 'inputs': entries(node)})
            if node.subgraphs:
                described[-1]['subgraphs'] = node.subgraphs
        # MXNet recounts node_row_ptr, the outputs of every node, itself; it cannot read JSON's \u escapes.
        return json.dumps({'nodes': described, 'arg_nodes': [number[node] for node in nodes if node.op == VARIABLE],
                           'heads': entries(self.heads), 'attrs': self.attrs}, ensure_ascii=False)

    def copy(self):
        """A graph of new nodes that are equal to these."""
        return Graph.load(self.dump())

    def symbol(self):
        """The Symbol; ValueError if quantizers or folded layers stand in the graph, which only a net can run."""
        for node in self.nodes():
            if node.op in OURS:
                raise ValueError(f'{node.name!r} ({node.op}) is no operator of MXNet: trace the net instead')
        return mx.sym.load_json(self.dump())

    def nodes(self):
        """All nodes, each behind its inputs."""
        return ancestors(self.heads.inputs)

    def variables(self):
        """{name: node} of the variables, in the order in which nodes read them; auxiliary states too."""
        return {node.name: node for node in self.nodes() if node.op == VARIABLE}

    def readers(self, node):
        """The nodes that read ``node``, the graph's heads among them, once for every input that does."""
        return list(self._readers[node])

    def connect(self, node, inputs):
        """Let ``node`` read ``inputs`` from now on."""
        before, node.inputs = node.inputs, list(inputs)
        for entry in node.inputs:
            self._readers[entry.node].append(node)
        for entry in before:
            self._readers[entry.node].remove(node)
            if not self._readers[entry.node]:
                self.connect(entry.node, ())

    def add(self, op, name, inputs, **attrs):
        """A new node with a name of its own, read by nothing yet; returns it."""
        node = Node(op, self.free_name(name), {key: str(value) for key, value in attrs.items()}, [], [])
        self.connect(node, inputs)
        return node

    def strip(self):
        """Take the quantizers out, and BatchNorm out of the layers that it is folded into."""
        for node in self.nodes():
            if node.op == FOLDED:
                self.unfold(node)
        for node in self.nodes():
            if node.op == QUANTIZE:
                self.redirect(Entry(node), node.inputs[0])

    def fold(self, layer, norm):
        """Make one node of a layer and the BatchNorm that reads it, named after the latter; returns it.

        Its inputs are those of the layer, without the quantizer of the weight, which becomes its attribute, and the
        Parameters of the BatchNorm.
        """
        attrs = {'layer': _described(layer), 'norm': _described(norm)}
        inputs, weight = list(layer.inputs), layer.inputs[1].node
        if weight.op == QUANTIZE:
            inputs[1] = weight.inputs[0]
            attrs.update(weight.attrs)
        node = Node(FOLDED, norm.name, attrs, [], [])
        self.connect(node, [*inputs, *norm.inputs[1:]])
        self.redirect(Entry(norm), Entry(node))
        return node

    def unfold(self, node):
        """Undo `fold`; returns the layer and the BatchNorm."""
        layer, norm = (Node(**json.loads(node.attrs[part]), inputs=[], subgraphs=[]) for part in ('layer', 'norm'))
        inputs = list(node.inputs)
        if 'quantizer' in node.attrs:
            quantizer = Node(QUANTIZE, node.attrs['quantizer'],
                             {key: node.attrs[key] for key in ('quantizer', 'spec')}, [], [])
            self.connect(quantizer, [inputs[1]])
            inputs[1] = Entry(quantizer)
        self.connect(layer, inputs[:-4])
        self.connect(norm, [Entry(layer), *inputs[-4:]])
        self.redirect(Entry(node), Entry(norm))
        return layer, norm

    def free_name(self, name):
        """``name``, numbered if some node is called so; nobody gets it a second time."""
        if self._names is None:
            self._names = {node.name for node in self.nodes()}
        found = next(other for other in _numbered(name) if other not in self._names)
        self._names.add(found)
        return found

    def redirect(self, old, new, readers=None):
        """Let ``readers`` of the entry ``old`` (default: all) read the entry ``new`` instead, at every place."""
        for reader in set(self.readers(old.node) if readers is None else readers) - {new.node}:
            if any(same(entry, old) for entry in reader.inputs):
                self.connect(reader, [new if same(entry, old) else entry for entry in reader.inputs])

    def entry_readers(self, entry):
        """Those of `readers` that read this output."""
        return [node for node in dict.fromkeys(self.readers(entry.node))
                for other in node.inputs if same(other, entry)]

    def shapes(self, **known):
        """{(node, index): shape} of every tensor, as far as the shapes of variables tell; 0 for an unknown size.

        Parameters
        ----------
        known : tuple of int, by name of variable; those that variables note themselves need not be given.
        """
        plain = self.copy()
        plain.strip()
        _, shapes, _ = mx.sym.load_json(plain.dump()).get_internals().infer_shape_partial(**known)
        remaining, found = iter(shapes), {}
        for node in self.nodes():
            if node.op == QUANTIZE:
                found[node, 0] = found.get(node.inputs[0][:2])
            else:
                if node.op == FOLDED:
                    next(remaining)         # the output of the layer in it
                found.update({(node, index): next(remaining) for index in range(_outputs(node))})
        return {key: shape for key, shape in found.items() if shape}


def _described(node):
    return json.dumps({'op': node.op, 'name': node.name, 'attrs': node.attrs})


def same(first, second):
    """Whether two entries are one tensor."""
    return first.node is second.node and first.index == second.index


def evaluate(F, nodes, values, run=None):
    """Run ``nodes``, in order, on NDArrays or Symbols.

    Parameters
    ----------
    F : mxnet.ndarray or mxnet.symbol
    nodes : list of Node, each behind its inputs
    values : dict, {name of variable: NDArray or Symbol}
    run : callable(F, node, inputs), optional
        Gives the output, or a list of outputs, of a node that is no variable, in place of `invoke`.

    Returns
    -------
    dict, {node: list of its outputs} of the nodes that no other node of ``nodes`` reads
    """
    uses = Counter(entry.node for node in nodes for entry in node.inputs)
    ends = [node for node in nodes if not uses[node]]
    outputs = {}
    for node in nodes:
        if node.op == VARIABLE:
            outputs[node] = [values[node.name]]
        else:
            inputs = [outputs[entry.node][entry.index] for entry in node.inputs]
            made = (run or invoke)(F, node, inputs)
            outputs[node] = made if isinstance(made, (list, tuple)) else [made]
        for entry in node.inputs:
            uses[entry.node] -= 1
            if not uses[entry.node]:
                del outputs[entry.node]
    return {node: outputs[node] for node in ends}


def invoke(F, node, inputs):
    """The outputs of the operator ``node`` on NDArrays or Symbols: one, or a list."""
    if node.subgraphs:
        return _control_flow(F, node, inputs)
    keys, values = list(node.parameters), list(node.parameters.values())
    if F is mx.nd:
        return _imperative_invoke(operator(node.op), inputs, keys, values, None, False, False)
    made = _symbol_creator(operator(node.op), inputs, None, keys, values, node.name, False)
    if node.hidden:
        made._set_attr(**node.hidden)
    return made if len(made.list_outputs()) == 1 else list(made)


def _control_flow(F, node, inputs):
    """Operators with bodies come from JSON only."""
    names = [f'input{number}' for number in range(len(inputs))]
    alone = Graph([Entry(Node(node.op, node.name, node.attrs, [Entry(Node(VARIABLE, name, {}, [], []))
                                                               for name in names], node.subgraphs))], {})
    symbol = mx.sym.load_json(alone.dump())
    if F is mx.nd:
        order = symbol.list_inputs()
        return CachedOp(symbol)(*(inputs[names.index(name)] for name in order))
    made = symbol(**dict(zip(names, inputs)))
    return list(made)


@lru_cache(maxsize=None)
def operator(name):
    """MXNet's handle of an operator; ValueError if there is none of this name."""
    handle = OpHandle()
    if _LIB.NNGetOpHandle(c_str(name), ctypes.byref(handle)):
        known = mx.operator.get_all_registered_operators()
        raise ValueError(f'{name!r} is no operator of MXNet {mx.__version__}.{nearest(name, known)}')
    return handle.value


@lru_cache(maxsize=None)
def canonical(name):
    """What JSON calls the operator that is also known by ``name``: 'elemwise_add' for '_plus'."""
    text = ctypes.c_char_p()
    check_call(_LIB.MXSymbolGetAtomicSymbolName(ctypes.c_void_p(operator(name)), ctypes.byref(text)))
    return text.value.decode()


def _signature(node):
    """(number of inputs, number of outputs) of an operator with the attributes of ``node``."""
    parameters = node.parameters
    try:
        return _counted(node.op, tuple(sorted(parameters.items())))
    except (MXNetError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f'node {node.name!r} ({node.op}): {reason}') from None


@lru_cache(maxsize=4096)
def _counted(op, attributes):
    symbol = _made(op, attributes)
    return len(symbol.list_inputs()), len(symbol.list_outputs())


def _outputs(node):
    """How many outputs a node has."""
    if node.op in (VARIABLE, *OURS):
        return 1
    return int(node.attrs.get('num_outputs', 1)) if node.subgraphs else _signature(node)[1]


def _made(op, attributes):
    """The operator by itself, with variables for its inputs."""
    return _symbol_creator(operator(op), [], None, [key for key, _ in attributes], [value for _, value in attributes],
                           'node', False)


def _numbered(name):
    yield name
    number = 2
    while True:
        yield f'{name}_{number}'
        number += 1


def _parsed(text):
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f'not the JSON of a symbol: {error}') from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ('nodes', 'heads')):
        raise ValueError("not the JSON of a symbol: it has no lists 'nodes' and 'heads'")
    return content


def _check_edges(content):
    """ValueError for nodes and edges that MXNet would not survive."""
    nodes = content['nodes']
    for place, node in enumerate(nodes):
        if not isinstance(node, dict) or not isinstance(node.get('name'), str) or not isinstance(node.get('op'), str):
            raise ValueError(f"node number {place} has no 'name' or no 'op'")
        if not isinstance(node.get('inputs'), list):
            raise ValueError(f"node {node['name']!r} has no list 'inputs'")
    readers = [*((f"node {node['name']!r}", node['inputs']) for node in nodes), ('the graph', content['heads'])]
    for reader, edges in readers:
        for edge in edges:
            if not isinstance(edge, list) or len(edge) < 2 or not all(type(part) is int for part in edge):
                raise ValueError(f'{reader} reads {edge!r}: an edge is [node, output, version]')
            if not 0 <= edge[0] < len(nodes):
                raise ValueError(f'{reader} reads node number {edge[0]}, but there are {len(nodes)}')
    made = [Node(node['op'], node['name'], {}, [], []) for node in nodes]
    for node, described in zip(made, nodes):
        node.inputs = [Entry(made[number]) for number, *_ in described['inputs']]
        if node.op not in (VARIABLE, *OURS):
            try:
                operator(node.op)
            except ValueError as error:
                raise ValueError(f'node {node.name!r}: {error}') from None
    ancestors([Entry(node) for node in made])


def _up_to_date(text):
    """JSON as this MXNet writes it; ours, with quantizers in it, is already."""
    content = json.loads(text)
    if any(node['op'] in OURS for node in content['nodes']):
        return text
    if len({node['name'] for node in content['nodes'] if node['op'] == VARIABLE}) < sum(
            node['op'] == VARIABLE for node in content['nodes']):
        names = Counter(node['name'] for node in content['nodes'] if node['op'] == VARIABLE)
        raise ValueError(f'two variables are called {names.most_common(1)[0][0]!r}')
    try:
        return mx.sym.load_json(text).tojson(remove_amp_cast=False)
    except MXNetError as error:
        for node in content['nodes']:
            if node['op'] != VARIABLE and not node.get('subgraphs'):
                _signature(Node(node['op'], node['name'], node.get('attrs', node.get('param', {})), [], []))
        raise ValueError(f'MXNet cannot read the symbol: {str(error).strip().splitlines()[-1]}') from None
