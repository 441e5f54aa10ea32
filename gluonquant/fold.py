"""`fold`: BatchNorm into the layers before it, in blocks and in attached graphs. `reestimate_batchnorm`."""
import logging
from contextlib import contextmanager
from dataclasses import replace

from mxnet import nd
from mxnet.gluon import Block, HybridBlock, SymbolBlock, nn
from mxnet.gluon.nn.conv_layers import _Conv

from .batchnorm import Layer, Settings, factor_and_shift, pairs
from .convert import clear_caches
from .graph import GraphNet, graphs
from .layers import QuantizedLayer, fold_layer, layers, named_blocks, quantizers
from .trace import traced

_log = logging.getLogger(__name__)
MODES = ('merge', 'frozen', 'batch')
_FOLDABLE = (nn.Dense, _Conv)


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
    if not isinstance(net, Block):
        raise TypeError(f'{type(net).__name__} is no HybridBlock; gq.graph.as_graph makes one of a symbol')
    for graph in graphs(net).values() if mode == 'merge' else ():
        graph.check_values()
    told = _fold_graph(net, mode) if isinstance(net, GraphNet) else _fold_blocks(net, mode)
    for path, graph in graphs(net).items():
        told.update((f'{path}.{name}', what) for name, what in _fold_graph(graph, mode).items())
    for name, what in told.items():
        _log.info('%s %s', name, what)
    if not any(what.startswith(('folded', 'merged')) for what in told.values()):
        reasons = '; '.join(f'{name} {what}' for name, what in list(told.items())[:4]) or 'it has none'
        raise ValueError(f'no BatchNorm of {type(net).__name__} can be folded: {reasons}')
    return net


def _fold_graph(net, mode):
    return net.merge_batchnorm() if mode == 'merge' else net.fold_batchnorm(mode == 'frozen')


def _fold_blocks(net, mode):
    if isinstance(net, SymbolBlock):
        raise TypeError('a SymbolBlock has no layers: fold gq.graph.as_graph(net)')
    if not isinstance(net, HybridBlock):
        raise TypeError(f'{type(net).__name__} is no HybridBlock: fold its parts')
    blocks = dict(named_blocks(net))
    by_weight = {block.weight.name: path for path, block in blocks.items() if isinstance(block, _FOLDABLE)}
    by_gamma = {block.gamma.name: path for path, block in blocks.items() if isinstance(block, nn.BatchNorm)}
    with _as_float(net):
        graph, error = traced(net)
    if graph is None:
        raise TypeError(f'{type(net).__name__} cannot be traced: {error}. For a net of several inputs, fold '
                        'gq.graph.as_graph(net, inputs=(...))')
    found, refused = pairs(graph)
    inner = {name for part in graphs(net).values() for name in part.paths}      # of graphs, which fold their own
    told = {by_gamma.get(norm.inputs[1].node.name, norm.name): f'stays: {reason}' for norm, reason in refused.items()
            if norm.inputs[1].node.name not in inner}
    folds = []
    for layer, norm in found:
        path, norm = by_weight.get(layer.inputs[1].node.name), by_gamma.get(norm.inputs[1].node.name)
        if path is None or norm is None:
            continue
        if getattr(blocks[path], 'config', None) is not None and blocks[path].config.fold is not None:
            told[norm] = f'stays: another BatchNorm is folded into {path!r}'
        else:
            folds.append((path, norm, layer.op))
    folds += [(path, block.config.batchnorm, block.operator) for path, block in blocks.items()
              if isinstance(block, QuantizedLayer) and block.config.fold == 'folded']
    if mode != 'merge':
        floats = [(path, norm) for path, norm, _ in folds if not isinstance(blocks[path], QuantizedLayer)]
        if floats and len(floats) == len(folds) and not inner:
            raise ValueError(f'layer {floats[0][0]!r} is float: convert the net first, or merge')
        told.update((norm, f'stays: {path!r} is float') for path, norm in floats)
        folds = [fold for fold in folds if isinstance(blocks[fold[0]], QuantizedLayer)]
    else:
        for path, norm, _ in folds:
            for parameter in (blocks[path].weight, *_parameters(blocks[norm])):
                if parameter._data is None:
                    raise RuntimeError(f'Parameter {parameter.name!r} has no value yet: run one batch through the net, '
                                       'or load its Parameters')
        nd.waitall()        # a static graph does not tell that it writes running statistics
    for path, norm, op in folds:
        if mode == 'merge':
            _merge(blocks[path], blocks[norm], norm, op)
        else:
            blocks[norm]._kwargs['use_global_stats'] = mode == 'frozen'
            told[norm] = f'folded into {path!r}'
            layer = blocks[path]
            if layer.config.fold == 'folded':
                continue
            layer.config = replace(layer.config, batchnorm=norm, fold='folded')
            fold_layer(layer, blocks[norm])
            layer.weight_quantizer.renew()
        told[norm] = f'{"merged" if mode == "merge" else "folded"} into {path!r}'
    clear_caches(net)
    return told


@contextmanager
def _as_float(net):
    """Let quantized layers be what they were for a while; those with a factor for their weight only skip quantizers."""
    quantized = {layer: type(layer) for layer in layers(net).values() if layer.weight_factor is None}
    found = list(quantizers(net).values())
    try:
        for layer, cls in quantized.items():
            layer.__class__ = cls.float_class
        for quantizer in found:
            quantizer.forward = lambda x: x
        yield
    finally:
        for layer, cls in quantized.items():
            layer.__class__ = cls
        for quantizer in found:
            del quantizer.forward


def _parameters(norm):
    return norm.gamma, norm.beta, norm.running_mean, norm.running_var


def _merge(layer, norm, norm_path, op):
    """Change the Parameters of a layer by those of the BatchNorm behind it."""
    geometry, settings = Layer.of(op, getattr(layer, '_kwargs', {})), Settings.of(norm._kwargs)
    values = [parameter._reduce().asnumpy() for parameter in _parameters(norm)]
    bias = None if layer.bias is None else layer.bias._reduce().asnumpy()
    factor, shift = factor_and_shift(settings, *values, bias=bias)
    factor = factor.reshape(geometry.along_weight)
    how = 'merged'
    if isinstance(layer, QuantizedLayer):
        how = 'merged' if layer.config.fold == 'folded' or layer.weight_quantizer.grid is None else 'scaled'
        layer.config = replace(layer.config, batchnorm=norm_path, fold=how)
    fold_layer(layer, norm, how)
    dtype = layer.weight.dtype
    layer.bias.set_data(nd.array(shift, dtype=dtype))
    if how == 'scaled':
        layer.weight_factor.set_data(nd.array(factor, dtype=dtype))
    else:
        layer.weight.set_data(nd.array(layer.weight._reduce().asnumpy() * factor, dtype=dtype))
