"""Switches over a whole net. They are saved state: a checkpoint keeps them, and no graph is traced again for most."""
import logging

from mxnet.gluon import SymbolBlock
from mxnet.gluon.nn.basic_layers import _BatchNorm

from .convert import clear_caches
from .graph import GraphNet
from .layers import named_blocks, quantizers
from .quantizers import OBSERVE, OFF, QUANTIZE

_log = logging.getLogger(__name__)
_MODES = {'off': OFF, 'observe': OBSERVE, 'quantize': QUANTIZE}


def set_mode(net, mode):
    """Switch all quantizers of ``net``; returns net.

    Parameters
    ----------
    mode : 'quantize' (as converted), 'observe' (float outputs; ranges follow the data in training) or 'off' (float
        outputs, bit for bit those of the float net; ranges stay)
    """
    if mode not in _MODES:
        raise ValueError(f'mode={mode!r}: pass one of {", ".join(map(repr, _MODES))}')
    for quantizer in quantizers(net).values():
        quantizer.set_mode(_MODES[mode])
    return net


def freeze(net):
    """Keep the ranges of all activations as they are, statistics and learned ones alike; returns net.

    Weight scales go on following the weights. Frozen learned ranges have ``grad_req='null'``, so that neither
    weight decay nor momentum moves them. RuntimeError names a quantizer that has no range to keep.
    """
    found = quantizers(net, 'activation').values()
    for quantizer in found:
        quantizer.require_range()
    for quantizer in found:
        quantizer.freeze()
    return net


def unfreeze(net):
    """Undo `freeze`; returns net."""
    for quantizer in quantizers(net, 'activation').values():
        quantizer.unfreeze()
    return net


def set_phase(net, quantize):
    """GDRQ: False = reshaping (clip only), True = quantization; returns net."""
    for quantizer in quantizers(net).values():
        if hasattr(quantizer, 'set_phase'):
            quantizer.set_phase(quantize)
    return net


def freeze_batchnorm(net, frozen=True):
    """Let BatchNorm layers use, and keep, their running statistics in training too; returns net.

    gamma and beta go on training. For the last 10 to 20 % of fine-tuning. Graphs are traced again. A warning names
    SymbolBlocks, whose BatchNorm stays as it is: only graphs of ours can be changed.
    """
    for block in batchnorms(net).values():
        block._kwargs['use_global_stats'] = bool(frozen)
    for name, block in named_blocks(net):
        if isinstance(block, GraphNet):
            block.freeze_batchnorm(frozen)
        elif isinstance(block, SymbolBlock) and any(path.endswith(('moving_mean', 'running_mean'))
                                                    for path in block._collect_params_with_prefix()):
            _log.warning('%s is a SymbolBlock: its BatchNorm is not %s', name or 'the net',
                         'frozen' if frozen else 'changed')
    clear_caches(net)
    return net


def batchnorms(net):
    """{path: block} of the BatchNorm layers of ``net``."""
    return {path: block for path, block in named_blocks(net) if isinstance(block, _BatchNorm)}
