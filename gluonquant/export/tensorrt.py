"""TensorRT: ranges for builders without explicit quantization, and the rules of explicit quantization as a check.

The rules are those of NVIDIA's documentation, "Working with Quantized Types" (explicit quantization, Q/DQ placement).
"""
import json
import os
import struct
from typing import NamedTuple

import numpy as np

from .. import integer
from ..files import replacing
from .engines import PLAIN
from .lower import Lowering
from .onnx_file import final_net, input_shapes, require, write

_CACHE_HEADER = 'TRT-8601-EntropyCalibration2'
_QUANTIZABLE = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')


def export_tensorrt_ranges(net, path, input_shape, *, onnx_path=None, inputs='data', overflow='raise'):
    """Write the trained ranges of activations for a TensorRT builder that quantizes by itself.

    Parameters
    ----------
    net : as for `export_onnx`; quantized with ``target='tensorrt'``, to 8 bits.
    path : str
        ``*.json``: {tensor: largest magnitude}, for ``ITensor.set_dynamic_range``. Anything else: a calibration cache,
        scales as big-endian float32 in hexadecimal, for an ``IInt8Calibrator`` that reads it.
    input_shape, inputs, overflow : as for `export_onnx`
    onnx_path : str, optional
        Where to write the float graph that the ranges belong to, with the same names of tensors, BatchNorm merged and
        weights that lie on their trained grids.

    Returns
    -------
    dict, {tensor: largest magnitude}

    Raises
    ------
    ValueError
        A quantizer that is not symmetric, signed and of 8 bits; it is named.
    """
    final = final_net(net, inputs, overflow)
    lowering = Lowering(final, input_shapes(final, input_shape), PLAIN)
    model = lowering.model()
    ranges = {name: float(np.float32(127) * np.float32(grid.scale)) for name, grid in lowering.ranges.items()}
    if onnx_path is not None:
        write(require('onnx', 'to write ONNX files'), model, onnx_path)
    if os.fspath(path).endswith('.json'):
        content = json.dumps(ranges, indent=1)
    else:
        lines = [f'{name}: {struct.pack(">f", reach / 127).hex()}' for name, reach in ranges.items()]
        content = '\n'.join([_CACHE_HEADER, *lines, ''])
    with replacing(path) as file:
        file.write(content.encode())
    return ranges


class Finding(NamedTuple):
    """A rule that a graph breaks. ``severity``: 'error' (the builder refuses or computes something else) or
    'warning' (it runs slower)."""
    severity: str
    rule: str
    node: str
    message: str


def lint_tensorrt(model):
    """Which rules of TensorRT's explicit quantization an ONNX graph breaks.

    Parameters
    ----------
    model : str, the path of an ONNX file, or integer.Model

    Returns
    -------
    list of Finding, errors first; empty for a graph that `export_onnx` wrote with ``target='tensorrt'`` from a net
    that was attached for it.
    """
    model = model if isinstance(model, integer.Model) else integer.read(model)
    makers, readers = model.maker(), model.readers()
    found = []

    def tell(severity, rule, node, message):
        found.append(Finding(severity, rule, node.name, message))
    if model.opset < 13:
        found.append(Finding('error', 'opset', '', f'opset {model.opset}: scales per channel need opset 13'))
    for node in model.nodes:
        if node.op in ('QuantizeLinear', 'DequantizeLinear'):
            _check_pair(model, node, makers, readers, tell)
        elif node.op in _QUANTIZABLE:
            _check_layer(model, node, makers, readers, tell)
        elif node.op == 'Add':
            _check_sum(node, makers, readers, tell)
        elif any(makers[name].op == 'QuantizeLinear' for name in node.inputs if name in makers):
            tell('error', 'integers', node, f'{node.op} reads integers, only DequantizeLinear may')
    return sorted(found, key=lambda finding: finding.severity)


