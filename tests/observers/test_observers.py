"""What every observer promises, whatever it computes."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gluonquant import observers
from gluonquant.grid import Grid

NAMES = observers.available()
CUT_INDEPENDENT = ['kl', 'minmax', 'mse', 'percentile']
SIGNED = Grid(4, signed=True, narrow_range=True)
UNSIGNED = Grid(4, signed=False)
GRIDS = [SIGNED, UNSIGNED, Grid(2, signed=True), Grid(3, signed=True, midrise=True), Grid(1, signed=False)]

values = arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32))
grids = st.sampled_from(GRIDS)
every_observer = pytest.mark.parametrize('name', NAMES)
few = settings(max_examples=40, deadline=None)


class FakeNDArray:
    """All that observers may use of an MXNet array."""

    def __init__(self, data):
        self._data = np.asarray(data, np.float32)

    def asnumpy(self):
        return self._data


def observe(name, *batches, **options):
    observer = observers.create(name, **options)
    for batch in batches:
        observer.update(batch)
    return observer


def everything(observer):
    return [observer.range(grid) for grid in GRIDS] + [
        observer.affine_range(), observer.lo, observer.hi, observer.amax, observer.mean_abs, observer.count,
        observer.batches]


# Names


def test_the_five_observers_are_available_by_name():
    assert observers.available() == ['ema', 'kl', 'minmax', 'mse', 'percentile']


@pytest.mark.parametrize('name, kind', [
    ('minmax', observers.MinMaxObserver), ('ema', observers.EMAObserver), ('mse', observers.MSEObserver),
    ('percentile', observers.PercentileObserver), ('kl', observers.KLObserver)])
def test_create_makes_the_class_of_that_name(name, kind):
    assert type(observers.create(name)) is kind


def test_create_passes_options_on():
    assert observers.create('percentile', percentile=99.99, max_values=7).percentile == 99.99


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known_ones():
    with pytest.raises(ValueError, match=r"'minmx'.*'minmax'.*ema, kl, minmax, mse, percentile"):
        observers.create('minmx')


def test_an_option_the_observer_does_not_have_is_refused():
    with pytest.raises(TypeError, match='decay'):
        observers.create('minmax', decay=0.9)


# Statistics


@every_observer
def test_lo_and_hi_are_exact_over_all_batches(name):
    observer = observe(name, [[1.5, -0.1]], [3.25], [-7.0, 2.0])
    assert (observer.lo, observer.hi) == (-7.0, 3.25)


@every_observer
@pytest.mark.parametrize('batch, amax', [([-7.0, 3.0], 7.0), ([-3.0, 7.0], 7.0), ([2.0, 5.0], 5.0)])
def test_amax_is_the_largest_magnitude(name, batch, amax):
    assert observe(name, batch).amax == amax


@every_observer
def test_mean_abs_is_the_mean_over_values_not_over_batches(name):
    assert observe(name, [4.0], [-1.0, 0.0, 3.0]).mean_abs == 2.0


@every_observer
def test_mean_abs_does_not_lose_small_values_beside_large_ones(name):
    batches = [[2.0**24, 1, 1, 1], [1.0], [1.0]]  # in float32, 2**24 + 1 is 2**24
    assert observe(name, *batches).mean_abs == (2**24 + 5) / 6


@every_observer
def test_count_and_batches_count_values_and_batches(name):
    observer = observe(name, np.ones((2, 3)), np.ones(4))
    assert (observer.count, observer.batches) == (10, 2)


@every_observer
def test_an_empty_batch_is_ignored(name):
    assert everything(observe(name, [1.0, -2.0], np.zeros((0, 3)), [0.5])) == everything(
        observe(name, [1.0, -2.0], [0.5]))


@every_observer
def test_shape_does_not_matter(name):
    x = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)
    assert everything(observe(name, x)) == everything(observe(name, x.ravel()))


@every_observer
def test_an_array_with_asnumpy_is_read_through_it(name):
    assert everything(observe(name, FakeNDArray([1.0, -2.5]))) == everything(observe(name, [1.0, -2.5]))


@every_observer
@pytest.mark.parametrize('dtype', ['float16', 'float64', 'int8', 'int64', 'uint8'])
def test_every_real_dtype_counts_as_float32(name, dtype):
    x = np.array([1, 5, 3, 100])
    assert everything(observe(name, x.astype(dtype))) == everything(observe(name, x.astype(np.float32)))


@every_observer
def test_the_batch_is_not_kept_by_reference(name):
    x = np.array([1.0, -3.0, 2.0], np.float32)
    observer = observe(name, x)
    before = everything(observer)
    x[:] = 50
    assert everything(observer) == before


@every_observer
def test_the_batch_is_not_written_to(name):
    x = np.array([1.0, -3.0, 2.0], np.float32)
    everything(observe(name, x))
    assert x.tolist() == [1.0, -3.0, 2.0]


@every_observer
def test_asking_changes_nothing(name):
    x, y = [1.0, -3.0, 2.0], [0.5, 4.0]
    asked = observe(name, x)
    everything(asked)
    asked.update(y)
    assert everything(asked) == everything(observe(name, x, y))


# Ranges


@every_observer
@few
@given(x=values, grid=grids)
def test_a_signed_range_is_symmetric_and_an_unsigned_one_starts_at_zero(name, x, grid):
    lo, hi = observe(name, x).range(grid)
    assert lo == (-hi if grid.signed else 0)


@every_observer
@few
@given(x=values, y=values, grid=grids)
def test_the_range_is_within_the_range_of_the_data(name, x, y, grid):
    both = np.concatenate([x, y]).astype(np.float64)
    largest = np.abs(both).max() if grid.signed else max(both.max(), 0)
    excess = 1 + 0.5 / 2048 if name == 'kl' else 1  # all bins kept means (2048 + 0.5) bins
    # 4 ulp: interpolation (percentile) and the product (kl) round
    assert 0 <= observe(name, x, y).range(grid)[1] <= largest * excess * (1 + 1e-15)


@every_observer
@few
@given(x=values, y=values)
def test_the_affine_range_is_within_the_range_of_the_data(name, x, y):
    lo, hi = observe(name, x, y).affine_range()
    assert min(x.min(), y.min()) <= lo <= hi <= max(x.max(), y.max())


@pytest.mark.parametrize('name', CUT_INDEPENDENT)
@few
@given(x=values, cuts=st.lists(st.integers(0, 60), max_size=5), limit=st.sampled_from([None, 1, 7, 20]))
def test_ranges_do_not_depend_on_how_the_stream_is_cut_into_batches(name, x, cuts, limit):
    options = {} if name == 'minmax' else {'max_values': limit}
    whole = observe(name, x, **options)
    parts = observe(name, *np.split(x, np.minimum(sorted(cuts), len(x))), **options)
    for grid in GRIDS:
        assert parts.range(grid) == whole.range(grid)
    assert parts.affine_range() == whole.affine_range()


@every_observer
@few
@given(x=arrays(np.float32, st.integers(1, 60), elements=st.integers(-999, 999).map(float)),
       power=st.integers(-10, 10), grid=grids)
def test_scaling_the_data_scales_the_range(name, x, power, grid):
    factor = 2.0 ** power  # exact in float32, so the ranges must agree to the last bit
    lo, hi = observe(name, x).range(grid)
    assert observe(name, x * factor).range(grid) == (lo * factor, hi * factor)


@every_observer
@few
@given(x=values)
def test_signed_ranges_do_not_see_the_sign_of_the_data(name, x):
    assert observe(name, x).range(SIGNED) == observe(name, -x).range(SIGNED)


# Corner cases


@every_observer
@pytest.mark.parametrize('grid', GRIDS)
def test_all_zero_data_has_the_range_zero(name, grid):
    assert observe(name, np.zeros(9)).range(grid) == (0, 0)


@every_observer
def test_negative_data_has_the_range_zero_on_an_unsigned_grid(name):
    assert observe(name, [-3.0, -1.0, -2.0]).range(UNSIGNED) == (0, 0)


@pytest.mark.parametrize('name', ['ema', 'kl', 'minmax', 'percentile'])
@pytest.mark.parametrize('grid', [SIGNED, UNSIGNED])
@pytest.mark.parametrize('constant', [2.5, 1e-45, 3.4e38])
def test_a_constant_is_its_own_range(name, grid, constant):
    hi = observe(name, np.full(50, constant, np.float32)).range(grid)[1]
    assert hi == np.float32(constant)


@every_observer
@pytest.mark.parametrize('grid', [SIGNED, UNSIGNED])
def test_a_single_value_has_a_positive_range(name, grid):
    assert 0 < observe(name, [0.75]).range(grid)[1] <= 0.75


@every_observer
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('size', [1e-45, 1e-39, 1e-20, 1e30, 3e38])
def test_ranges_of_tiny_and_huge_data_are_finite_and_positive(name, grid, size):
    x = (np.arange(1, 41) / 40 * size).astype(np.float32)
    hi = observe(name, x).range(grid)[1]
    assert 0 < hi <= float(x.max()) * (1 + 0.5 / 2048) * (1 + 1e-15)


@every_observer
@pytest.mark.filterwarnings('error')
def test_a_huge_negative_value_raises_no_warning_on_an_unsigned_grid(name):
    observe(name, [-3e38, 1e-3, 5e-4]).range(UNSIGNED)


# Refusals


@every_observer
@pytest.mark.parametrize('ask', [
    lambda o: o.range(SIGNED), lambda o: o.affine_range(), lambda o: o.lo, lambda o: o.hi, lambda o: o.amax,
    lambda o: o.mean_abs])
def test_asking_before_any_value_came_is_an_error(name, ask):
    with pytest.raises(RuntimeError, match='Observer has observed nothing: call update'):
        ask(observe(name, np.zeros((0, 4))))


@every_observer
def test_non_finite_values_are_counted_in_the_error(name):
    with pytest.raises(ValueError, match=r'3 of 5 values are not finite in float32 \(1 NaN, 2 Inf\)'):
        observe(name, [1.0, np.nan, np.inf, -np.inf, 0.0])


@every_observer
def test_a_float64_value_beyond_float32_is_refused_as_infinite(name):
    with pytest.raises(ValueError, match=r'1 of 2 values .*\(0 NaN, 1 Inf\)'):
        observe(name, np.array([1.0, 1e39]))


@every_observer
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_refused_batch_changes_nothing(name, bad):
    observer = observe(name, [1.0, -2.0, 0.25])
    before = everything(observer)
    with pytest.raises(ValueError, match='not finite'):
        observer.update([9.0, bad])
    assert everything(observer) == before


@every_observer
def test_a_refused_first_batch_leaves_the_observer_new(name):
    observer = observers.create(name)
    with pytest.raises(ValueError, match='not finite'):
        observer.update([np.nan])
    observer.update([1.0, 2.0])
    assert everything(observer) == everything(observe(name, [1.0, 2.0]))


@every_observer
@pytest.mark.parametrize('x', [['a'], [1j], [None]])
def test_values_that_are_not_real_numbers_are_refused(name, x):
    with pytest.raises(TypeError, match='takes real numbers, not values of dtype'):
        observe(name, x)


def test_a_subclass_without_a_rule_says_so():
    class Silent(observers.Observer):
        pass

    silent = Silent()
    silent.update([1.0])
    with pytest.raises(NotImplementedError, match='Silent does not define _amax'):
        silent.range(SIGNED)
