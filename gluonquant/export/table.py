"""The table of writers: MXNet's operators in terms of ONNX's, one function for each, from a node to a value.

A writer takes the `Lowering` and the node; it returns a value of `values`, or a list of them. Operators that only move
elements return `Moved`, so that they can run on codes; clamps return `Clamped`, so that they can become a part of the
quantizer behind them.
"""

import numpy as np

from ..symbol_graph import integers
from .values import Moved, Real

WRITERS = {}


def writes(*ops):
    """Function decorator: writes these operators of MXNet."""
    def enter(function):
        WRITERS.update(dict.fromkeys(ops, function))
        return function
    return enter


def real(to, node, op, inputs, **attrs):
    """Write one operator on real tensors."""
    return Real(to.write(op, inputs, to.name(node), **attrs))


def real_inputs(to, node):
    """The names of the inputs as real tensors."""
    return [to.real(to.value(entry)) for entry in node.inputs]


def moved(to, node, op, *others, fill=None, **attrs):
    """``op`` moves the first input; ``others`` are names of its further inputs."""
    def write(name, sources, grid):
        more = [] if fill is None else [fill(grid)]
        return to.write(op, [*sources, *others, *more], name, **attrs)
    return Moved(to.net.label(node), (to.value(node.inputs[0]),), write)


def indices(to, node, what, values):
    """The name of a constant of integers that belongs to ``node``."""
    return to.constant(f'{to.net.label(node)}.{what}', np.asarray(values, np.int64))


def sizes(node, name, axes, default=1):
    """An attribute of a window, one number for each axis."""
    return list(integers(node.attrs.get(name, ''))) or [default] * axes


def window_of(node, axes):
    """Strides, pads and dilations of a window."""
    return {'strides': sizes(node, 'stride', axes), 'pads': sizes(node, 'pad', axes, 0) * 2,
            'dilations': sizes(node, 'dilate', axes)}
