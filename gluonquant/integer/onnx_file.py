"""Reading ONNX files with NumPy alone: the few messages of the format that a graph of ours uses.

The wire format is that of protocol buffers: a sequence of (field number, type, value). Field numbers are those of
``onnx.proto``.
"""
import struct

import numpy as np

from .model import Model, Node

_DTYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16,
           11: np.float64}
_FOUR_BITS = {21: 'uint4', 22: 'int4'}
_STANDARD = ('', 'ai.onnx')


def read_onnx(path):
    """The `Model` in an ONNX file.

    Raises
    ------
    ValueError
        The file is damaged, or holds what no graph of ours does: another domain of operators, weights in other files,
        graphs inside of nodes, unusual types.
    """
    with open(path, 'rb') as file:
        content = file.read()
    try:
        model = _model(content)
    except (IndexError, struct.error, KeyError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f'{path}: no complete ONNX file ({type(error).__name__}: {error})') from None
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    if not model.nodes or not model.outputs:
        raise ValueError(f'{path}: no ONNX file, or an empty one')
    return model


def _model(content):
    graph, metadata, opset = b'', {}, 1
    for number, value in _fields(content):
        if number == 7:
            graph = value
        elif number == 8:
            entry = dict(_fields(value))
            if entry.get(1, b'').decode() not in _STANDARD:
                continue        # declared, perhaps not used: nodes tell
            opset = entry[2]
        elif number == 14:
            entry = dict(_fields(value))
            metadata[entry.get(1, b'').decode()] = entry.get(2, b'').decode()
    model = Model([], {}, {}, {}, opset, metadata)
    for number, value in _fields(graph):
        if number == 1:
            model.nodes.append(_node(value))
        elif number == 5:
            name, array, kind = _tensor(value)
            model.constants[name] = array
            if kind:
                model.types[name] = kind
        elif number in (11, 12):
            name, shape = _value_info(value)
            (model.inputs if number == 11 else model.outputs)[name] = shape
    model.inputs = {name: shape for name, shape in model.inputs.items() if name not in model.constants}
    return model


def _fields(content):
    """Yield (field number, value) of a message: int, bytes, or 4 or 8 raw bytes for fixed sizes."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(content, place)
        else:
            size = 8
            if kind == 2:
                size, place = _varint(content, place)
            elif kind == 5:
                size = 4
            elif kind != 1:
                raise ValueError(f'no complete ONNX file (field type {kind} at byte {place})')
            value, place = content[place:place + size], place + size
            if place > len(content):
                raise ValueError('no complete ONNX file (it ends inside a field)')
        yield key >> 3, value


def _varint(content, place):
    value = shift = 0
    while True:
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _signed(value):
    return value - (1 << 64) if value >= 1 << 63 else value


def _integers(value):
    """The numbers of a repeated integer field, packed or single."""
    if isinstance(value, int):
        return [_signed(value)]
    found, place = [], 0
    while place < len(value):
        number, place = _varint(value, place)
        found.append(_signed(number))
    return found


def _node(content):
    node, domain = Node('', [], []), ''
    for number, value in _fields(content):
        if number == 1:
            node.inputs.append(value.decode())
        elif number == 2:
            node.outputs.append(value.decode())
        elif number == 3:
            node.name = value.decode()
        elif number == 4:
            node.op = value.decode()
        elif number == 5:
            name, given = _attribute(value)
            node.attrs[name] = given
        elif number == 7:
            domain = value.decode()
    if domain not in _STANDARD:
        raise ValueError(f'node {node.name!r} is {domain}.{node.op}: only operators of the standard ONNX domain run '
                         'here. Read the file that export_onnx wrote, not one that a runtime has optimized')
    return node


def _attribute(content):
    name, lists, value = '', {7: [], 8: []}, None
    for number, given in _fields(content):
        if number == 1:
            name = given.decode()
        elif number == 2:
            value = struct.unpack('<f', given)[0]
        elif number == 3:
            value = _signed(given)
        elif number == 4:
            value = given.decode()
        elif number == 5:
            value = _tensor(given)[1]
        elif number == 6:
            raise ValueError(f'attribute {name!r} is a graph: control flow does not run here')
        elif number == 7:
            lists[7] += np.frombuffer(given, '<f4').tolist()
        elif number == 8:
            lists[8] += _integers(given)
    return name, value if value is not None else lists[7] or lists[8]


def _tensor(content):
    """(name, array, 'int4', 'uint4' or None)."""
    shape, kind, name, raw, numbers, floats = [], 0, '', b'', [], []
    for number, value in _fields(content):
        if number == 1:
            shape += _integers(value)
        elif number == 2:
            kind = value
        elif number == 4:
            floats.append(np.frombuffer(value, '<f4'))
        elif number in (5, 7):
            numbers += _integers(value)
        elif number == 8:
            name = value.decode()
        elif number == 9:
            raw = value
        elif number == 13 or (number == 14 and value == 1):
            raise ValueError(f'tensor {name!r} lies in another file')
    four = _FOUR_BITS.get(kind)
    if four:
        packed = np.frombuffer(raw, np.uint8) if raw else np.array(numbers, np.uint8)
        return name, unpack_four_bits(packed, four).reshape(-1)[:int(np.prod(shape))].reshape(shape), four
    if kind not in _DTYPES:
        raise ValueError(f'tensor {name!r} has elements of type {kind}, which no exported graph has')
    dtype = np.dtype(_DTYPES[kind])
    if raw:
        array = np.frombuffer(raw, dtype.newbyteorder('<')).astype(dtype)
    elif floats:
        array = np.concatenate(floats).astype(dtype)
    else:
        array = np.array(numbers, np.int64).astype(dtype)
    return name, array.reshape(shape), None


def unpack_four_bits(packed, kind):
    """Two elements of 'int4' or 'uint4' from each byte, the lower half first: int8 or uint8, one axis."""
    both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)
    return both if kind == 'uint4' else ((both ^ 8).astype(np.int8) - np.int8(8))


def _value_info(content):
    name, shape = '', ()
    for number, value in _fields(content):
        if number == 1:
            name = value.decode()
        elif number == 2:
            tensor = dict(_fields(dict(_fields(value))[1]))
            sizes = [dict(_fields(part)) for kind, part in _fields(tensor.get(2, b'')) if kind == 1]
            shape = tuple(size.get(1) for size in sizes)
    return name, shape