def _check_pair(model, node, makers, readers, tell):
    source, scale_name, *zero_name = node.inputs
    scale, zero = (model.constants.get(name) for name in (scale_name, zero_name[0] if zero_name else None))
    if scale is None:
        tell('error', 'constant scale', node, 'its scale is no constant')
        return
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        tell('error', 'positive scale', node, f'its scale has the value {scale[~(scale > 0)].reshape(-1)[:1]}')
    if zero is not None and zero.any():
        tell('error', 'symmetric', node, f'its zero point is {zero.reshape(-1)[0]}, TensorRT wants 0')
    if zero is not None and zero.dtype == np.uint8 and zero_name[0] not in model.types:
        tell('error', 'signed', node, 'its codes are uint8, TensorRT wants int8')
    if zero is not None and zero.dtype == np.int32:
        tell('error', 'float bias', node, 'it holds a bias as integers, TensorRT wants it float')
    if source not in model.constants and np.size(scale) > 1:
        tell('error', 'scale per tensor', node, f'an activation has {np.size(scale)} scales, TensorRT wants one')
    if node.op == 'QuantizeLinear' and any(reader.op != 'DequantizeLinear' for reader in readers[node.outputs[0]]):
        others = {reader.op for reader in readers[node.outputs[0]]} - {'DequantizeLinear'}
        tell('error', 'pairs', node, f'{", ".join(sorted(others))} stands between it and DequantizeLinear')


def _check_layer(model, node, makers, readers, tell):
    quantized = [name in makers and _on_grid(makers, name) for name in node.inputs[:2]]
    if quantized == [False, True]:
        tell('warning', 'both inputs', node, 'its weight is quantized, its input is not: it runs in float')
    elif quantized == [True, False]:
        tell('warning', 'both inputs', node, 'its input is quantized, its weight is not: it runs in float')
    weight = makers.get(node.inputs[1])
    if weight is not None and weight.op == 'DequantizeLinear':
        turned = node.op in ('Gemm', 'MatMul') and not node.attrs.get('transB')
        axis = int(turned or node.op == 'ConvTranspose')
        if np.size(model.constants.get(weight.inputs[1])) > 1 and weight.attrs.get('axis', 1) != axis:
            tell('error', 'output channels', node, f'its weight has scales along axis {weight.attrs.get("axis", 1)}, '
                 f'output channels are axis {axis}')
    for reader in readers[node.outputs[0]]:
        if reader.op != 'QuantizeLinear':
            continue
        behind = [after for pair in readers[reader.outputs[0]] for after in readers[pair.outputs[0]]]
        for after in behind:
            if after.op in ('Relu', 'BatchNormalization'):
                tell('warning', 'fusion', node, f'it is quantized in front of {after.op} {after.name!r}, which could '
                     'have been fused into it')


def _check_sum(node, makers, readers, tell):
    """A convolution is fused with the sum behind it if only the other input is quantized."""
    for name in node.inputs:
        pair = makers.get(name)
        encoder = makers.get(pair.inputs[0]) if pair is not None and pair.op == 'DequantizeLinear' else None
        layer = makers.get(encoder.inputs[0]) if encoder is not None and encoder.op == 'QuantizeLinear' else None
        if layer is not None and layer.op == 'Conv' and len(readers[layer.outputs[0]]) == 1 and len(
                readers[name]) == 1:
            others = [makers.get(other) for other in node.inputs if other != name]
            if all(other is not None and other.op == 'DequantizeLinear' for other in others):
                tell('warning', 'fused sum', node, f'its input from {layer.name!r} is quantized: quantize the shortcut '
                     'only, so that sum and convolution are one')


def _on_grid(makers, name):
    """Whether a tensor is dequantized, directly or behind what only moves elements."""
    while name in makers:
        node = makers[name]
        if node.op == 'DequantizeLinear':
            return True
        if node.op not in ('MaxPool', 'Flatten', 'Reshape', 'Transpose', 'Slice', 'Squeeze', 'Unsqueeze', 'Concat'):
            return False
        name = node.inputs[0]
    return False
