"""`finalize`: the net as it is deployed, still a net that trains."""
import copy
import logging

import numpy as np
from mxnet import nd
from mxnet.gluon import Block

from .graph import inference_graph
from .integer.constants import INT32, absorb, bias_codes
from .quantizers import OBSERVE, LSQPlusActivation
from .symbol_graph import BIAS

_log = logging.getLogger(__name__)


def finalize(net, *, inputs='data', overflow='raise', int4=False):
    """A copy of a quantized net in which everything is as integer engines compute it.

    - Each BatchNorm behind a layer is merged: into the bias, and into one factor per output channel behind the weight's
      quantizer, which engines take into the scale. Codes of weights stay.
    - Biases lie on the int32 grid of the sums that they are added to, see `quantizers.BiasQuantizer`. That changes the
      net's outputs, visibly below 8 bits: train the result for a while then, it learns like any other net.
    - Offsets of LSQ+ are whole numbers of steps.

    ``net`` itself stays as it is. `export_onnx` finalizes what is not final.

    Parameters
    ----------
    net : HybridBlock from `convert`, or GraphNet from `attach`; calibrated, with values.
    inputs : str or sequence of str
        Names of the inputs of a converted net.
    overflow : 'raise' or 'zero'
        What to do with a channel whose bias int32 cannot hold, because its weights are tiny. 'zero': leave the weights
        out; they add next to nothing to such a bias.
    int4 : bool
        Weights of at most 4 bits have to fit signed 4-bit containers, too. Where a negative BatchNorm factor turns
        signs, the lowest code has no counterpart; it moves up by one step. Without it, that concerns 8-bit codes only.

    Returns
    -------
    GraphNet

    Raises
    ------
    TypeError
        ``net`` is no block.
    ValueError
        The net is not quantized; a bias does not fit int32 (layer, channels and the size of a step are named).
    RuntimeError
        A quantizer has no range yet, or is switched off.
    """
    if overflow not in ('raise', 'zero'):
        raise ValueError(f"overflow={overflow!r}: pass 'raise' or 'zero'")
    if not isinstance(net, Block):
        raise TypeError(f'net is a {type(net).__name__}: pass a net from gq.convert or gq.attach')
    source = inference_graph(net, inputs)
    if not source._children:
        raise ValueError(f'{type(net).__name__} has no quantizer: quantize it with gq.convert or gq.attach first')
    for path, quantizer in source._children.items():
        check_deployable(path, quantizer)
    nd.waitall()            # a static graph does not tell what it writes
    made = copy.deepcopy(source)
    made.cast('float32')
    made.merge_batchnorm()
    for quantizer in made._children.values():
        if isinstance(quantizer, LSQPlusActivation):
            quantizer.nudge_offset()
    made.quantize_biases()
    for node in made.graph.nodes():
        if node.op == BIAS:
            layer = made.graph.readers(node)[0]
            _move_lowest(made, layer, int4)
            _fit_bias(made, layer, node, overflow)
    return made


def check_deployable(path, quantizer):
    """RuntimeError for a quantizer that does not quantize at inference, or has no range."""
    if quantizer.grid is None:
        return
    quantizer.require_range()
    if quantizer.value('mode')[0] <= OBSERVE:
        raise RuntimeError(f'{path} is switched off: gq.set_mode(net, "quantize") first')
    if getattr(quantizer, 'delay_quant', 0) and quantizer.value('steps')[0] < quantizer.delay_quant:
        raise RuntimeError(f'{path} does not quantize before {quantizer.delay_quant} training steps and has seen '
                           f'{int(quantizer.value("steps")[0])}: train on')
    if 'phase' in quantizer._reg_params and quantizer.value('phase')[0] < 1:
        raise RuntimeError(f'{path} only clips in its first phase: gq.set_phase(net, True) and fine-tune first')


