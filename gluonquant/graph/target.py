"""Where inference engines want their quantizers."""
from dataclasses import dataclass, replace
from typing import Optional, Tuple

from ..registry import nearest
from ..symbol_graph import QUANTIZE, VARIABLE

# What runs on codes as well as on values, so that its output stays on the grid of its input.
PASSING = frozenset({'Reshape', 'Flatten', 'transpose', 'SwapAxis', 'expand_dims', 'squeeze', '_copy', 'BlockGrad',
                     'slice', 'slice_axis', 'slice_like', 'SliceChannel', 'repeat', 'tile', 'broadcast_like',
                     'broadcast_to', 'broadcast_axis', 'reshape_like', 'depth_to_space', 'space_to_depth', 'reverse'})


@dataclass(frozen=True)
class Target:
    """How an engine wants a graph to be quantized.

    With a target, everything that reads a quantized tensor reads it quantized, because the engine stores it so;
    operators that only move or select values (max pooling, reshape, transpose, flatten, slices) pass a quantizer
    through; outputs of the net stay float.

    Parameters
    ----------
    name : str
    signed : bool, optional
        True: the engine knows signed codes only. None: unsigned where a tensor is never negative; the clip of an
        unsigned quantizer is the ReLU before it.
    sums : 'both' or 'shortcut'
        Which inputs of a sum are quantized. 'shortcut': the engine computes a sum together with the convolution that
        makes one of its inputs, and only the other one is stored.
    equal : tuple of str
        Operators all of whose inputs, and for Concat the output, share one scale. Calibration sees them as one tensor
        and freezes a range that would follow the data.
    outputs : bool
        Whether the output of each integer operator is quantized even if what reads it is not an integer operator.
    full_range : bool
        Whether signed 8-bit codes of method int8 use -128, too: the engine clips to its type for nothing, but to a
        narrower range at the cost of a further operator.
    """
    name: str
    signed: Optional[bool] = None
    sums: str = 'both'
    equal: Tuple[str, ...] = ('Concat',)
    outputs: bool = False
    full_range: bool = False

    def __post_init__(self):
        if self.sums not in ('both', 'shortcut'):
            raise ValueError(f"sums={self.sums!r}: pass 'both' or 'shortcut'")


TARGETS = {target.name: target for target in (
    Target('tensorrt', signed=True, sums='shortcut'),
    Target('onnxruntime', outputs=True, full_range=True),
    Target('openvino', sums='shortcut'),
    Target('onednn', sums='shortcut', full_range=True))}


def find(target):
    """The `Target` of this name, or the one given; None for None."""
    if target is None or isinstance(target, Target):
        return target
    if target not in TARGETS:
        raise ValueError(f'unknown target {target!r}.{nearest(target, TARGETS)} Known targets: '
                         f'{", ".join(sorted(TARGETS))}')
    return TARGETS[target]


def full_range(spec):
    """``spec`` of an activation with every code of 8 signed bits, if its method leaves that open."""
    if (spec.method, spec.bits, spec.signed) != ('int8', 8, True):
        return spec
    return replace(spec, options={'narrow_range': False, **spec.options})


def grids(graph):
    """{node: path of the quantizer on whose grid its outputs lie} of the nodes whose outputs lie on one."""
    found = {}
    for node in graph.nodes():
        if node.op == QUANTIZE:
            found[node] = node.attrs['quantizer']
        elif passes(node) or node.op == 'Concat':
            before = {found.get(entry.node) for entry in (node.inputs if node.op == 'Concat' else node.inputs[:1])}
            found[node] = before.pop() if len(before) == 1 else None
        elif node.op == 'broadcast_mul' and node.inputs[0].node.op == QUANTIZE and node.inputs[1].node.op == VARIABLE:
            found[node] = found[node.inputs[0].node]        # a weight and the factor of a merged BatchNorm
    return found


def passes(node):
    """Whether the output of ``node`` lies on any grid that its first input lies on."""
    if node.op == 'Pooling':
        return node.attrs.get('pool_type', 'max') == 'max'
    if node.op == 'Pad':
        return node.attrs.get('mode') != 'constant' or float(node.attrs.get('constant_value', 0)) == 0
    if node.op == 'UpSampling':
        return node.attrs.get('sample_type') == 'nearest' and len(node.inputs) == 1
    return node.op in PASSING
