"""Graphs that stand in a net of blocks, in the place of SymbolBlocks."""
from ..layers import named_blocks
from .net import GraphNet


def graphs(net):
    """{path: GraphNet} of the graphs that stand in the place of SymbolBlocks below ``net``."""
    return {path: block for path, block in named_blocks(net) if isinstance(block, GraphNet) and block is not net}


def put(net, path, made):
    """Let a `GraphNet` stand for the SymbolBlock at ``path``, which it remembers."""
    block = dict(named_blocks(net))[path]
    made.__dict__['stands_for'] = block
    _replace(net, block, made)
    made.hybridize(True, **dict(block._flags))      # as a SymbolBlock always is


def restore(net):
    """Undo `put` everywhere below ``net``."""
    for made in graphs(net).values():
        _replace(net, made, made.stands_for)


def _replace(net, old, new):
    for _, block in list(named_blocks(net)):
        # Not by setattr: Gluon lets nobody change the type of a child.
        for place in (block._children, block.__dict__):
            for name, value in place.items():
                place[name] = _with(value, old, new)


def _with(value, old, new):
    """``value`` with ``new`` in the place of ``old``: if it is that, or a list, tuple or dict of blocks with it."""
    if type(value) is tuple:
        return tuple(new if item is old else item for item in value) if any(item is old for item in value) else value
    if type(value) in (list, dict):         # others may refer to it
        for key, item in list(value.items() if type(value) is dict else enumerate(value)):
            if item is old:
                value[key] = new
    return new if value is old else value
