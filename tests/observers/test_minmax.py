"""minmax: the range of everything seen."""
from gluonquant.grid import Grid
from gluonquant.observers import MinMaxObserver


def shown(*batches):
    observer = MinMaxObserver()
    for batch in batches:
        observer.update(batch)
    return observer


def test_a_signed_range_reaches_the_largest_magnitude_of_all_batches():
    assert shown([1.0, -5.0], [3.0], [0.0]).range(Grid(8, signed=True)) == (-5.0, 5.0)


def test_an_unsigned_range_reaches_the_largest_value_of_all_batches():
    assert shown([1.0, -5.0], [3.0], [0.0]).range(Grid(8, signed=False)) == (0.0, 3.0)


def test_the_affine_range_is_minimum_and_maximum():
    assert shown([1.0, -5.0], [3.0], [0.0]).affine_range() == (-5.0, 3.0)


def test_the_affine_range_of_positive_data_is_not_widened_to_zero():
    assert shown([2.0, 3.0]).affine_range() == (2.0, 3.0)


def test_the_range_does_not_depend_on_the_bits():
    observer = shown([1.0, -5.0])
    assert observer.range(Grid(2, signed=True)) == observer.range(Grid(8, signed=True))
