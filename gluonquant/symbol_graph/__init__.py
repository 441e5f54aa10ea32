"""A symbol as a graph that Python can read, check, rewire and run."""
from .graph import Graph
from .nodes import BIAS, FOLDED, OURS, QUANTIZE, TWIN, VARIABLE, Entry, Node, ancestors, integers, numbered, same
from .operators import canonical, operator
from .run import evaluate, invoke

__all__ = ['BIAS', 'FOLDED', 'OURS', 'QUANTIZE', 'TWIN', 'VARIABLE', 'Entry', 'Graph', 'Node', 'ancestors', 'canonical',
           'evaluate', 'integers', 'invoke', 'numbered', 'operator', 'same']
