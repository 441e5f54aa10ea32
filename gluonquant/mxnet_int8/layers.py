"""Convolutions and fully connected layers on integers."""
import json
from typing import Any, NamedTuple

import numpy as np

from ..finalize import weight_of
from ..integer.constants import absorb, bias_codes
from ..symbol_graph import BIAS, VARIABLE, Entry, Graph, Node, integers
from .forms import STEPS, calibrated
from .weights import imposed


class Step(NamedTuple):
    """How a layer with a quantized input was carried over.

    node : its name.   op : of MXNet.   how : 'fused', 'integer' or 'float', see `to_mxnet_int8`.   reason : why not
    fused, or what is not exact, or costs, if it is; else ''.
    """
    node: str
    op: str
    how: str
    reason: str


class Weight(NamedTuple):
    """Of a layer, as deployed.

    codes : int array (channels, ...).   step : float64 (channels,), the size of a code.   bias : float64 (channels,),
    with what the data's shift adds.
    """
    codes: Any
    step: Any
    bias: Any


def weight(net, node, data):
    """The `Weight` of a layer that reads the `Codes` ``data``, or the reason why it has none."""
    quantizer, _ = net.weight_parts(node)
    if quantizer is None or net._children[quantizer.attrs['quantizer']].grid is None:
        return 'its weight is float'
    codes, scale, factor = weight_of(net, node)
    codes, scale = absorb(codes, scale, factor)
    if codes.min() < -128 or codes.max() > 127:
        return f'codes of its weight reach from {codes.min()} to {codes.max()}, which int8 does not hold'
    bias = np.zeros(len(codes))
    if len(node.inputs) > 2 and node.inputs[2].node.op == BIAS:
        steps, scale = bias_codes(net.compute(node.inputs[2].node.inputs[0]).asnumpy(), data.scale, scale)
        bias = steps * (np.float32(data.scale) * scale)
    elif len(node.inputs) > 2:
        bias = net.compute(node.inputs[2]).asnumpy().astype(np.float64)
    step = np.broadcast_to(scale.astype(np.float64), codes.shape[:1])
    if data.shift:
        bias = bias - data.shift * data.scale * step * codes.reshape(len(codes), -1).sum(axis=1)
    return Weight(codes, step, bias)


def shape_refused(node, data):
    """Why MXNet has no integer operator for this layer, or None."""
    if node.op == 'Deconvolution':
        return 'MXNet has no integer transposed convolution'
    if node.op == 'FullyConnected':
        return None
    if len(integers(node.attrs['kernel'])) != 2 or node.attrs.get('layout', 'None') not in ('NCHW', 'None'):
        return 'MXNet has integer convolutions of two dimensions, in the layout NCHW, only'
    groups, channels = (int(node.attrs.get(name, 1)) for name in ('num_group', 'num_filter'))
    if groups not in (1, channels):
        # oneDNN is handed one scale per channel and reads one per group: .2 to .6 of the codes came out right.
        return f'MXNet has integer convolutions of 1 group, or of a group for each channel, but not of {groups}'
    if data.shift and any(integers(node.attrs.get('pad', '()'))):
        return 'the zero point of its input is not 0, but MXNet pads integers with 0'
    return None


