"""What nodes are called where people read about them."""
from ..layers import named_blocks
from ..symbol_graph import FOLDED, VARIABLE
from ..trace import LAYER_OPS


def short_name(name, scope):
    """``name`` with its longest beginning that is a key of ``scope`` replaced by the value."""
    start = max((start for start in scope if name.startswith(start)), key=len, default='')
    return scope.get(start, '') + name[len(start):]


def scope_of(net):
    """The `short_name` scope of a traced block: its own prefix is left out, that of a part with another is a path."""
    scope = {net.prefix: ''}
    for path, block in named_blocks(net):
        if block.prefix and not any(block.prefix.startswith(start) for start in scope if start):
            scope[block.prefix] = f'{path}_' if path else ''
    return {start: short for start, short in scope.items() if start}


def layer_path(node, paths):
    """The path of the layer whose weight ``node`` reads; None if it reads none that is known by a path."""
    if node.op not in (*LAYER_OPS, FOLDED) or len(node.inputs) < 2:
        return None
    path = paths.get(bound_variable(node.inputs[1]), '')
    return path[:-len('.weight')] if path.endswith('.weight') else None


def bound_variable(entry):
    """The name of the weight that ``entry`` is, or that is the first input of what computes it."""
    while entry.node.op != VARIABLE:
        entry = entry.node.inputs[0]
    return entry.node.name
