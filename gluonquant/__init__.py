"""gluonquant: quantization-aware training for Apache MXNet Gluon.

    gq.convert(net, bits=4)                  # in place, before hybridizing
    gq.calibrate(net, loader, batches=10)    # ranges from data
    net.hybridize(static_alloc=True, static_shape=True)
    ...                                      # train with gluon.Trainer as ever
    gq.save(net, path); gq.load(path, net)
"""
from . import graph, layers, observers, ops, quantizers, training
from .calibrate import calibrate
from .checkpoint import load, save
from .config import LayerConfig, QuantizerSpec, Rule
from .convert import convert
from .fold import fold
from .graph import attach, draw, explain
from .grid import Grid
from .reestimate import reestimate_batchnorm
from .summary import summary
from .switches import freeze, freeze_batchnorm, set_mode, set_phase, unfreeze

__version__ = '0.1.0'

__all__ = ['Grid', 'LayerConfig', 'QuantizerSpec', 'Rule', 'attach', 'calibrate', 'convert', 'draw', 'explain', 'fold',
           'freeze', 'freeze_batchnorm', 'graph', 'layers', 'load', 'observers', 'ops', 'quantizers',
           'reestimate_batchnorm', 'save', 'set_mode', 'set_phase', 'summary', 'training', 'unfreeze']
