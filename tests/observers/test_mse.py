"""mse: 100 shrunk ranges, the first with the least squared error wins."""
import numpy as np
import pytest

from gluonquant.grid import Grid
from gluonquant.observers import MSEObserver, mse_range
from gluonquant.observers.mse import _codes

GRIDS = [Grid(bits, signed, narrow) for bits in (2, 3, 4, 8) for signed, narrow in
         ((True, True), (True, False), (False, False))] + [Grid(2, midrise=True), Grid(4, midrise=True),
                                                           Grid(1, signed=False), Grid(1, midrise=True)]
every_grid = pytest.mark.parametrize('grid', GRIDS, ids=str)


def codes_of(grid):
    if grid.midrise:
        return np.arange(-(2**grid.bits - 1), 2**grid.bits, 2)
    if not grid.signed:
        return np.arange(2**grid.bits)
    return np.arange(-2**(grid.bits - 1) + grid.narrow_range, 2**(grid.bits - 1))


def error(x, a, grid):
    """Squared error against the nearest level, found by looking at all of them."""
    codes = codes_of(grid)
    levels = float(np.float32(a / codes[-1])) * codes
    return (np.abs(x.astype(np.float64)[:, None] - levels).min(axis=1)**2).sum()


def best_candidate(x, grid):
    m = float(np.abs(x).max() if grid.signed else x.max())
    tried = [m * (0.2 + 0.8 * i / 99) for i in range(100)]
    return tried[np.argmin([error(x, a, grid) for a in tried])]


def shown(x, **options):
    observer = MSEObserver(**options)
    observer.update(x)
    return observer


def draw(kind, size=400):
    return getattr(np.random.default_rng(7), kind)(size=size).astype(np.float32)


@every_grid
@pytest.mark.parametrize('kind', ['standard_normal', 'laplace', 'uniform', 'standard_cauchy'])
def test_the_range_is_the_candidate_with_the_least_error(kind, grid):
    x = draw(kind)
    # the same candidate, not a neighbour
    assert shown(x).range(grid)[1] == pytest.approx(best_candidate(x, grid), rel=1e-14)


def test_the_first_of_equal_errors_wins():
    # thinning keeps the zeros, exact under every candidate, and m is 1
    assert shown([0.0, -1.0, 0.0], max_values=2).range(Grid(8, signed=True, narrow_range=True))[1] == 0.2


def test_a_constant_on_a_binary_grid_takes_itself():
    assert shown([3.0] * 10).range(Grid(1, signed=False)) == (0, 3)


def test_halves_are_rounded_to_even():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 9.0], np.float32)
    assert _codes(x, np.float32(1), Grid(4, signed=True, narrow_range=True)).tolist() == [0, 2, 2, 0, -2, 7]


def test_fewer_bits_clip_more():
    x = draw('standard_normal', 5000)
    reach = [shown(x).range(Grid(bits, signed=True, narrow_range=True))[1] for bits in (2, 3, 4, 6)]
    assert reach == sorted(set(reach))


def test_the_full_range_is_kept_where_clipping_costs_more():
    x = np.array([1.0] * 100 + [-1.0] * 100, np.float32)
    assert shown(x).range(Grid(2, signed=True, narrow_range=True))[1] == 1.0


def test_negative_values_do_not_move_an_unsigned_range():
    x = draw('standard_normal')
    assert shown(x).range(Grid(4, signed=False)) == shown(np.maximum(x, 0)).range(Grid(4, signed=False))


def test_a_thinned_sample_searches_below_the_exact_maximum():
    x = np.ones(100, np.float32)
    x[1] = 2.0      # a position that the first thinning drops
    tried = np.array([2.0 * (0.2 + 0.8 * i / 99) for i in range(100)])
    nearest = tried[np.argmin(np.abs(tried - 1))]
    assert shown(x, max_values=50).range(Grid(1, signed=False))[1] == pytest.approx(nearest, rel=1e-14)


def test_ranges_below_the_floor_of_scales_are_not_searched():
    x, grid = draw('standard_normal'), Grid(2, signed=True, narrow_range=True)
    tiny = x / np.abs(x).max() * np.float32(9e-9)
    assert shown(tiny).range(grid)[1] == tiny.max() or shown(tiny).range(grid)[1] == -tiny.min()


def test_the_affine_range_is_minimum_and_maximum():
    assert shown([-1.0, 5.0, 0.0]).affine_range() == (-1.0, 5.0)


@every_grid
def test_mse_range_is_the_rule_of_the_observer_on_one_array(grid):
    x = draw('standard_normal')
    assert mse_range(x.reshape(20, 20), grid) == shown(x).range(grid)


def test_mse_range_works_in_blocks_without_losing_values():
    x = np.sort(draw('laplace', 70_000))  # so that no block looks like the whole
    grid = Grid(3, signed=True)
    assert mse_range(x, grid)[1] == pytest.approx(best_candidate(x, grid), rel=1e-14)


def test_mse_range_of_no_values_is_refused():
    with pytest.raises(ValueError, match='no values to search a range for'):
        mse_range(np.zeros(0), Grid(4))


def test_mse_range_refuses_values_that_are_not_finite():
    with pytest.raises(ValueError, match='1 of 2 values are not finite'):
        mse_range([np.nan, 1.0], Grid(4))


def test_a_grid_without_a_positive_code_is_refused():
    with pytest.raises(ValueError, match='bits=1.*has no positive code .*: pass bits >= 2'):
        shown([1.0]).range(Grid(1, signed=True))
