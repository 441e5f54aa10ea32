"""`fold`: BatchNorm into the layers before it, in blocks and in attached graphs. `reestimate_batchnorm`."""
import logging
from contextlib import contextmanager
from dataclasses import replace

import mxnet as mx
from mxnet import nd
from mxnet.gluon import HybridBlock, nn

from .batchnorm import Layer, Settings, factor_and_shift, pairs
from .convert import clear_caches
from .graph import GraphNet
from .layers import FoldedBatchNorm, QuantizedLayer, fold_layer, named_blocks, quantizers
from .trace import traced

_log = logging.getLogger(__name__)
MODES = ('merge', 'frozen', 'batch')


def fold(net, mode='merge'):
    """Fold each BatchNorm of ``net`` into the layer before it, in place; returns net.

    With k = gamma / sqrt(var + eps), the layer's weight becomes k w and its bias (b - mean) k + beta. This is possible
    where nothing but the BatchNorm reads the layer's output; what cannot be folded stays as it is, and the log says why
    (for an attached net, `explain` does, too).

    Parameters
    ----------
    net : HybridBlock
        Float, converted or attached. Fold a quantized net before calibrating it, or calibrate it anew: its weights have
        other ranges then.
    mode : 'merge', 'frozen' or 'batch'
        'merge', for deployment: the Parameters are changed, the BatchNorm is gone. A weight that was quantized before
        it was folded keeps its codes: one factor per channel behind the quantizer takes up k.
        'frozen', for training: the quantizer sees k w; gamma and beta are trained, statistics stay. As FQN wants it.
        'batch', for training: the same, with the statistics of the batch, at the cost of a second, float, run of each
        layer. `freeze_batchnorm` makes it 'frozen'; do so before the last epochs, and before inference that is to be
        fast.

    Raises
    ------
    ValueError
        An unknown mode; no BatchNorm can be folded (the reasons are given); 'frozen' or 'batch' for float blocks, which
        have to be converted first.
    RuntimeError
        'merge', and some Parameter has no value yet.
    TypeError
        The net cannot be traced.
    """
    if mode not in MODES:
        raise ValueError(f'mode={mode!r}: pass one of {", ".join(map(repr, MODES))}')
    told = _fold_graph(net, mode) if isinstance(net, GraphNet) else _fold_blocks(net, mode)
    for name, what in told.items():
        _log.info('%s %s', name, what)
    if not any(what.startswith(('folded', 'merged')) for what in told.values()):
        reasons = '; '.join(f'{name} {what}' for name, what in list(told.items())[:4]) or 'it has none'
        raise ValueError(f'no BatchNorm of {type(net).__name__} can be folded: {reasons}')
    return net


def _fold_graph(net, mode):
    if mode == 'merge':
        return net.merge_batchnorm()
    told = net.fold_batchnorm()
    net.freeze_batchnorm(mode == 'frozen')
    return told


def _fold_blocks(net, mode):
    if not isinstance(net, HybridBlock):
        raise TypeError(f'{type(net).__name__} is no HybridBlock: fold its parts')
    blocks = dict(named_blocks(net))
    by_weight = {block.weight.name: path for path, block in blocks.items()
                 if isinstance(getattr(block, 'weight', None), mx.gluon.Parameter)}
    by_gamma = {block.gamma.name: path for path, block in blocks.items() if isinstance(block, nn.BatchNorm)}
    with _without_quantizers(net):
        graph, error = traced(net)
    if graph is None:
        raise TypeError(f'{type(net).__name__} cannot be traced: {error}')
    found, refused = pairs(graph)
    told = {by_gamma.get(norm.inputs[1].node.name, norm.name): f'stays: {reason}' for norm, reason in refused.items()}
    folds = [(by_weight[layer.inputs[1].node.name], by_gamma[norm.inputs[1].node.name], layer.op) for layer, norm in
             found if layer.inputs[1].node.name in by_weight and norm.inputs[1].node.name in by_gamma]
    folds += [(path, block.config.batchnorm, block.operator) for path, block in blocks.items()
              if isinstance(block, QuantizedLayer) and block.config.fold == 'folded']
    if mode != 'merge':
        folds = [(path, norm, op) for path, norm, op in folds if not isinstance(blocks[norm], FoldedBatchNorm)]
        for path, _, _ in folds:
            if not isinstance(blocks[path], QuantizedLayer):
                raise ValueError(f'layer {path!r} is float: convert the net first, or merge')
    else:
        for parameter in net.collect_params().values():
            if parameter._data is None and not hasattr(parameter, 'prepare'):
                raise RuntimeError(f'Parameter {parameter.name!r} has no value yet: run one batch through the net, or '
                                   'load its Parameters')
    for path, norm, op in folds:
        if mode == 'merge':
            _merge(blocks[path], blocks[norm], norm, op)
        else:
            blocks[norm]._kwargs['use_global_stats'] = mode == 'frozen'
            layer = blocks[path]
            layer.config = replace(layer.config, batchnorm=norm, fold='folded')
            fold_layer(layer, blocks[norm])
            layer.weight_quantizer.renew()
        told[norm] = f'{"merged" if mode == "merge" else "folded"} into {path!r}'
    clear_caches(net)
    return told


@contextmanager
def _without_quantizers(net):
    found = list(quantizers(net).values())
    try:
        for quantizer in found:
            quantizer.forward = lambda x: x
        yield
    finally:
        for quantizer in found:
            del quantizer.forward


def _merge(layer, norm, norm_path, op):
    """Change the Parameters of a layer by those of the BatchNorm behind it."""
    geometry, settings = Layer.of(op, getattr(layer, '_kwargs', {})), Settings.of(norm._kwargs)
    values = [parameter._reduce().asnumpy() for parameter in (norm.gamma, norm.beta, norm.running_mean,
                                                              norm.running_var)]
    bias = None if layer.bias is None else layer.bias._reduce().asnumpy()
    factor, shift = factor_and_shift(settings, *values, bias=bias)
    factor = factor.reshape(geometry.along_weight)
    how = 'merged'
    if isinstance(layer, QuantizedLayer):
        how = 'merged' if layer.config.fold == 'folded' or layer.weight_quantizer.grid is None else 'scaled'
        layer.config = replace(layer.config, batchnorm=norm_path, fold=how)
    fold_layer(layer, norm, how)
    layer.bias.set_data(nd.array(shift))
    if how == 'scaled':
        layer.weight_factor.set_data(nd.array(factor))
    else:
        layer.weight.set_data(nd.array(layer.weight._reduce().asnumpy() * factor))
