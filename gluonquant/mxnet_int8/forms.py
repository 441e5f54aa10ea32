"""How integer tensors are stored, and the ranges from which MXNet finds their scales."""
from typing import NamedTuple

import numpy as np

from ..symbol_graph import Entry

# MXNet takes a range for so many steps: not 255 and 127, with which a quarter of all codes came out differently.
STEPS = {'uint8': 255.5, 'int8': 127.5}
LIMITS = {'uint8': (0, 255), 'int8': (-128, 127)}
TURN = 128          # codes of one type are those of the other, moved by it


class Codes(NamedTuple):
    """A tensor of integers: x = scale * (code - shift)."""
    entry: Entry
    scale: float
    dtype: str
    shift: int = 0


class Form(NamedTuple):
    """How a quantizer's tensor is stored: code = clip(R((x + offset) / encoder), low, high).

    scale, shift : x is scale * (code - shift) afterwards.   dtype : 'uint8' or 'int8'.   zero : the shift by which the
    quantizer itself counts.
    """
    scale: float
    dtype: str
    low: int
    high: int
    shift: int
    zero: int
    encoder: float
    offset: float

    @classmethod
    def of(cls, path, quantizer):
        """Of a quantizer of activations; ValueError if 8 bits do not hold its codes."""
        scale, zero = (values[0] for values in quantizer.qparams())
        grid = quantizer.grid
        dtype = 'int8' if grid.qmin < 0 else 'uint8'
        lowest, highest = LIMITS[dtype]
        if grid.midrise or grid.qmin < lowest or grid.qmax > highest:
            raise ValueError(f'{path}: codes of {quantizer.method} with {grid.bits} bits reach from {grid.qmin} to '
                             f"{grid.qmax}, which MXNet's 8-bit types do not hold. Quantize activations to at most 8 "
                             'bits')
        begin, encoder = quantizer.encoder() if hasattr(quantizer, 'encoder') else (0, scale)
        return cls(float(scale), dtype, grid.qmin, grid.qmax, int(zero), int(zero), float(encoder),
                   int(zero) * float(encoder) - begin)

    def stored(self, dtype):
        """The same tensor in a type, moved by `TURN` if that is another."""
        if dtype == self.dtype:
            return self
        turn = TURN if dtype == 'uint8' else -TURN
        return self._replace(dtype=dtype, low=self.low + turn, high=self.high + turn, shift=self.shift + turn,
                             offset=self.offset + turn * self.encoder)

    def clamped(self, low, high):
        """Of a tensor that lies between two numbers: rounding keeps order, so that bounds become bounds of codes."""
        low, high = (np.rint((bound + self.offset) / self.encoder) for bound in (low, high))
        low = int(min(max(low, self.low), self.high))
        return self._replace(low=low, high=int(max(min(high, self.high), low)))

    @property
    def clips(self):
        """Whether the type itself does not clip the codes."""
        return (self.low, self.high) != LIMITS[self.dtype]

    def codes(self, entry):
        """The `Codes` of what stores such a tensor."""
        return Codes(entry, self.scale, self.dtype, self.shift)


def limits(scale, dtype):
    """(lowest, highest) value that MXNet has to be told for ``scale``."""
    high = STEPS[dtype] * scale
    return (0.0 if dtype == 'uint8' else -high), high


def calibrated(scale, dtype):
    """The attributes that tell it to an operator, of its output."""
    return {key: text(value) for key, value in zip(('min_calib_range', 'max_calib_range'), limits(scale, dtype))}


def text(number):
    """A number as an attribute, from which the same float32 is read."""
    return f'{float(number):.9g}'
