"""What MXNet says about its operators."""
import ctypes
from functools import lru_cache

import mxnet as mx
from mxnet._ctypes.symbol import _symbol_creator
from mxnet.base import _LIB, MXNetError, OpHandle, c_str, check_call

from ..registry import nearest
from .nodes import OURS, VARIABLE


@lru_cache(maxsize=None)
def operator(name):
    """MXNet's handle of an operator; ValueError if there is none of this name."""
    handle = OpHandle()
    if _LIB.NNGetOpHandle(c_str(name), ctypes.byref(handle)):
        known = mx.operator.get_all_registered_operators()
        raise ValueError(f'{name!r} is no operator of MXNet {mx.__version__}.{nearest(name, known)}')
    return handle.value


@lru_cache(maxsize=None)
def canonical(name):
    """What JSON calls the operator that is also known by ``name``: 'elemwise_add' for '_plus'."""
    text = ctypes.c_char_p()
    check_call(_LIB.MXSymbolGetAtomicSymbolName(ctypes.c_void_p(operator(name)), ctypes.byref(text)))
    return text.value.decode()


def signature(node):
    """(number of inputs, number of outputs) of an operator with the attributes of ``node``."""
    parameters = node.parameters
    try:
        return _counted(node.op, tuple(sorted(parameters.items())))
    except (MXNetError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f'node {node.name!r} ({node.op}): {reason}') from None


@lru_cache(maxsize=4096)
def _counted(op, attributes):
    symbol = _made(op, attributes)
    return len(symbol.list_inputs()), len(symbol.list_outputs())


def input_names(node):
    """What an operator with the attributes of ``node`` calls its inputs."""
    signature(node)
    made = _made(node.op, tuple(sorted(node.parameters.items())))
    return [name[len('node_'):] for name in made.list_inputs()]


def outputs(node):
    """How many outputs a node has."""
    if node.op in (VARIABLE, *OURS):
        return 1
    return int(node.attrs.get('num_outputs', 1)) if node.subgraphs else signature(node)[1]


def _made(op, attributes):
    """The operator by itself, with variables for its inputs."""
    return _symbol_creator(operator(op), [], None, [key for key, _ in attributes], [value for _, value in attributes],
                           'node', False)
