"""Packed files: a quantized net with its weights at 2 to 8 bits each, in one file. Reading needs NumPy alone.

Version 1, all numbers little-endian::

    8 bytes     b'GQPACKED'
    4 bytes     version, uint32
    8 bytes     length of the header, uint64
    header      JSON, UTF-8, compressed by zlib
    arrays      one behind the other, each from a multiple of 8 bytes on, counted from the end of the header
    32 bytes    SHA-256 of all that comes before

The header has

- ``architecture``: what the net is called; for people.
- ``arrays``: {name: {shape, dtype, at, bytes}}, ``at`` counted from the end of the header. Arrays of codes have
  ``bits``, too: element k of ``bits`` bits stands in bits k * bits and following of the bytes, lowest bit first.
- ``weights``: {name: {codes, scale, zero, factor, step, base}}: the code of an element is base + step * k, its value
  scale * (code - zero); scale and zero are arrays of one element or one per output channel, along ``axis``. ``factor``
  names the array that multiplies each output channel afterwards, null if nothing does.
- ``model``: what the integer runner computes: ``nodes``, ``inputs``, ``outputs``, ``opset``, ``metadata``, and
  ``constants``: {name: name of an array, or {"weight": name, "shape": its shape} for the codes of a weight with its
  factor absorbed}.
- ``gluon``: the net, for `gluonquant.load_packed`.
"""
import hashlib
import json
import struct
import zlib
from typing import Any, Dict, NamedTuple

import numpy as np

from .constants import absorb
from .model import Model, Node

MAGIC, VERSION = b'GQPACKED', 1
_START = struct.Struct('<8sIQ')
_CHECK = 32


class Packed(NamedTuple):
    """The header and the arrays of a packed file."""
    header: Dict[str, Any]
    arrays: Dict[str, np.ndarray]

    def weight(self, name):
        """(code - zero, scale, factor or None) of a weight: int32 (channels, ...), float32, float32."""
        about = self.header['weights'][name]
        codes = self.arrays[about['codes']].astype(np.int32) * about['step'] + about['base']
        zero, shape = self.arrays[about['zero']], [1] * codes.ndim
        shape[about['axis']] = -1
        factor = None if about['factor'] is None else self.arrays[about['factor']]
        return codes - zero.reshape(shape), self.arrays[about['scale']], factor

    def model(self):
        """The `Model` in the file."""
        about = self.header['model']
        constants = {}
        for name, source in about['constants'].items():
            if isinstance(source, str):
                constants[name] = self.arrays[source]
            else:
                axis = self.header['weights'][source['weight']]['axis']
                codes, scale, factor = self.weight(source['weight'])
                codes = absorb(codes.swapaxes(0, axis), scale, factor)[0].swapaxes(0, axis)
                constants[name] = codes.astype(np.int8).reshape(source.get('shape', codes.shape))

        def shapes(given):
            return {name: tuple(shape) for name, shape in given.items()}
        return Model([Node(**node) for node in about['nodes']], constants, shapes(about['inputs']),
                     shapes(about['outputs']), about['opset'], about['metadata'])


def pack(numbers, bits):
    """Bytes of the integers 0 <= k < 2**bits in ``numbers``, ``bits`` of 1 to 8 each."""
    spread = np.unpackbits(numbers.astype(np.uint8).reshape(-1, 1), axis=1, bitorder='little')[:, :bits]
    return np.packbits(spread, bitorder='little').tobytes()


def unpack(content, bits, count):
    """The inverse of `pack`: uint8 (count,)."""
    spread = np.unpackbits(np.frombuffer(content, np.uint8), count=count * bits, bitorder='little')
    return np.packbits(spread.reshape(-1, bits), axis=1, bitorder='little').reshape(-1)


def content(header, arrays):
    """The bytes of a file.

    Parameters
    ----------
    header : dict, without ``arrays``
    arrays : dict, {name: (array, bits or None)}; with ``bits``, integers that are packed.
    """
    described, parts, at = {}, [], 0
    for name, (array, bits) in arrays.items():
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        data = array.astype(array.dtype.newbyteorder('<')).tobytes() if bits is None else pack(array, bits)
        described[name] = {'shape': list(array.shape), 'dtype': 'uint8' if bits else array.dtype.name, 'at': at,
                           'bytes': len(data), **({'bits': bits} if bits else {})}
        padded = data + bytes(-len(data) % 8)
        parts.append(padded)
        at += len(padded)
    text = zlib.compress(json.dumps({**header, 'arrays': described}).encode(), 9)
    whole = b''.join([_START.pack(MAGIC, VERSION, len(text)), text, *parts])
    return whole + hashlib.sha256(whole).digest()


def parse(whole, where):
    """The `Packed` in the bytes of a file; ValueError, beginning with ``where``, if it is not all there or altered."""
    if whole[:8] != MAGIC:
        raise ValueError(f'{where}: no packed file: it begins with {whole[:8]!r}')
    if len(whole) < _START.size + _CHECK or hashlib.sha256(whole[:-_CHECK]).digest() != whole[-_CHECK:]:
        raise ValueError(f'{where}: {len(whole)} bytes whose checksum does not fit: the file is cut off or altered. '
                         'Copy it again')
    _, version, length = _START.unpack_from(whole)
    if version != VERSION:
        raise ValueError(f'{where}: version {version}; this library reads version {VERSION}')
    start = _START.size + length
    try:
        header = json.loads(zlib.decompress(whole[_START.size:start]).decode())
        arrays = {name: _array(whole, start, about) for name, about in header['arrays'].items()}
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise ValueError(f'{where}: the header makes no sense ({type(error).__name__}: {error})') from None
    return Packed(header, arrays)


def _array(whole, start, about):
    count = int(np.prod(about['shape'], dtype=np.int64))
    data = whole[start + about['at']:start + about['at'] + about['bytes']]
    if 'bits' in about:
        return unpack(data, about['bits'], count).reshape(about['shape'])
    dtype = np.dtype(about['dtype'])
    return np.frombuffer(data, dtype.newbyteorder('<')).astype(dtype).reshape(about['shape'])


def read_packed(path):
    """The `Packed` in a file."""
    with open(path, 'rb') as file:
        return parse(file.read(), path)
