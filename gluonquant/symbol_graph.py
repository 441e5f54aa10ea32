"""A symbol as nodes that Python can rewire: the typed view of the JSON that `Symbol.tojson` writes."""
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple


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


class Entry(NamedTuple):
    """One output of a node. ``version`` counts the operators that have written to a variable so far."""
    node: Node
    index: int = 0
    version: int = 0


def ancestors(entries):
    """Every node that ``entries`` need, each behind its inputs, in the order in which MXNet visits them."""
    order, seen, stack = [], set(), [(None, iter(entries))]
    while stack:
        node, inputs = stack[-1]
        entry = next((entry for entry in inputs if entry.node not in seen), None)
        if entry is not None:
            seen.add(entry.node)
            stack.append((entry.node, iter(entry.node.inputs)))
        else:
            order.append(node)
            stack.pop()
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
        self._readers = defaultdict(list)
        for node in [*self.nodes(), self.heads]:
            for entry in node.inputs:
                self._readers[entry.node].append(node)

    @classmethod
    def load(cls, text):
        """From the JSON of a symbol."""
        content, nodes = json.loads(text), []
        for node in content['nodes']:
            nodes.append(Node(node['op'], node['name'], node.get('attrs', {}),
                              [Entry(nodes[number], *rest) for number, *rest in node['inputs']],
                              node.get('subgraphs', [])))
        return cls([Entry(nodes[number], *rest) for number, *rest in content['heads']], content.get('attrs', {}))

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
        return json.dumps({'nodes': described, 'arg_nodes': [number[node] for node in nodes if node.op == 'null'],
                           'heads': entries(self.heads), 'attrs': self.attrs}, ensure_ascii=False)

    def nodes(self):
        """All nodes, each behind its inputs."""
        return ancestors(self.heads.inputs)

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
