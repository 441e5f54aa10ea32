"""Integer grids: which codes there are."""
import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategies
from gluonquant.grid import Grid, check_bits


@pytest.mark.parametrize('grid, codes', [
    (Grid(2), [-2, -1, 0, 1]),
    (Grid(2, narrow_range=True), [-1, 0, 1]),
    (Grid(2, signed=False), [0, 1, 2, 3]),
    (Grid(2, midrise=True), [-3, -1, 1, 3]),
    (Grid(3, narrow_range=True), [-3, -2, -1, 0, 1, 2, 3]),
    (Grid(1, signed=False), [0, 1]),
    (Grid(1), [-1, 0]),
    (Grid(1, midrise=True), [-1, 1]),
])
def test_codes_of_small_grids(grid, codes):
    assert (grid.qmin, grid.qmax, grid.levels) == (codes[0], codes[-1], len(codes))


@pytest.mark.parametrize('grid, bounds', [
    (Grid(8), (-128, 127)), (Grid(8, narrow_range=True), (-127, 127)), (Grid(8, signed=False), (0, 255)),
    (Grid(8, midrise=True), (-255, 255)), (Grid(16, signed=False), (0, 65535))])
def test_bounds_of_wide_grids(grid, bounds):
    assert (grid.qmin, grid.qmax) == bounds


@given(strategies.grids())
def test_no_grid_has_more_than_two_to_the_bits_codes(grid):
    assert grid.levels == 2 ** grid.bits - (1 if grid.signed and grid.narrow_range and not grid.midrise else 0)


@given(strategies.grids())
def test_symmetric_grids_are_those_that_are_narrow_or_midrise(grid):
    symmetric = grid.qmin == -grid.qmax
    assert symmetric == (grid.signed and (grid.narrow_range or grid.midrise))


@given(strategies.grids())
def test_the_container_holds_the_bounds_and_no_smaller_one_does(grid):
    info = np.iinfo(grid.dtype)
    assert info.min <= grid.qmin
    assert grid.qmax <= info.max
    if info.bits > 8:
        smaller = np.iinfo(grid.dtype.rstrip('0123456789') + str(info.bits // 2))
        assert grid.qmin < smaller.min or grid.qmax > smaller.max


@pytest.mark.parametrize('grid, dtype', [
    (Grid(8), 'int8'), (Grid(8, signed=False), 'uint8'), (Grid(8, midrise=True), 'int16'),
    (Grid(7, midrise=True), 'int8'),
    (Grid(9), 'int16'), (Grid(9, signed=False), 'uint16'), (Grid(16, midrise=True), 'int32')])
def test_container_types(grid, dtype):
    assert grid.dtype == dtype


@given(st.integers(1, 16))
def test_steps_count_the_intervals_between_two_to_the_bits_levels(bits):
    assert Grid(bits, signed=False).steps == 2 ** bits - 1


def test_a_narrow_grid_of_one_bit_is_an_error():
    with pytest.raises(ValueError, match='bits=1 leaves a narrow signed grid with the single code 0: pass bits >= 2'):
        Grid(1, narrow_range=True)


@pytest.mark.parametrize('bits', [0, -3, 17, 2.5, 4.0, True, '4', None, Fraction(4), np.float32(4)])
def test_other_bit_widths_are_an_error_that_shows_the_value(bits):
    with pytest.raises(ValueError, match='is not a bit width: pass an integer from 1 to 16') as caught:
        Grid(bits)
    assert str(caught.value).startswith(f'bits={bits!r} ')


def test_check_bits_names_the_place_and_the_least_width():
    with pytest.raises(ValueError, match='weight_bits=1 is not a bit width: pass an integer from 2 to 16'):
        check_bits(1, 'weight_bits', least=2)
    assert check_bits(3) == 3


def test_grids_are_values():
    assert Grid(4) == Grid(4, signed=True)
    assert len({Grid(4), Grid(4), Grid(4, signed=False)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Grid(4).bits = 8
