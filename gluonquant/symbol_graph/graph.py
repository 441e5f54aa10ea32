"""A symbol as nodes that Python can rewire: the typed view of the JSON that `Symbol.tojson` writes."""
import json
from collections import defaultdict

import mxnet as mx

from .file import parsed, up_to_date
from .nodes import BIAS, FOLDED, OURS, QUANTIZE, TWIN, VARIABLE, Entry, Node, ancestors, numbered, same
from .operators import outputs, signature


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
        graph = cls.load(up_to_date(parsed(text)))
        graph.check()
        return graph

    @classmethod
    def of(cls, symbol):
        """From a Symbol."""
        return cls.load(symbol.tojson(remove_amp_cast=False))

    def check(self):
        """ValueError, with its name, for a node that MXNet could not run."""
        for node in self.nodes():
            for body in node.subgraphs:
                try:
                    Graph.load(json.dumps(body)).check()
                except ValueError as error:
                    raise ValueError(f'node {node.name!r} ({node.op}), its body: {error}') from None
            if node.op in (VARIABLE, *OURS) or node.subgraphs:
                continue
            inputs, _ = signature(node)
            if len(node.inputs) != inputs:
                raise ValueError(f'node {node.name!r}: {node.op} reads {inputs} inputs, but has {len(node.inputs)}')
        for node in [*self.nodes(), self.heads]:
            for source, index, _ in node.inputs:
                if not 0 <= index < outputs(source):
                    reader = f'node {node.name!r} reads' if node is not self.heads else 'the graph returns'
                    raise ValueError(f'{reader} output {index} of {source.name!r} ({source.op}), which has '
                                     f'{outputs(source)}')

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
        changes = [(node, list(inputs))]
        while changes:
            node, inputs = changes.pop()
            before, node.inputs = node.inputs, inputs
            for entry in inputs:
                self._readers[entry.node].append(node)
            for entry in before:
                self._readers[entry.node].remove(node)
                if not self._readers[entry.node]:
                    changes.append((entry.node, []))

    def add(self, op, name, inputs, **attrs):
        """A new node with a name of its own, read by nothing yet; returns it."""
        node = Node(op, self.free_name(name), {key: str(value) for key, value in attrs.items()}, [], [])
        self.connect(node, inputs)
        return node

    def include(self, other):
        """Return the outputs of ``other``, too; what it computes as this graph does is computed once.

        A node of this graph stands for at most one of ``other``, with the same operator, parameters and inputs, or the
        same name if it is a variable. What is added notes its twin, see `_pair`.
        """
        known, named, mine, added = defaultdict(list), self.variables(), {}, {}
        before = self.nodes()
        for node in before:
            known[_signature(node, node.inputs)].append(node)
        for node in other.nodes():
            inputs = [Entry(mine[entry.node], *entry[1:]) for entry in node.inputs]
            equal = known[_signature(node, inputs)]
            if node.op == VARIABLE and node.name in named:
                mine[node] = named[node.name]
            elif node.op != VARIABLE and equal:
                mine[node] = equal.pop(0)
            else:
                mine[node] = Node(node.op, self.free_name(node.name), dict(node.attrs), [], node.subgraphs)
                self.connect(mine[node], inputs)
                added[mine[node]] = None
        self.connect(self.heads, [*self.heads.inputs, *(Entry(mine[entry.node], *entry[1:])
                                                        for entry in other.heads.inputs)])
        shared = set(mine.values())
        _pair([node for node in before if node not in shared], added)

    def part(self, heads):
        """A copy of what the entries ``heads`` need; it returns these."""
        whole, place = self.copy(), {node: number for number, node in enumerate(self.nodes())}
        nodes = whole.nodes()
        return Graph([Entry(nodes[place[entry.node]], *entry[1:]) for entry in heads], self.attrs)

    def twins(self):
        """{node that `include` added: the one of the same name that was there before}."""
        named = {node.name: node for node in self.nodes()}
        return {node: named[node.attrs[TWIN]] for node in named.values() if node.attrs.get(TWIN) in named}

    def strip(self):
        """Take the quantizers out, and BatchNorm out of the layers that it is folded into."""
        for node in self.nodes():
            if node.op == FOLDED:
                self.unfold(node)
        for node in self.nodes():
            if node.op in (QUANTIZE, BIAS):
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
        if TWIN in norm.attrs:
            attrs[TWIN] = norm.attrs[TWIN]
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
        found = next(other for other in numbered(name) if other not in self._names)
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
            if node.op in (QUANTIZE, BIAS):
                found[node, 0] = found.get(node.inputs[0][:2])
            else:
                if node.op == FOLDED:
                    next(remaining)         # the output of the layer in it
                found.update({(node, index): next(remaining) for index in range(outputs(node))})
        return {key: shape for key, shape in found.items() if shape}


def _pair(before, added):
    """Let nodes that were added note the names of their twins: nodes that do the same in another place.

    They read the same variable, a layer's weight for example, or are what twins read at the same place.
    """
    readers = defaultdict(list)
    for node in before:
        if node.op != VARIABLE:
            readers[_variables(node)].append(node)
    pairs = [(node, readers[_variables(node)].pop(0)) for node in added
             if any(_variables(node)[1]) and readers[_variables(node)]]
    for node, twin in pairs:
        node.attrs[TWIN] = twin.name
    while pairs:
        node, twin = pairs.pop()
        for (mine, *_), (theirs, *_) in zip(node.inputs, twin.inputs):
            if mine in added and VARIABLE not in (mine.op, theirs.op) and TWIN not in mine.attrs:
                mine.attrs[TWIN] = theirs.name
                if mine.op == theirs.op:
                    pairs.append((mine, theirs))


def _variables(node):
    return node.op, tuple(entry.node.name if entry.node.op == VARIABLE else '' for entry in node.inputs)


def _signature(node, inputs):
    """What two nodes have in common that compute the same."""
    return node.op, tuple(sorted(node.parameters.items())), tuple(entry[:2] for entry in inputs), str(node.subgraphs)


def _described(node):
    return json.dumps({'op': node.op, 'name': node.name, 'attrs': node.attrs})
