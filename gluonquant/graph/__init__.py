"""Quantizing graphs: what `convert` cannot see because it happens inside of blocks."""
from ..symbol_graph import Entry, Graph, Node
from .attach import OPS, attach
from .draw import draw
from .explain import explain
from .nested import graphs
from .net import Decision, GraphNet
from .source import as_graph, inference_graph
from .target import TARGETS, Target

__all__ = ['Decision', 'Entry', 'Graph', 'GraphNet', 'Node', 'OPS', 'TARGETS', 'Target', 'as_graph', 'attach',
           'draw', 'explain', 'graphs', 'inference_graph']
