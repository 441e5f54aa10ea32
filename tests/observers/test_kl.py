"""kl: the number of histogram bins whose coarsened copy loses least information."""
import time

import numpy as np
import pytest

from gluonquant.grid import Grid
from gluonquant.observers import KLObserver, kl_bins

GRIDS = [Grid(8, signed=True, narrow_range=True), Grid(4, signed=True), Grid(4, signed=False),
         Grid(2, signed=True, narrow_range=True), Grid(4, midrise=True)]


def divergence(counts, i, groups):
    """D of keeping i bins, step by step."""
    p = counts[:i].astype(np.float64)
    p[-1] += counts[i:].sum()
    q = np.zeros(i)
    for k in range(groups):
        start, stop = k * i // groups, (k + 1) * i // groups
        run = counts[start:stop]
        filled = np.flatnonzero(run)
        if len(filled):
            q[start + filled] = run.sum() / len(filled)
    p /= p.sum()
    q /= max(q.sum(), 1)
    q[(q == 0) & (p > 0)] = 1e-4
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())


def best_bins(counts, groups):
    """Smallest i of least divergence; 1e-11 covers float64 rounding between mathematically equal ones."""
    found = [divergence(counts, i, groups) for i in range(groups, len(counts) + 1)]
    return groups + next(n for n, d in enumerate(found) if d <= min(found) + 1e-11)


def expected_range(magnitudes, groups):
    m = float(magnitudes.max())
    counts = np.bincount(np.minimum(np.floor(magnitudes.astype(np.float64) / (m / 2048)), 2047).astype(int),
                         minlength=2048)
    return (best_bins(counts, groups) + 0.5) * m / 2048


def shown(x, **options):
    observer = KLObserver(**options)
    observer.update(x)
    return observer


def draw(kind, size=4000, seed=11):
    return getattr(np.random.default_rng(seed), kind)(size=size).astype(np.float32)


@pytest.mark.parametrize('kind', ['standard_normal', 'laplace', 'standard_cauchy'])
@pytest.mark.parametrize('bits', [2, 3, 4])
def test_a_signed_range_is_the_best_of_the_histogram_of_magnitudes(kind, bits):
    x = draw(kind)
    grid = Grid(bits, signed=True, narrow_range=True)
    assert shown(x).range(grid)[1] == pytest.approx(expected_range(np.abs(x), 2**(bits - 1)), rel=1e-14)


@pytest.mark.parametrize('kind', ['standard_exponential', 'standard_cauchy'])
@pytest.mark.parametrize('bits', [1, 2, 4])
def test_an_unsigned_range_is_the_best_of_the_histogram_of_positive_parts(kind, bits):
    x = draw(kind)
    expected = expected_range(np.maximum(x, 0), 2**bits)
    assert shown(x).range(Grid(bits, signed=False))[1] == pytest.approx(expected, rel=1e-14)


def test_a_midrise_grid_has_half_as_many_magnitudes_as_codes():
    x = draw('standard_normal')
    assert shown(x).range(Grid(4, midrise=True)) == shown(x).range(Grid(4, signed=True))


@pytest.mark.parametrize('seed', range(30))
def test_the_search_agrees_with_every_divergence_computed_step_by_step(seed):
    rng = np.random.default_rng(seed)
    groups, n = int(rng.integers(1, 12)), int(rng.integers(12, 200))
    counts = rng.poisson(10.0 ** rng.uniform(-1, 3), n) * (rng.random(n) < rng.uniform(0.1, 1))
    counts[rng.integers(n)] += 1  # never all empty
    assert kl_bins(counts, groups) == best_bins(counts, groups)


def test_the_smallest_of_equal_divergences_wins():
    assert kl_bins(np.array([5, 5, 0, 0, 0, 0, 0, 0]), 2) == 2