def fused(writer, chain, data, made, rest):
    """The Entry of a convolution with the sum, the ReLU and the quantizer behind it, or the reason why there is none.

    Parameters
    ----------
    chain : Chain.   data, rest : Codes; ``rest``, or None, of the type of the output.   made : Weight.

    Returns
    -------
    (Entry, str) or str
        The second is what is not exact.
    """
    node, form = chain.layer, chain.form
    bias = made.bias + form.offset
    if rest is not None:
        bias = bias - rest.shift * rest.scale
    found = imposed(made.codes, made.step, data.scale, bias)
    if isinstance(found, str):
        return found
    values, factor, missed = found
    inputs = [data.entry, writer.constant(f'{node.name}_weight', values),
              writer.constant(f'{node.name}_bias', bias.astype(np.float32))]
    inputs += [rest.entry] if rest is not None else []
    inputs += writer.limits(f'{node.name}_data', data.scale * factor, data.dtype)
    inputs += writer.limits(f'{node.name}_sum', rest.scale, rest.dtype) if rest is not None else []
    # A ReLU makes the output uint8; for int8 there must be none. All other bounds than those of the type come behind
    # the operator.
    relu = form.dtype == 'uint8'
    flags = {'with_sum': rest is not None, 'with_postsum_act': relu and rest is not None,
             'with_act': relu and rest is None}
    out = writer.add('_sg_mkldnn_conv', node.name, inputs, _body(node, rest is not None, relu), quantized='true',
                     **{name: 'true' for name, on in flags.items() if on}, **calibrated(form.encoder, form.dtype))
    told = [f'{missed} of its {made.codes.size} weights are -128 instead of -127'] if missed else []
    if form.offset or rest is not None and rest.shift:
        told.append('its bias is rounded anew, because codes are moved')     # MXNet keeps whole steps of the sum
    return out, '; '.join(told)


def with_float_output(writer, node, data, made):
    """The Entry of a layer whose sums are integers: times the scale, plus the bias, in float; or a reason."""
    if node.op == 'Convolution' and data.dtype != 'uint8':
        return 'its input is signed, which only the fused convolution takes'
    if int(node.attrs.get('num_group', 1)) > 1:
        return 'it has groups, which only the fused convolution takes'
    shape = (1, -1) + (1,) * (made.codes.ndim - 2)
    ends = [np.float32([end]) for kind in (data.dtype, 'int8')
            for end in ((0 if kind == 'uint8' else -STEPS[kind]), STEPS[kind])]
    inputs = [data.entry, writer.constant(f'{node.name}_codes', made.codes.astype(np.int8)),
              *(writer.constant(f'{node.name}_end', end) for end in ends)]
    if node.op == 'Convolution':
        out = writer.add('_contrib_quantized_conv', node.name, inputs, **{**node.parameters, 'no_bias': 'True'})
        # Cast works in place and leaves a note in the memory that it holds integers, which oneDNN's elemwise_add
        # believes: it would read the bits of the floats. A slice of everything is a tensor without such a note.
        out = writer.add('Cast', f'{node.name}_cast', [out], dtype='float32')
        out = writer.add('slice_axis', f'{node.name}_float', [out], axis=0, begin=0, end=None)
    else:
        # Without this attribute, its output would need a range that nobody has trained.
        out = writer.add('_sg_mkldnn_fully_connected', node.name, inputs, _body(node), quantized='True',
                         enable_float_output='True')
    scale = writer.constant(f'{node.name}_scale', (made.step * data.scale).astype(np.float32).reshape(shape))
    out = writer.add('broadcast_mul', f'{node.name}_scaled', [out, scale])
    if not made.bias.any():
        return out
    bias = writer.constant(f'{node.name}_bias', made.bias.astype(np.float32).reshape(shape))
    return writer.add('broadcast_add', f'{node.name}_out', [out, bias])


def _body(node, summed=False, relu=False):
    """The layer as float operators: what MXNet reads the geometry of a fused one from."""
    bias = node.op == 'Convolution'
    names = ('x', 'w', 'b') if bias else ('x', 'w')
    last = Node(node.op, 'layer', {**node.parameters, 'no_bias': str(not bias)}, [_variable(name) for name in names],
                [])
    if summed:
        last = Node('elemwise_add', 'sum', {}, [Entry(last), _variable('s')], [])
    if relu:
        last = Node('Activation', 'relu', {'act_type': 'relu'}, [Entry(last)], [])
    return json.loads(Graph([Entry(last)], {}).dump())


def _variable(name):
    return Entry(Node(VARIABLE, name, {}, [], []))
