"""Parameters for the variables of a symbol."""
from mxnet.gluon import Parameter

from ..symbol_graph import integers


def make_parameters(graph, names, arrays=None, shapes=None, inits=None):
    """{name: Parameter} for the variables of a symbol file, with their notes and, if given, arrays from a file.

    ``shapes`` and ``inits`` are those of variables that have no array and note none.
    """
    plain = graph.copy()
    plain.strip()
    auxiliary = set(plain.symbol().list_auxiliary_states())
    variables = graph.variables()
    return {name: _parameter(variables[name], None if arrays is None else arrays[name], name in auxiliary,
                             (shapes or {}).get(name), (inits or {}).get(name)) for name in names}


def _parameter(node, array, auxiliary, shape, init):
    notes = node.hidden
    try:
        shape = array.shape if array is not None else _shape(notes) or shape
        multipliers = {key: float(notes.get(f'__{key}__', 1)) for key in ('lr_mult', 'wd_mult')}
    except ValueError as error:
        raise ValueError(f'variable {node.name!r} with {notes}: {error}') from None
    parameter = Parameter(node.name, grad_req='null' if auxiliary else 'write', shape=shape, **multipliers,
                          dtype=array.dtype if array is not None else 'float32', init=notes.get('__init__', init),
                          allow_deferred_init=True)
    if array is not None:
        parameter.initialize(init='zeros')
        parameter.set_data(array)
    return parameter


def _shape(notes):
    """The shape that a variable notes, None if it notes none."""
    if '__shape__' not in notes:
        return None
    sizes = tuple(max(size, 0) for size in integers(notes['__shape__']))
    if not sizes:
        raise ValueError(f"no shape: {notes['__shape__']!r}")
    return sizes
