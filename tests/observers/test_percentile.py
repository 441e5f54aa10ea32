"""percentile: linear interpolation between order statistics."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gluonquant.grid import Grid
from gluonquant.observers import PercentileObserver

SIGNED, UNSIGNED = Grid(8, signed=True), Grid(8, signed=False)
data = arrays(np.float32, st.integers(1, 80), elements=st.floats(-1e3, 1e3, width=32))
percents = st.sampled_from([50.5, 75, 90, 99, 99.9, 99.99])


def interpolated(values, percent):
    """Order statistic at place (n - 1) * P / 100, counted from 0, linear in between."""
    ordered = sorted(map(float, values))
    place = (len(ordered) - 1) * percent / 100
    low = int(np.floor(place))
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def shown(x, **options):
    observer = PercentileObserver(**options)
    observer.update(x)
    return observer


def close(value):
    return pytest.approx(value, rel=1e-9, abs=1e-9)  # the place is rounded at float64, times gaps up to 2e3


@settings(max_examples=60, deadline=None)
@given(x=data, percent=percents)
def test_a_signed_range_is_the_percentile_of_magnitudes(x, percent):
    assert shown(x, percentile=percent).range(SIGNED)[1] == close(interpolated(np.abs(x), percent))


@settings(max_examples=60, deadline=None)
@given(x=data, percent=percents)
def test_an_unsigned_range_is_the_percentile_of_values_floored_at_zero(x, percent):
    assert shown(x, percentile=percent).range(UNSIGNED)[1] == close(max(interpolated(x, percent), 0))


@settings(max_examples=60, deadline=None)
@given(x=data, percent=percents)
def test_the_affine_range_is_a_percentile_at_each_end(x, percent):
    assert shown(x, percentile=percent).affine_range() == (
        close(interpolated(x, 100 - percent)), close(interpolated(x, percent)))


def test_between_two_values_the_percentile_is_on_the_line():
    assert shown([10.0, 20.0], percentile=75).range(UNSIGNED)[1] == 17.5


def test_one_outlier_in_ten_thousand_does_not_set_the_range():
    x = np.ones(10_000, np.float32)
    x[77] = 1000
    assert shown(x).range(SIGNED) == (-1, 1)


def test_the_default_is_999_permille():
    assert shown(np.arange(1001)).range(UNSIGNED)[1] == pytest.approx(999, rel=1e-12)


@pytest.mark.parametrize('grid, expected', [(SIGNED, (-9, 9)), (UNSIGNED, (0, 5))])
def test_percentile_100_is_exact_even_where_thinning_dropped_the_extremes(grid, expected):
    x = np.zeros(1000, np.float32)
    x[[1, 3]] = [-9, 5]
    assert shown(x, percentile=100, max_values=10).range(grid) == expected


def test_the_affine_range_of_percentile_100_is_minimum_and_maximum():
    x = np.zeros(1000, np.float32)
    x[[1, 3]] = [-9, 5]
    assert shown(x, percentile=100, max_values=10).affine_range() == (-9, 5)


@pytest.mark.parametrize('percentile', [50, 0.999, 100.1, -1, float('nan')])
def test_a_percentile_outside_50_to_100_is_refused(percentile):
    with pytest.raises(ValueError, match=rf'percentile={percentile!r} is outside \(50, 100\]'):
        PercentileObserver(percentile=percentile)
