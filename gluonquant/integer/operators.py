"""All operators that exported graphs use."""
from . import layers, moves, real, window
from .table import TABLE

__all__ = ['TABLE', 'layers', 'moves', 'real', 'window']
