"""Nodes of the new graph."""
import numpy as np

from ..symbol_graph import VARIABLE, Entry, Node, numbered
from .forms import calibrated, limits, text


class Writer:
    """Makes nodes, each by a name of its own.

    Attributes
    ----------
    constants : dict, {name of a variable: array}
    """

    def __init__(self):
        self.constants, self._names = {}, set()

    def add(self, op, name, inputs, subgraph=None, **attrs):
        """The Entry of a new node."""
        name = next(other for other in numbered(name) if other not in self._names)
        self._names.add(name)
        return Entry(Node(op, name, {key: str(value) for key, value in attrs.items()}, list(inputs),
                          [] if subgraph is None else [subgraph]))

    def constant(self, name, array):
        """A variable with these values."""
        made = self.add(VARIABLE, name, [])
        self.constants[made.node.name] = np.ascontiguousarray(array)
        return made

    def limits(self, name, scale, dtype):
        """Two constants that tell MXNet the scale of a tensor, where an operator reads them."""
        return [self.constant(f'{name}_{end}', np.float32([value]))
                for end, value in zip(('min', 'max'), limits(scale, dtype))]

    def plus(self, entry, number, name):
        """An entry plus a number."""
        return entry if not number else self.add('_plus_scalar', name, [entry], scalar=text(number))

    def decoded(self, codes, name):
        """The float values of `Codes`."""
        out = self.add('_contrib_dequantize', name, [codes.entry, *self.limits(name, codes.scale, codes.dtype)])
        return self.plus(out, -codes.shift * codes.scale, f'{name}_shifted')

    def encoded(self, entry, name, form):
        """Float values in a `Form`, but for bounds other than those of its type."""
        moved = self.plus(entry, form.offset, f'{name}_offset')
        return self.add('_contrib_quantize_v2', name, [moved], out_type=form.dtype,
                        **calibrated(form.encoder, form.dtype))

    def pooled(self, node, entry, scale, dtype):
        """The max pooling ``node`` on codes."""
        return self.add('_contrib_quantized_pooling', node.name, [entry, *self.limits(node.name, scale, dtype)],
                        **node.parameters)

    def clipped(self, entry, name, form):
        """Codes within the bounds of a `Form`."""
        if not form.clips:
            return entry
        return self.add('clip', f'{name}_clip', [entry], a_min=form.low, a_max=form.high)
