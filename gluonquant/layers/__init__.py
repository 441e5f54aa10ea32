"""Quantized layers: each is its float class and two quantizers."""
from .base import LAYERS, QuantizedLayer, SharedInput, quantizes
from .conv import QConv1D, QConv2D, QConv2DTranspose, QConv3D
from .dense import QDense
from .walk import layers, named_blocks, quantizers

__all__ = ['LAYERS', 'QConv1D', 'QConv2D', 'QConv2DTranspose', 'QConv3D', 'QDense', 'QuantizedLayer',
           'SharedInput', 'layers',
           'named_blocks', 'quantizers', 'quantizes']
