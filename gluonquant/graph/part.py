"""Graphs inside a net of blocks, such as the features of gluoncv's SSDs: what `convert` does with a SymbolBlock."""
from mxnet.gluon import SymbolBlock

from ..layers import named_blocks
from ..symbol_graph import VARIABLE
from ..trace import LAYER_OPS
from . import source
from .attach import build
from .decide import Plan, called


class Part:
    """A SymbolBlock of a net, before anything is quantized.

    Attributes
    ----------
    path : str, where it stands
    layers : dict, {path in the net: list of nodes} of its layers, which may be used several times
    names : list of str, what patterns may call its layers
    """

    def __init__(self, path, block):
        self.path = path
        self._found = source.read(block)
        named = {node: called(self._found, node, path) for node in self._found.graph.nodes() if node.op != VARIABLE}
        self.layers = {}
        for node, names in named.items():
            if node.op in LAYER_OPS:
                self.layers.setdefault(names[-1], []).append(node)
        self.names = [name for node, names in named.items() if node.op in LAYER_OPS for name in names]

    def quantized(self, base, ends, first_last_bits, exclude, rules):
        """Its `GraphNet`, or None if all of it stays float. ``ends``: paths of the net's first and last layers."""
        plan = Plan(self._found, base, first_last_bits, exclude=exclude, rules=rules, above=self.path,
                    ends={node for path, nodes in self.layers.items() if path in ends for node in nodes})
        try:
            plan.decide()
            return build(self._found, plan) if plan.wishes or plan.weights else None
        except (ValueError, TypeError) as error:
            raise type(error)(f'{self.path}: {error}') from None


def parts(net):
    """{path: Part} of the SymbolBlocks below ``net`` that have layers."""
    found = {path: Part(path, block) for path, block in named_blocks(net)
             if isinstance(block, SymbolBlock) and block is not net}
    return {path: part for path, part in found.items() if part.layers}
