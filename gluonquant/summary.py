"""`summary`: one row for each layer that is, or could be, quantized."""
import json
import math
from dataclasses import astuple, dataclass, fields, replace
from typing import Optional, Tuple

from mxnet.gluon import SymbolBlock

from .batchnorm import parts
from .graph import GraphNet
from .graph.names import bound_variable
from .graph.source import read
from .layers import LAYERS, QuantizedLayer, named_blocks
from .symbol_graph import FOLDED, QUANTIZE, TWIN
from .table import aligned
from .trace import LAYER_OPS

_LAYERS = (*LAYER_OPS, FOLDED)


@dataclass(frozen=True)
class Row:
    """One layer. Sizes are those of the weight, in bytes: float32, and packed codes with float32 scales.

    ``input`` and ``weight`` read like ``lsq 4u``: method, bits, and u for unsigned, s for signed codes.
    """
    name: str
    type: str
    shape: Optional[Tuple[int, ...]]
    input: str
    weight: str
    calibrated: str
    float_bytes: int
    quantized_bytes: int


@dataclass(frozen=True)
class Summary:
    """The rows of a net; ``print`` it, or take ``rows``, ``float_bytes`` and ``quantized_bytes``."""
    rows: Tuple[Row, ...]

    @property
    def float_bytes(self):
        """Bytes of all listed weights in float32."""
        return sum(row.float_bytes for row in self.rows)

    @property
    def quantized_bytes(self):
        """Bytes of all listed weights as they are quantized; float layers count in full."""
        return sum(row.quantized_bytes for row in self.rows)

    def __str__(self):
        header = [field.name.replace('_', ' ') for field in fields(Row)]
        rows = [['' if value is None else 'x'.join(map(str, value)) if isinstance(value, tuple) else str(value)
                 for value in astuple(row)] for row in self.rows]
        total = ['total', '', '', '', '', '', str(self.float_bytes), str(self.quantized_bytes)]
        return aligned(header, rows, total, right=(6, 7))


def summary(net):
    """Describe the layers of ``net``, quantized or float.

    Parameters
    ----------
    net : Block

    Returns
    -------
    Summary
    """
    rows = []
    for path, block in named_blocks(net):
        if isinstance(block, SymbolBlock):
            block = read(block).net()
        if isinstance(block, GraphNet):
            rows += _node_rows(path, block)
        elif isinstance(block, QuantizedLayer) or type(block) in LAYERS:
            rows.append(_row(path, block))
    return Summary(tuple(rows))


def _row(path, layer):
    shape = layer.weight.shape if layer.weight.shape and all(layer.weight.shape) else None
    size = 4 * math.prod(shape) if shape else 0
    if not isinstance(layer, QuantizedLayer):
        return Row(path, type(layer).__name__, shape, 'float', 'float', '', size, size)
    shared = layer.config.shares_input_with
    source = _describe(layer.input_quantizer) + (f' of {shared}' if shared else '')
    parts = [layer.input_quantizer, layer.weight_quantizer]
    calibrated = 'yes' if all(part.calibrated for part in parts) else 'no'
    return Row(path, type(layer).__name__, shape, source, _describe(layer.weight_quantizer), calibrated, size,
               _packed(layer.weight_quantizer, shape, size))


def _reads_quantized(node):
    return any(entry.node.op == QUANTIZE and json.loads(entry.node.attrs['spec'])['role'] == 'activation'
               for entry in node.inputs)


def _node_rows(path, net):
    """The nodes of a graph that have a weight, or of whose inputs some are quantized."""
    rows, seen = [], set()
    for node in net.graph.nodes():
        if (node.op in _LAYERS or _reads_quantized(node)) and TWIN not in node.attrs:
            row = _node_row(path, net, node)
            weight = bound_variable(node.inputs[1]) if node.op in _LAYERS else None
            # A layer that is used several times has one weight.
            rows.append(replace(row, float_bytes=0, quantized_bytes=0) if weight in seen else row)
            seen.update([weight] if weight else [])
    return rows


def _node_row(path, net, node):
    own, weight = net.quantizers_of(node)
    layer = node.op in _LAYERS
    shape = net.parameter(bound_variable(node.inputs[1])).shape if layer else None
    shape = shape if shape and all(shape) else None
    size = 4 * math.prod(shape) if shape else 0
    present = [part for part in [*own, weight] if part is not None]
    calibrated = ('yes' if all(part.calibrated for part in present) else 'no') if present else ''
    source = ', '.join(dict.fromkeys('float' if part is None else _describe(part) for part in own))
    described = '' if not layer else 'float' if weight is None else _describe(weight)
    kind = f'{parts(node)[0]} with BatchNorm' if node.op == FOLDED else node.op
    name = '.'.join(filter(None, (path, net.label(node))))
    return Row(name, kind, shape, source, described, calibrated, size,
               size if weight is None else _packed(weight, shape, size))


def _describe(quantizer):
    grid = quantizer.grid
    if grid is None:
        return 'float'
    return f'{quantizer.method} {grid.bits}{"s" if grid.signed else "u"}'


def _packed(quantizer, shape, size):
    if quantizer.grid is None or shape is None:
        return size
    scales = quantizer.scale_shape()[0]
    return math.ceil(math.prod(shape) * quantizer.grid.bits / 8) + 4 * scales
