"""Putting a fused operator into a forward pass, imperative or symbolic."""
from collections.abc import Mapping

from mxnet.ndarray import NDArray

# MXNet sizes a buffer for shapes by adding up the inputs' dimensions, -1 for a tensor whose shape is not known yet,
# and then writes the known ones: with fewer inputs than this it writes outside (c_api.cc of 1.9.1).
_LEAST_PARAMETERS = 3


def fake_quantize(F, operator, tensors: Mapping, **attributes):
    """The fake-quantized tensor.

    Parameters
    ----------
    F : mxnet.ndarray or mxnet.symbol
    operator : str
        Name of the operator, from `ops.name`.
    tensors : {name of the input: array or symbol}
        The tensor to quantize first, under 'data'; then the quantizer's Parameters, among them 'mode'.
    attributes
        Options of the method; numbers, strings, booleans.
    """
    names, values = list(tensors), list(tensors.values())
    while len(names) <= _LEAST_PARAMETERS:
        names.append('mode')
        values.append(tensors['mode'])
    attributes = {key: int(value) if isinstance(value, bool) else value for key, value in attributes.items()}
    out = getattr(F._internal, operator)(*values, inputs=','.join(names), **attributes)
    return out if isinstance(out, NDArray) else out[0]      # [0] of a list or of a symbol
