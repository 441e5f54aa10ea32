"""The bounded sample that percentile, mse and kl look at."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gluonquant.grid import Grid
from gluonquant.observers import SamplingObserver, create

SIGNED = Grid(4, signed=True, narrow_range=True)
needs_values = pytest.mark.parametrize('name', ['kl', 'mse', 'percentile'])


def sample_of(stream, max_values, cuts=()):
    observer = SamplingObserver(max_values)
    for batch in np.split(stream, sorted(cuts)):
        observer.update(batch)
    return observer.sample.tolist()


def test_every_value_is_kept_in_order_up_to_the_limit():
    assert sample_of(np.arange(64), 64, [10, 11]) == list(range(64))


def test_one_value_past_the_limit_halves_the_sample():
    assert len(sample_of(np.arange(65), 64)) == pytest.approx(65 / 2, abs=2)    # golden-ratio positions are even


def test_no_limit_keeps_everything():
    assert sample_of(np.arange(5000), None, [100]) == list(range(5000))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), limit=st.integers(1, 64), cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_the_sample_is_one_in_2_to_the_k_positions_with_the_least_k_that_fits(size, limit, cuts):
    def chosen(k):      # positions whose hash, read as a fraction of 2**64, lies below 2**-k
        return [p for p in range(size) if p * 0x9E3779B97F4A7C15 % 2**64 < 2**64 // 2**k]
    k = 0
    while len(chosen(k)) > limit:
        k += 1
    assert sample_of(np.arange(size), limit, [min(c, size) for c in cuts]) == chosen(k)


def test_thinning_meets_every_column_of_a_feature_map():
    columns = np.array(sample_of(np.arange(200_000), 2000), int) % 32
    counts = np.bincount(columns, minlength=32)
    assert counts.min() > 0.8 * counts.mean()


def test_thinning_favours_no_part_of_the_stream():
    sample = np.array(sample_of(np.arange(100_000), 1000, range(333, 100_000, 333)))
    per_tenth = np.histogram(sample, 10, (0, 100_000))[0]
    assert per_tenth.max() - per_tenth.min() <= 3    # golden-ratio positions are even to a few places


def test_the_sample_fills_more_than_half_of_its_limit():
    sizes = [len(sample_of(np.arange(n), 50)) for n in range(50, 1000)]
    assert min(sizes) >= 23 and max(sizes) == 50    # halving 51 values, give or take a few


def test_a_thinned_sample_remembers_exact_statistics():
    x = np.zeros(4097, np.float32)
    x[[1, 3]] = [-8.0, 4.0]  # odd places, which thinning drops
    observer = SamplingObserver(16)
    observer.update(x)
    assert (observer.lo, observer.hi, observer.mean_abs, observer.count) == (-8.0, 4.0, 12 / 4097, 4097)


@needs_values
def test_the_default_limit_is_a_million_values(name):
    assert create(name).max_values == 2**20


def test_a_thinned_sample_has_nearly_the_percentile_of_all_values():
    x = np.random.default_rng(5).standard_normal(200_000).astype(np.float32)
    thinned, full = create('percentile', max_values=20_000), create('percentile', max_values=None)
    thinned.update(x)
    full.update(x)
    # 12,500 values: the 99.9 percentile has a standard error of 2.3 %, three of them and a little
    assert thinned.range(SIGNED)[1] == pytest.approx(full.range(SIGNED)[1], rel=0.08)


@needs_values
@pytest.mark.parametrize('max_values', [0, -3, 2.5, True, '9'])
def test_a_limit_that_is_no_sample_size_is_refused(name, max_values):
    with pytest.raises(ValueError, match=f'max_values={max_values!r} is not a sample size: pass an int'):
        create(name, max_values=max_values)
