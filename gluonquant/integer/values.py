"""The arithmetic of deployment: tensors that know how a runtime rounds them.

A tensor between two operators is one of these. Each can be asked for real numbers, ``real()``, as the float32 that a
runtime would compute, for the float64 numbers that it stands for, ``exact()``, and for codes, ``codes(grid)``. What
stands between two grids is never rounded to float32 twice: sums of products stay integers until they are scaled to the
next grid. That is what makes integer runtimes agree.

Codes of a grid are clip(round_half_even(x / scale) + zero_point, lowest, highest).
"""
from typing import NamedTuple

import numpy as np

from .elementary import softmax

F32 = np.float32


class Grid(NamedTuple):
    """Where codes lie: x = scale * (code - zero_point).

    scale : float32, shape (), or (channels,) along ``axis``.   zero_point : integer.   dtype : 'uint8' or 'int8'.
    """
    scale: np.ndarray
    zero_point: np.ndarray
    dtype: np.dtype
    axis: int = 1

    def clip(self, codes):
        """Rounded values as codes; what is beyond the type saturates."""
        info = np.iinfo(self.dtype)
        return np.clip(codes, info.min, info.max).astype(self.dtype)

    def like(self, ndim):
        """Scale and zero point in the shape that meets a tensor of ``ndim`` axes."""
        shape = [1] * ndim
        if np.ndim(self.scale):
            shape[self.axis % ndim] = -1
        return np.reshape(self.scale, shape), np.reshape(self.zero_point, shape)

    def same(self, other):
        """Whether codes mean the same values."""
        return (self.dtype == other.dtype and np.array_equal(self.scale, other.scale)
                and np.array_equal(self.zero_point, other.zero_point))


class Real(NamedTuple):
    """A float32 tensor."""
    array: np.ndarray

    def real(self):
        return self.array

    def exact(self):
        return self.array.astype(np.float64)

    def codes(self, grid):
        scale, zero = grid.like(self.array.ndim)
        with np.errstate(over='ignore', invalid='ignore'):
            return grid.clip(np.rint(self.array / scale).astype(np.float64) + zero)


class Quantized(NamedTuple):
    """Codes of a grid."""
    array: np.ndarray
    grid: Grid

    def offsets(self):
        """code - zero_point, int32."""
        return self.array.astype(np.int32) - self.grid.like(self.array.ndim)[1].astype(np.int32)

    def real(self):
        return self.offsets().astype(F32) * self.grid.like(self.array.ndim)[0]

    def exact(self):
        return self.offsets() * self.grid.like(self.array.ndim)[0].astype(np.float64)

    def codes(self, grid):
        return self.array if grid.same(self.grid) else Real(self.real()).codes(grid)


class Products(NamedTuple):
    """Sums of products of codes, int32: what a convolution or a matrix product of integers accumulates.

    ``scale`` : float32, () or (channels,) along axis 1, of one unit: input scale * weight scale.
    """
    array: np.ndarray
    scale: np.ndarray

    def _along(self, values):
        return np.reshape(values, [-1 if axis == 1 else 1 for axis in range(self.array.ndim)])

    def real(self):
        return self.array.astype(F32) * self._along(self.scale)

    def exact(self):
        return self.array * self._along(self.scale).astype(np.float64)

    def codes(self, grid):
        factor = self._along(self.scale / F32(grid.scale))      # one float32 number for each channel
        return grid.clip(np.rint(self.array.astype(F32) * factor) + grid.zero_point)


class Sum(NamedTuple):
    """first + second, both quantized; scaled by fused multiply-adds, second before first."""
    first: Quantized
    second: Quantized

    def real(self):
        return self.first.real() + self.second.real()

    def exact(self):
        return self.first.exact() + self.second.exact()

    def codes(self, grid):
        first, second = (F32(each.grid.scale) / F32(grid.scale) for each in self)
        fixed = F32(grid.zero_point) - (first * F32(self.first.grid.zero_point) + second * F32(
            self.second.grid.zero_point))
        partial = fused_multiply_add(self.second.array, second, fixed)
        return grid.clip(np.rint(fused_multiply_add(self.first.array, first, partial)))


class Mean(NamedTuple):
    """The mean of codes over ``count`` places: ``array`` is the sum of their offsets, int32, of ``scale`` each."""
    array: np.ndarray
    scale: np.ndarray
    count: int

    def real(self):
        return (self.array.astype(F32) / F32(self.count)) * self.scale

    def exact(self):
        return self.array * np.float64(self.scale) / self.count

    def codes(self, grid):
        factor = F32(self.scale) / (F32(grid.scale) * F32(self.count))
        return grid.clip(np.rint(self.array.astype(F32) * factor) + grid.zero_point)


class Average(Real):
    """The mean over windows of dequantized codes: rounded with the zero point, so that ties fall otherwise."""

    def codes(self, grid):
        return grid.clip(np.rint((self.array / F32(grid.scale)).astype(F32) + F32(grid.zero_point)))


class Multiplied(NamedTuple):
    """first * second, both quantized: rounded with the zero point."""
    first: Quantized
    second: Quantized

    def real(self):
        return self.first.real() * self.second.real()

    def exact(self):
        return self.first.exact() * self.second.exact()

    def codes(self, grid):
        factor = F32(F32(F32(self.first.grid.scale) * F32(self.second.grid.scale)) / F32(grid.scale))
        product = self.first.offsets().astype(F32) * self.second.offsets().astype(F32) * factor
        return grid.clip(np.rint((product + F32(grid.zero_point)).astype(F32)))


class Shares(NamedTuple):
    """The softmax of codes along the last axis, from a table of integers."""
    source: Quantized

    def real(self):
        return softmax(self.source.real(), -1)

    def exact(self):
        return softmax(self.source.exact(), -1)

    def codes(self, grid):
        codes = self.source.array.astype(np.int64) - np.iinfo(self.source.array.dtype).min
        unit = min((2 ** 32 - 1) / codes.shape[-1], float(2 ** 23 - 1))
        table = np.floor(np.exp((np.arange(256) - 255.) * np.float64(self.source.grid.scale)) * unit + .5)
        powers = table.astype(np.uint32)[codes + 255 - codes.max(-1, keepdims=True)]
        total = powers.sum(-1, keepdims=True, dtype=np.uint32).astype(F32)
        return grid.clip(np.rint(powers.astype(F32) * np.floor(F32(1) / F32(grid.scale)) / total) + grid.zero_point)


class Clamped(NamedTuple):
    """max(value, 0): a ReLU that is computed on codes, which gives the same since rounding keeps order."""
    value: tuple

    def real(self):
        return np.maximum(self.value.real(), F32(0))

    def exact(self):
        return np.maximum(self.value.exact(), 0)

    def codes(self, grid):
        return np.maximum(self.value.codes(grid), np.asarray(grid.zero_point).astype(grid.dtype))


def fused_multiply_add(codes, factor, addend):
    """codes * factor + addend in float32 with one rounding: the product of a code and a float32 is exact in float64.

    The sum of the two in float64 is rounded once before it is rounded to float32; that differs from a true fused
    operation only where the float64 sum lies exactly between two float32 numbers.
    """
    return (codes.astype(np.float64) * np.float64(factor) + np.float64(addend)).astype(F32)
