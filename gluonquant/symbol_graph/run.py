"""Running nodes one by one, on arrays or symbols."""
from collections import Counter

import mxnet as mx
from mxnet._ctypes.ndarray import CachedOp, _imperative_invoke
from mxnet._ctypes.symbol import _symbol_creator

from .graph import Graph
from .nodes import VARIABLE, Entry, Node
from .operators import operator, outputs

# As MXNet writes it into JSON; without it, it takes the JSON for that of version 0.8 and adds inputs.
VERSION = sum(int(part) * weight for part, weight in zip(mx.__version__.split('.'), (10000, 100, 1)))


def evaluate(F, nodes, values, run=None):
    """Run ``nodes``, in order, on NDArrays or Symbols.

    Parameters
    ----------
    F : mxnet.ndarray or mxnet.symbol
    nodes : list of Node, each behind its inputs
    values : dict, {name of variable: NDArray or Symbol}
    run : callable(F, node, inputs), optional
        Gives the output, or a list of outputs, of a node that is no variable, in place of `invoke`.

    Returns
    -------
    dict, {node: list of its outputs} of the nodes that no other node of ``nodes`` reads
    """
    uses = Counter(entry.node for node in nodes for entry in node.inputs)
    ends = [node for node in nodes if not uses[node]]
    outputs = {}
    for node in nodes:
        if node.op == VARIABLE:
            outputs[node] = [values[node.name]]
        else:
            inputs = [outputs[entry.node][entry.index] for entry in node.inputs]
            made = (run or invoke)(F, node, inputs)
            outputs[node] = made if isinstance(made, (list, tuple)) else [made]
        for entry in node.inputs:
            uses[entry.node] -= 1
            if not uses[entry.node]:
                del outputs[entry.node]
    return {node: outputs[node] for node in ends}


def invoke(F, node, inputs):
    """The outputs of the operator ``node`` on NDArrays or Symbols: one, or a list."""
    if node.subgraphs:
        return _control_flow(F, node, inputs)
    keys, values = list(node.parameters), list(node.parameters.values())
    if F is mx.nd:
        return _imperative_invoke(operator(node.op), inputs, keys, values, None, False, False)
    made = _symbol_creator(operator(node.op), inputs, None, keys, values, node.name, False)
    if node.hidden:
        made._set_attr(**node.hidden)
    return made if len(made.list_outputs()) == 1 else list(made)


def _control_flow(F, node, inputs):
    """Operators with bodies come from JSON only."""
    names = [f'input{number}' for number in range(len(inputs))]
    copy = Node(node.op, node.name, node.attrs, [Entry(Node(VARIABLE, name, {}, [], [])) for name in names],
                node.subgraphs)
    symbol = mx.sym.load_json(Graph([Entry(copy, index) for index in range(outputs(node))],
                                   {'mxnet_version': ['int', VERSION]}).dump())
    if F is mx.nd:
        made = CachedOp(symbol)(*(inputs[names.index(name)] for name in symbol.list_inputs()))
        return made if isinstance(made, list) else [made]
    return list(symbol(**dict(zip(names, inputs))))
