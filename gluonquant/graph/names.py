"""What nodes are called where people read about them."""
from ..symbol_graph import FOLDED, VARIABLE
from ..trace import LAYER_OPS


def short_name(node, scope):
    """The name of a node without that of the net it was traced from, which is numbered differently in each process."""
    return node.name[len(scope):] if node.name.startswith(scope) else node.name


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
