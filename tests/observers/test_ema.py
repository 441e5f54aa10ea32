"""ema: amax := d * amax + (1 - d) * batch, the first batch sets it."""
import numpy as np
import pytest

from gluonquant.grid import Grid
from gluonquant.observers import EMAObserver

SIGNED, UNSIGNED = Grid(8, signed=True), Grid(8, signed=False)
BATCHES = [[1.0, -4.0], [3.0, 2.0], [-6.0, 8.0, 0.0], [-1.0, -2.0]]


def shown(batches, **options):
    observer = EMAObserver(**options)
    for batch in batches:
        observer.update(batch)
    return observer


def average(first, *rest, decay):
    for value in rest:
        first = decay * first + (1 - decay) * value
    return first


def test_the_first_batch_sets_the_range():
    assert shown([[1.0, -4.0]]).range(SIGNED) == (-4.0, 4.0)


@pytest.mark.parametrize('decay', [0, 0.5, 0.9, 0.999])
def test_a_signed_range_averages_the_largest_magnitudes_of_the_batches(decay):
    expected = average(4, 3, 8, 2, decay=decay)
    assert shown(BATCHES, decay=decay).range(SIGNED)[1] == pytest.approx(expected, rel=1e-14)  # float64


@pytest.mark.parametrize('decay', [0, 0.5, 0.9, 0.999])
def test_an_unsigned_range_averages_the_largest_values_floored_at_zero(decay):
    expected = average(1, 3, 8, 0, decay=decay)
    assert shown(BATCHES, decay=decay).range(UNSIGNED)[1] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize('decay', [0, 0.5, 0.9])
def test_the_affine_range_averages_minimum_and_maximum_apart(decay):
    expected = average(-4, 2, -6, -2, decay=decay), average(1, 3, 8, -1, decay=decay)
    assert shown(BATCHES, decay=decay).affine_range() == pytest.approx(expected, rel=1e-14)


def test_the_default_decay_is_099():
    assert shown([[1.0], [2.0]]).range(SIGNED)[1] == pytest.approx(1.01, rel=1e-14)


def test_a_decay_of_zero_follows_the_last_batch():
    assert shown([[1e30], [0.1]], decay=0).range(SIGNED)[1] == np.float32(0.1)


def test_while_only_zeros_came_the_next_batch_sets_the_range():
    assert shown([[0.0, 0.0], [0.0], [5.0]]).range(SIGNED)[1] == 5.0


def test_while_nothing_positive_came_the_next_batch_sets_the_unsigned_range():
    assert shown([[-3.0], [-1.0, 0.0], [5.0]]).range(UNSIGNED)[1] == 5.0


def test_zeros_after_the_first_values_are_averaged_in():
    assert shown([[4.0], [0.0]], decay=0.75).range(SIGNED)[1] == 3.0


def test_a_first_batch_of_zeros_sets_the_affine_range():
    assert shown([[0.0], [-8.0, 4.0]], decay=0.75).affine_range() == (-2.0, 1.0)


def test_a_constant_stream_keeps_its_value_to_the_last_bit():
    assert shown([[0.1]] * 1000).range(SIGNED)[1] == np.float32(0.1)


@pytest.mark.parametrize('decay', [-0.01, 1, 1.5, float('nan')])
def test_a_decay_outside_0_to_1_is_refused(decay):
    with pytest.raises(ValueError, match=rf'decay={decay!r} is outside \[0, 1\)'):
        EMAObserver(decay=decay)