def test_rounding_does_not_decide_between_equal_divergences():
    counts = np.zeros(256, int)
    counts[[0, 8, 16, 24, 32, 48]] = [1825, 1007, 1213, 1941, 1459, 1264]
    # D is 0 once 49 bins are kept and each filled one has its own run; the rounded sums differ by 1e-16
    assert kl_bins(counts, 32) == 49


def test_a_thinned_sample_is_binned_up_to_the_exact_maximum():
    x = np.abs(draw('standard_normal'))
    x[1] = 50       # a position that the first thinning drops
    observer = shown(x, max_values=2000)
    counts = np.histogram(observer.sample.astype(np.float64), 2048, (0, 50))[0]
    expected = (best_bins(counts, 16) + 0.5) * 50 / 2048
    assert 50 not in observer.sample
    assert observer.range(Grid(4, signed=False))[1] == pytest.approx(expected, rel=1e-14)


def test_flat_counts_are_cut_where_nothing_is_lost():
    assert kl_bins(np.full(64, 10), 4) == 64


def test_a_far_outlier_is_clipped():
    x = np.append(draw('standard_normal', 10_000), np.float32(1000))
    assert shown(x).range(Grid(8, signed=True, narrow_range=True))[1] < 300


def test_all_bins_kept_exceed_the_data_by_half_a_bin():
    x = np.repeat(np.arange(2048), 3) + np.float32(0.5)  # flat
    assert shown(x).range(Grid(4, signed=False))[1] == pytest.approx(2048.5 / 2048 * 2047.5, rel=1e-14)


@pytest.mark.parametrize('grid', GRIDS, ids=str)
def test_data_of_one_magnitude_fall_back_to_it(grid):
    x = np.array([2.5, 2.5, 2.5], np.float32) * ([1, -1, 1] if grid.signed else 1)
    assert shown(x).range(grid)[1] == 2.5


def test_a_grid_finer_than_the_histogram_falls_back_to_the_maximum():
    x = draw('standard_normal')
    assert shown(x).range(Grid(16, signed=True))[1] == np.abs(x).max()


def test_a_heap_of_zeros_shrinks_the_range_unless_skipped():
    x = np.maximum(draw('standard_normal', 100_000), 0)
    grid = Grid(8, signed=False)
    assert shown(x).range(grid)[1] < 2.0 < 3.0 < shown(x, skip_zeros=True).range(grid)[1]


@pytest.mark.parametrize('grid', [Grid(4, signed=False), Grid(4, signed=True)], ids=str)
def test_skipping_zeros_is_as_if_they_had_not_come(grid):
    x = draw('standard_exponential')
    with_zeros = np.concatenate([np.zeros(999, np.float32), x])
    assert shown(with_zeros, skip_zeros=True).range(grid) == shown(x).range(grid)


def test_skipping_zeros_skips_negative_values_on_an_unsigned_grid():
    x, grid = draw('standard_normal'), Grid(4, signed=False)
    assert shown(x, skip_zeros=True).range(grid) == shown(x[x > 0]).range(grid)


def test_skipping_zeros_of_a_thinned_sample_without_others_falls_back_to_the_maximum():
    x = np.zeros(100, np.float32)
    x[1] = 4
    assert shown(x, max_values=10, skip_zeros=True).range(Grid(4, signed=False)) == (0, 4)


def test_the_affine_range_is_minimum_and_maximum():
    assert shown([-1.0, 5.0, 0.0]).affine_range() == (-1.0, 5.0)


@pytest.mark.parametrize('bits', [4, 8, 11])
def test_a_million_values_take_well_under_a_second(bits):
    observer = shown(draw('standard_normal', 2**20))
    start = time.perf_counter()
    observer.range(Grid(bits, signed=False))
    assert time.perf_counter() - start < 1  # measured 0.05 s; the loop over i takes 2 s


def test_a_grid_without_a_positive_code_is_refused():
    with pytest.raises(ValueError, match='bits=1.*has no positive code .*: pass bits >= 2'):
        shown([1.0]).range(Grid(1, signed=True))