def weight_of(net, layer):
    """(codes, scale, factor) of a layer's quantized weight: int32, float32 (1,) or (channels,), float32 or None."""
    node, factor = net.weight_parts(layer)
    quantizer = net._children[node.attrs['quantizer']]
    weight = net.compute(node.inputs[0])
    scale, zero_point = quantizer.qparams(weight)
    if not np.isfinite(weight.asnumpy()).all():
        raise ValueError(f'the weight of {net.label(layer)!r} is not finite: training has diverged. Go back to an '
                         'earlier checkpoint')
    codes = quantizer.quantize(weight).asnumpy()
    zeros = zero_point if quantizer.per_channel else zero_point[:1]
    shape = [1] * codes.ndim
    shape[quantizer.axis if quantizer.per_channel else 0] = -1
    return codes - zeros.reshape(shape), scale, None if factor is None else net.compute(factor).asnumpy()


def _move_lowest(net, layer, int4):
    """Make room for the sign that a negative factor turns: the lowest code of a full grid has no counterpart."""
    node, factor = net.weight_parts(layer)
    grid = net._children[node.attrs['quantizer']].grid
    container = 4 if int4 and grid.bits <= 4 else 8
    if factor is None or -grid.qmin < 2 ** (container - 1):
        return
    codes, scale, factor = weight_of(net, layer)
    turned = factor.reshape([-1] + [1] * (codes.ndim - 1)) < 0
    lowest = (codes == grid.qmin) & turned
    if not lowest.any():
        return
    parameter = net.parameter(node.inputs[0].node.name)
    steps = np.broadcast_to(scale.reshape([-1] + [1] * (codes.ndim - 1)), codes.shape)
    values = np.where(lowest, np.float32(grid.qmin + 1) * steps, parameter._reduce().asnumpy())
    parameter.set_data(nd.array(values, dtype=parameter.dtype))
    _log.info('%s: %d of %d weights move from code %d to %d, which has a counterpart of the other sign',
              net.label(layer), lowest.sum(), lowest.size, grid.qmin, grid.qmin + 1)


def _fit_bias(net, layer, node, overflow):
    codes, scale, factor = weight_of(net, layer)
    weights, scale = absorb(codes, scale, factor)
    bias = net.compute(node.inputs[0]).asnumpy()
    activation = net._children[node.attrs['activation']]
    step, zero = (values[0] for values in activation.qparams())
    reach, _ = bias_codes(bias, step, scale)
    idle = ~weights.reshape(len(weights), -1).any(1)
    # Room for the sum of products, too: engines add the bias first.
    most = max(zero - activation.grid.qmin, activation.grid.qmax - zero)
    room = INT32 - most * np.abs(weights.reshape(len(weights), -1)).sum(1).astype(np.float64)
    large = np.flatnonzero((np.abs(reach) > room) & ~idle)
    if large.size and overflow == 'raise':
        worst = large[np.abs(reach[large]).argmax()]
        raise ValueError(f'layer {net.label(layer)!r}: the bias of {large.size} of {len(bias)} channels '
                         f'({", ".join(map(str, large[:8]))}{", ..." if large.size > 8 else ""}) does not fit int32: '
                         f'channel {worst} has {bias[worst]:.6g}, which is {abs(reach[worst]):.3g} steps of '
                         f'{step * np.broadcast_to(scale, bias.shape)[worst]:.3g}. The weights of such channels are '
                         "tiny beside their bias: leave them out with overflow='zero', or keep the layer float")
    silent = np.flatnonzero((idle & (np.abs(reach) > INT32)) | np.isin(np.arange(len(bias)), large))
    if silent.size:
        _silence(net, layer, node, silent)


def _silence(net, layer, node, channels):
    """Multiply the weights of ``channels`` by 0, so that their bias needs no grid."""
    _, factor = net.weight_parts(layer)
    if factor is None:
        factor = net.add_factor(layer, node)
    parameter = net.parameter(factor.node.name)
    values = parameter._reduce().asnumpy()
    values.reshape(-1)[channels] = 0
    parameter.set_data(nd.array(values, dtype=parameter.dtype))
