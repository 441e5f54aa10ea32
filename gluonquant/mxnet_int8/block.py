"""A graph as a block, and the codes inside it."""
import json

import mxnet as mx
import numpy as np
from mxnet.gluon import SymbolBlock
from mxnet.ndarray import CachedOp

from ..symbol_graph import Graph
from ..symbol_graph.run import VERSION

MARK = '__gluonquant__'     # [node of the quantizer, what the stored codes have in addition], a hidden attribute


def make(heads, constants, inputs):
    """The SymbolBlock of a graph that returns ``heads``, with ``constants`` for Parameters."""
    graph = Graph(heads, {'mxnet_version': ['int', VERSION]})
    block = SymbolBlock(mx.sym.load_json(graph.dump()), [mx.sym.var(name, dtype='float32') for name in inputs])
    for name, parameter in block.collect_params().items():
        array = constants[name]
        parameter.grad_req, parameter.shape, parameter.dtype = 'null', array.shape, array.dtype
        parameter.initialize(mx.init.Zero(), ctx=mx.cpu(), force_reinit=True)
        parameter.set_data(mx.nd.array(array, dtype=array.dtype))
    return block


def mark(entry, node, addend):
    """Note which quantizer's codes a tensor holds."""
    entry.node.attrs[MARK] = json.dumps([node, addend])


def codes(block, *inputs):
    """The codes of every quantized tensor that a block from `to_mxnet_int8` stores as integers.

    Parameters
    ----------
    block : SymbolBlock from `to_mxnet_int8`, or loaded from a file to which such a block was exported.
    inputs : NDArrays, those of the block

    Returns
    -------
    dict, {str: int32 array}
        Codes as the quantizer counts them, by the name of its node: its path, and ``path_2`` and so on for further
        tensors on the grid of the same quantizer.

    Raises
    ------
    ValueError
        The block has no such tensors.
    """
    variables, symbol = block._cached_graph
    found = {}
    for name, attrs in symbol.attr_dict().items():
        if MARK in attrs:
            quantizer, addend = json.loads(attrs[MARK])
            found[quantizer] = name, addend
    if not found:
        raise ValueError(f'{type(block).__name__} {block.name!r} has no integer tensors: pass what gq.to_mxnet_int8 '
                         'makes of a net with quantized activations')
    internals = symbol.get_internals()
    known = internals.list_outputs()
    places = [next(place for place, output in enumerate(known) if output in (f'{name}_output', f'{name}_output0'))
              for name, _ in found.values()]
    inner = mx.sym.Group([internals[place] for place in places])
    values = {name: parameter.data() for name, parameter in block.collect_params().items()}
    values.update(zip((variable.name for variable in variables), inputs))
    with mx.autograd.pause():
        arrays = CachedOp(inner)(*(values[name] for name in inner.list_inputs()))
    arrays = arrays if isinstance(arrays, (list, tuple)) else [arrays]
    return {quantizer: array.asnumpy().astype(np.int32) - addend
            for (quantizer, (_, addend)), array in zip(found.items(), arrays)}
