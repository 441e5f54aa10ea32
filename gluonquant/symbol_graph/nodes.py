"""Nodes of a graph and the edges between them."""
import re
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

# Our own operators in a Graph become MXNet's when they run: a quantizer, a layer with its BatchNorm folded into it, and
# a quantizer of a bias, whose grid follows from those of the layer's input and weight.
QUANTIZE, FOLDED, BIAS = 'gluonquant', 'gluonquant_folded', 'gluonquant_bias'
OURS = (QUANTIZE, FOLDED, BIAS)
VARIABLE = 'null'           # MXNet's word
TWIN = '__twin__'           # attribute of a node that stands for another one where the net trains: its name


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


def integers(text):
    """The numbers in a shape as attributes write it: '(3, 3)', '[3,3]', in files of Python 2 '(3L, 3L)', 'None'."""
    return tuple(int(number) for number in re.findall(r'-?\d+', text))


def numbered(name):
    """``name``, ``name_2``, ``name_3`` and so on."""
    yield name
    for number in count(2):
        yield f'{name}_{number}'


class Entry(NamedTuple):
    """One output of a node. ``version`` counts the operators that have written to a variable so far."""
    node: Node
    index: int = 0
    version: int = 0


def same(first, second):
    """Whether two entries are one tensor."""
    return first.node is second.node and first.index == second.index


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
