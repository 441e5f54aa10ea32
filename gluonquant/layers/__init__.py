"""Quantized layers: each is its float class and two quantizers."""
from .base import LAYERS, QuantizedLayer, SharedInput, quantizes
from .conv import QConv1D, QConv2D, QConv2DTranspose, QConv3D
from .dense import QDense
from .norm import FoldedBatchNorm, fold_layer
from .walk import layers, named_blocks, quantizers, unhybridized

__all__ = ['FoldedBatchNorm', 'LAYERS', 'QConv1D', 'QConv2D', 'QConv2DTranspose', 'QConv3D', 'QDense', 'QuantizedLayer',
           'SharedInput', 'fold_layer',
           'layers', 'named_blocks', 'quantizers', 'quantizes', 'unhybridized']
