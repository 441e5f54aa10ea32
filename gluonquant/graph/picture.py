"""What a picture of a graph shows: boxes, what they read, and which of them repeat."""
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, List, NamedTuple, Optional

from ..batchnorm import parts
from ..layers import quantizers
from ..symbol_graph import FOLDED, QUANTIZE, VARIABLE
from ..trace import LAYER_OPS
from .place import SUMS
from .repeat import runs
from .target import grids

# Stand in the box of the layer, the sum or the like that they read, if nothing else reads it.
CONTINUING = ('Activation', 'BatchNorm', 'Dropout', 'LeakyReLU', 'clip', 'hard_sigmoid', 'relu', 'sigmoid', 'tanh')
CONTINUED = (*LAYER_OPS, FOLDED, *SUMS, *CONTINUING)
# What people want to know of other operators than layers and poolings.
SHOWN = {'Activation': '{act_type}', 'LeakyReLU': '{act_type}', 'clip': 'clip {a_min} to {a_max}',
         'Concat': 'Concat dim {dim}', 'SliceChannel': 'split into {num_outputs}', 'Reshape': 'Reshape {shape}',
         'transpose': 'transpose {axes}', 'mean': 'mean axis {axis}', 'UpSampling': 'UpSampling {scale}',
         'Cast': 'Cast {dtype}', 'slice_axis': 'slice axis {axis} {begin}:{end}', '_mul_scalar': '* {scalar}',
         '_plus_scalar': '+ {scalar}', 'softmax': 'softmax axis {axis}'}


@dataclass(eq=False)
class Box:
    """A node of the picture: an input or output of the net, a quantizer, or an operator with what continues it.

    Attributes
    ----------
    kind : 'end', 'quantizer', 'operator' or 'layer'
    name : str
    lines : list of str
    inputs : list of (Box, output)
    after : list of str, the operators that continue it
    method : str, optional
    alarm : str, what is float in a layer that could be quantized
    details : list, whatever else tells this box from others
    group : str, the quantizer's path if several boxes have it in common
    quantizers : list, those of all boxes that are drawn as this one
    """
    kind: str
    name: str
    lines: List[str]
    inputs: List[Any] = field(default_factory=list)
    after: List[str] = field(default_factory=list)
    method: Optional[str] = None
    alarm: str = ''
    details: List[Any] = field(default_factory=list)
    group: Optional[str] = None
    quantizers: List[Any] = field(default_factory=list)

    @property
    def key(self):
        """What is equal for boxes that look the same, but for their names."""
        return self.kind, self.method, self.alarm, str(self.lines), str(self.after), str(self.details)


class Cluster(NamedTuple):
    """A block that stands for ``count`` equal ones in a row, from the layer ``first`` to the layer ``last``."""
    boxes: List[Box]
    count: int
    first: str
    last: str


class Picture(NamedTuple):
    """Boxes, each behind its inputs, and the clusters among them."""
    boxes: List[Box]
    clusters: List[Cluster] = ()


def make_picture(net):
    """The `Picture` of a GraphNet, uncollapsed."""
    return Picture(_Reader(net).boxes())


