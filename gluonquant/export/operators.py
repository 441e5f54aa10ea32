"""All writers."""
from . import arithmetic, layers, moves
from .table import WRITERS

__all__ = ['WRITERS', 'arithmetic', 'layers', 'moves']
