"""What stands between a convolution and the quantizer behind it."""
from typing import Any, List, NamedTuple, Optional

from ..graph.target import passes
from ..symbol_graph import Node
from .forms import Form


class Chain(NamedTuple):
    """A convolution, a sum, what clamps and pools it, a quantizer: all that one operator, or two, compute.

    total : the sum of the convolution and the tensor ``rest``, or None.   pool : a max pooling, which takes the largest
    of codes as well as of values, or None.   form : of the quantizer, with the bounds of ReLU and clip.
    """
    layer: Node
    rest: Optional[Any]
    pool: Optional[Node]
    form: Form
    between: List[Node]


def find(graph, entry, form, stored):
    """The `Chain` that makes ``entry``, which only a quantizer reads, or None.

    Parameters
    ----------
    form : Form, of that quantizer
    stored : callable(Entry), whether a tensor of the graph is stored as codes
    """
    between, pool, rest = [], None, None
    last = entry.node
    while True:
        if is_relu(last):
            form = form.clamped(0, float('inf'))
        elif last.op == 'clip':
            form = form.clamped(float(last.attrs['a_min']), float(last.attrs['a_max']))
        elif is_max_pooling(last) and pool is None:
            pool = last
        else:
            break
        between.append(last)
        last = last.inputs[0].node
    if last.op == 'elemwise_add':
        between.append(last)
        for main, other in (last.inputs, last.inputs[::-1]):
            if main.node.op == 'Convolution' and len(graph.readers(main.node)) == 1 and stored(other):
                last, rest = main.node, other
                break
    if last.op != 'Convolution' or any(len(graph.readers(other)) > 1 for other in [*between, last]):
        return None
    return Chain(last, rest, pool, form, between)


def is_relu(node):
    """Whether ``node`` is a ReLU, by whatever name."""
    return node.op == 'relu' or node.op == 'Activation' and node.attrs['act_type'] == 'relu'


def is_max_pooling(node):
    """Whether ``node`` takes the largest of windows."""
    return node.op == 'Pooling' and passes(node)