class _Reader:
    """Makes boxes of nodes."""

    def __init__(self, net):
        self.net, self.graph = net, net.graph
        self.quantizers = {path: quantizer for path, quantizer in quantizers(net).items() if quantizer.grid is not None}
        self.nodes = self.graph.nodes()
        uses = Counter(node.attrs['quantizer'] for node in self.nodes if node.op == QUANTIZE)
        self.shared = {path: number for number, path in
                       enumerate((path for path, count in uses.items() if count > 1), 1)}
        self.box_of = {}        # nodes that come from Parameters alone have none
        self.grids = {node: path for node, path in grids(self.graph).items() if path in self.quantizers}

    def boxes(self):
        """One for each input, operator and output, each behind its inputs."""
        made = []
        for node in self.nodes:
            drawn = [entry for entry in node.inputs if entry.node in self.box_of]
            if node.name in self.net.paths if node.op == VARIABLE else node.inputs and not drawn:
                continue
            if self._continues(node, drawn):
                box = self.box_of[node] = self.box_of[drawn[0].node]
                box.after.append(_title(node.op, node.attrs))
                box.details.append(_settings(node))
            else:
                box = self.box_of[node] = self._box(node)
                box.inputs = self._edges(drawn)
                made.append(box)
        heads = self.graph.heads.inputs
        for number, entry in enumerate(heads, 1):
            text = 'output' if len(heads) == 1 else f'output {number}'
            made.append(Box('end', text, [text], self._edges([entry])))
        return made

    def _edges(self, entries):
        return [(self.box_of[entry.node], entry.index) for entry in entries if entry.node in self.box_of]

    def _continues(self, node, drawn):
        if node.op not in CONTINUING or len(drawn) != 1 or len(self.graph.readers(drawn[0].node)) > 1:
            return False
        return drawn[0].node.op in (LAYER_OPS if node.op == 'BatchNorm' else CONTINUED)

    def _box(self, node):
        name = self.net.label(node)
        if node.op == VARIABLE:
            return Box('end', name, [name])
        if node.op == QUANTIZE:
            return self._quantizer(node, name)
        if node.op == FOLDED or node.op in LAYER_OPS:
            return self._layer(node, name)
        return Box('operator', name, [_title(node.op, node.attrs)], details=[_settings(node)])

    def _quantizer(self, node, name):
        path = node.attrs['quantizer']
        if path not in self.quantizers:
            return Box('quantizer', name, ['none'])
        quantizer, number = self.quantizers[path], self.shared.get(path)
        return Box('quantizer', name, [_spec(quantizer) + (f' · shared {number}' if number else '')],
                   method=quantizer.method, details=[node.attrs['spec']], group=path if number else None,
                   quantizers=[quantizer])

    def _layer(self, node, name):
        if node.op == FOLDED:
            op, attrs, settings = parts(node)
            weight = self.quantizers.get(node.attrs.get('quantizer'))
            box = Box('layer', name, [_title(op, attrs)], after=['BatchNorm (folded)'], details=[attrs, settings])
        else:
            weight = self.net.quantizer(node.inputs[1])
            box = Box('layer', name, [_title(node.op, node.attrs)], details=[_settings(node)])
        if weight is not None and weight.grid is not None:
            box.method = weight.method
            box.lines.insert(1, f'weight {_spec(weight)}' + ' per channel' * weight.per_channel)
        if self.quantizers:
            known = {'input': self.grids.get(node.inputs[0].node), 'weight': box.method}
            floats = [part for part, quantized in known.items() if quantized is None]
            box.alarm = f'{" and ".join(floats)} float' if floats else ''
        return box


def _spec(quantizer):
    return f'{quantizer.method} {quantizer.grid.bits}{"s" if quantizer.grid.signed else "u"}'


def _settings(node):
    return node.parameters, node.subgraphs


def _title(op, attrs):
    """An operator and what matters of its attributes."""
    if op in ('Convolution', 'Deconvolution'):
        groups = int(attrs.get('num_group', 1))
        return f'{op} {attrs["num_filter"]} {_window(attrs)}' + (f' groups {groups}' if groups > 1 else '')
    if op == 'FullyConnected':
        return f'{op} {attrs["num_hidden"]}'
    if op == 'Pooling':
        kind = attrs.get('pool_type', 'max')
        return f'Pooling {kind} global' if attrs.get('global_pool') == 'True' else f'Pooling {kind} {_window(attrs)}'
    with suppress(KeyError):
        return SHOWN[op].format_map(attrs)
    return op.lstrip('_').replace('contrib_', '')


def _window(attrs):
    """'3x3/2': kernel and stride; dilation behind it if there is any."""
    kernel, stride, dilate = (attrs.get(name, '').strip('()[] ').replace(' ', '').rstrip(',').split(',')
                              for name in ('kernel', 'stride', 'dilate'))
    return 'x'.join(kernel) + _unless_one('/', stride) + _unless_one(' dilate ', dilate)


def _unless_one(sign, sizes):
    return '' if set(sizes) <= {'1', ''} else sign + ('x'.join(sizes) if len(set(sizes)) > 1 else sizes[0])


def collapsed(picture):
    """The picture with the first copy only of blocks that repeat, whose boxes change to stand for all."""
    clusters, instead, dropped = [], {}, set()
    for copies in runs(picture.boxes):
        first, last = copies[0], copies[-1]
        for place, box in enumerate(first):
            box.quantizers = [quantizer for copy in copies for quantizer in copy[place].quantizers]
        instead[last[-1]] = first[-1]
        dropped.update(box for copy in copies[1:] for box in copy)
        clusters.append(Cluster(first, len(copies), _ends(first)[0], _ends(last)[-1]))
    boxes = [box for box in picture.boxes if box not in dropped]
    for box in boxes:
        box.inputs = [(instead.get(source, source), index) for source, index in box.inputs]
    return Picture(boxes, clusters)


def _ends(boxes):
    """The names of the first and the last layer."""
    named = [box.name for box in boxes if box.kind == 'layer'] or [box.name for box in boxes]
    return named[0], named[-1]
