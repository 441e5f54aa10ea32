"""What every quantizer promises, over method x role x bits x signed x granularity, hybridized or not."""
import warnings
from functools import lru_cache

import mxnet as mx
import numpy as np
import pytest
from cases import ACTIVATIONS, EVERYTHING, ROUNDING, WEIGHTS, Case, compared, few, infer, over, run, same_bits, values
from mxnet import autograd, nd
from numpy.testing import assert_allclose

from gluonquant import quantizers
from reference import METHODS

pytestmark = pytest.mark.filterwarnings('ignore:.*is not calibrated')

# Their scale does not follow the data.
GIVEN_SCALE = ('cliprelu', 'lsq', 'pact')
SYMMETRIC = ('dorefa', 'gdrq', 'int8', 'lsq', 'lsqplus', 'pact', 'qil', 'sawb')

# Sums over up to 300 float32 numbers, and one rounding for each elementary operation, stay below this.
OUTPUT = 1e-5
# Parameters in float32 after a handful of operations.
STATE = 1e-6


@lru_cache(maxsize=None)
def passes(case):
    """Two training passes (the second moves the averages) and an inference pass with a larger batch."""
    q = case.make()
    return [compared(case, q, case.data(1), seed=11), compared(case, q, case.data(2, 1.7), seed=12),
            compared(case, q, case.data(3, 2.5), seed=13, training=False)]


def close_to_largest(actual, expected, ties, tolerance):
    largest = np.abs(expected).max()
    assert_allclose(actual[~ties], expected[~ties], rtol=0, atol=tolerance * max(largest, 1e-30))


def trained(case, hybridized=False, **options):
    """A quantizer that has seen two batches in training."""
    q = case.make(hybridized, **options)
    for seed in (1, 2):
        run(q, case.data(seed))
    return q


# ---------------------------------------------------------------- against the float64 reference


@over(EVERYTHING)
def test_outputs_equal_the_reference(case):
    for one in passes(case):
        close_to_largest(one.y, one.expected.y, one.expected.ties, OUTPUT)


@over(ROUNDING)
def test_codes_equal_the_reference(case):
    for one in passes(case):
        decided = ~one.expected.ties
        same_bits(one.codes[decided], one.expected.codes[decided])


@over(ROUNDING)
def test_scale_and_zero_point_equal_the_reference(case):
    q = case.make()
    for seed in (1, 2):
        one = compared(case, q, case.data(seed), seed)
        scale, zero_point = q.qparams(nd.array(one.x))
        assert_allclose(scale, one.expected.scale, rtol=STATE)
        assert_allclose(zero_point, one.expected.zero_point, rtol=0, atol=0)


@over(ROUNDING)
def test_the_comparison_leaves_out_few_elements(case):
    assert max(one.expected.ties.mean() for one in passes(case)) < 0.25


@over(EVERYTHING)
def test_state_after_each_pass_equals_the_reference(case):
    for one in passes(case):
        for name, value in one.expected.state.items():
            if name in one.state:
                assert_allclose(one.state[name], value, rtol=STATE, err_msg=name)


@over([case for case in ACTIVATIONS if case.name in ('int8', 'affine', 'fqn', 'gdrq')])
def test_the_second_training_pass_moves_the_state_by_the_decay_only(case):
    first, second = (one.state for one in passes(case)[:2])
    name = next(name for name in ('amax', 'hi', 'threshold') if name in first)
    assert first[name] < second[name] < 1.1 * first[name]       # the batch grew by 1.7, decay is 0.99 or 0.999


# ---------------------------------------------------------------- output and codes belong together


@over(ROUNDING)
def test_the_output_is_scale_times_code_minus_zero_point_to_the_last_bit(case):
    options = {'nudge_offset': True} if case.name == 'lsqplus' and case.role == 'activation' else {}
    q = trained(case, **options)
    x = case.data(3, 2.0)
    for y in (run(q, x)[0], infer(q, x)):
        scale, zero_point = q.qparams(nd.array(x))
        codes = q.quantize(nd.array(x)).asnumpy()
        same_bits(y, case.spread(scale) * (codes - case.spread(zero_point)).astype(np.float32))


@over(ROUNDING)
def test_qparams_are_float32_and_int32_with_one_entry_for_each_scale(case):
    x = case.data(1)
    scale, zero_point = case.ready(x).qparams(nd.array(x))
    length = x.shape[case.axis] if case.per_channel else 1
    assert (scale.shape, scale.dtype, zero_point.shape, zero_point.dtype) == ((length,), 'float32', (length,), 'int32')


def sweep(case):
    """Sorted values, well past the range, in the same rows for each scale."""
    row = np.linspace(-4, 4, 1200, dtype=np.float32)
    if not case.per_channel:
        return row.reshape(1, -1)
    return np.stack([row * size for size in range(1, 1 + case.shape[case.axis])], axis=case.axis)


@over(ROUNDING)
def test_codes_stay_on_the_grid(case):
    x = sweep(case)
    codes = case.ready(x / 2).quantize(nd.array(x)).asnumpy()
    grid = case.make().grid
    assert codes.dtype == np.int32
    assert grid.qmin <= codes.min()
    assert codes.max() <= grid.qmax
    if grid.midrise:
        assert (codes % 2 == 1).all()


@over(ROUNDING)
def test_at_most_two_to_the_bits_levels_for_each_scale(case):
    x = sweep(case)
    y = infer(case.ready(x / 2), x)
    grid = case.make().grid
    assert grid.levels == 2 ** case.bits - (1 if grid.narrow_range else 0)
    for row in case.groups(y):
        assert len(np.unique(row)) <= grid.levels


@over([case for case in WEIGHTS if case.name in ('dorefa', 'int8', 'qil') and case.bits > 1])
def test_data_that_fill_the_range_use_every_level(case):
    x = sweep(case)
    q = case.ready(x)
    if case.name == 'qil':
        q.init_from(nd.array([[4.0, -4.0]]))                # at 2 and 3 bits it starts from the squared error
    for row in case.groups(infer(q, x)):
        assert len(np.unique(row)) == q.grid.levels


@over(ROUNDING)
def test_outputs_never_fall_where_inputs_rise(case):
    x = sweep(case)
    for row in case.groups(infer(case.ready(x / 2), x)):
        assert (np.diff(row) >= 0).all()


@over([case for case in ROUNDING if not case.make().grid.midrise])
def test_zero_stays_exactly_zero(case):
    options = {'nudge_offset': True} if case.name == 'lsqplus' and case.role == 'activation' else {}
    x = case.data(1)
    x.reshape(-1)[::3] = 0
    y = infer(case.ready(x, **options), x)
    assert (y.reshape(-1)[::3] == 0).all()


@over([case for case in ACTIVATIONS if case.name in GIVEN_SCALE])
def test_quantizing_twice_changes_nothing(case):
    q = case.ready(case.data(1))
    once = infer(q, case.data(2))
    same_bits(infer(q, once), once)


@over([case for case in ROUNDING if case.name == 'int8'])
def test_quantizing_twice_keeps_the_codes_of_max_based_scales(case):
    x = case.data(1)
    q = case.ready(x)
    once = infer(q, x)
    same_bits(q.quantize(nd.array(once)).asnumpy(), q.quantize(nd.array(x)).asnumpy())
    assert_allclose(infer(q, once), once, rtol=3e-7)        # Q * (max / Q) may be a neighbour of max


def is_odd(case):
    grid = case.make().grid
    return case.name in SYMMETRIC and grid.signed and (grid.narrow_range or grid.midrise)


@over([case for case in ROUNDING if is_odd(case)])
def test_symmetric_grids_are_odd(case):
    x = case.data(1)
    x = np.where(np.abs(x) < 1e-3, np.float32(0.3), x)      # 0 has no level on a midrise grid
    q = case.ready(x)
    if q.grid.midrise:                                      # halves between two odd codes go to the upper or lower
        half = np.abs(case.reference(x, x, values(q), values(q), False).ties)
        x = np.where(half, np.float32(0.3), x)
    same_bits(infer(q, -x), -infer(q, x))


# ---------------------------------------------------------------- shape and type


@over(few(EVERYTHING))
def test_shape_and_type_are_kept(case):
    x = case.data(1)
    y = run(case.make(), x)[0]
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@over([case for case in ACTIVATIONS if case.bits == 4])
@pytest.mark.parametrize('shape', [(5,), (2, 3), (2, 3, 4), (2, 3, 1, 2, 2)], ids=str)
def test_activations_have_any_number_of_dimensions(case, shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    one = compared(case, case.make(), x, seed=2)
    close_to_largest(one.y, one.expected.y, one.expected.ties, OUTPUT)


@over(few(EVERYTHING))
@pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])
def test_after_cast_the_parameters_stay_float32_and_the_output_is_float16(case, hybridized):
    x = case.data(1).astype(np.float16)
    expected = infer(case.ready(x.astype(np.float32)), x.astype(np.float32)).astype(np.float16)
    q = case.ready(x.astype(np.float32))
    q.cast('float16')
    if hybridized:
        q.hybridize(static_alloc=True, static_shape=True)
    y = infer(q, x)
    assert y.dtype == np.float16
    same_bits(y, expected)
    assert {value.dtype for value in values(q).values()} <= {np.dtype('float32')}


@over(few(EVERYTHING))
def test_training_in_float16_gives_float16_gradients_of_the_float32_pass(case):
    x = case.data(1).astype(np.float16)
    q, wide = case.ready(x.astype(np.float32)), case.ready(x.astype(np.float32))
    q.cast('float16')
    _, dx, dparams = run(q, x)
    _, expected, expected_params = run(wide, x.astype(np.float32))
    assert dx.dtype == np.float16
    assert_allclose(dx, expected, rtol=1e-3, atol=1e-7)     # one rounding to float16
    for name, value in expected_params.items():
        same_bits(dparams[name], value)


@over(few(ROUNDING))
@pytest.mark.parametrize('shape', [(0, 6, 3, 3), (4, 0)], ids=str)
def test_an_empty_input_comes_back_and_changes_nothing(case, shape):
    q = trained(case)
    before = values(q)
    with mx.util.np_shape(True):
        x = nd.zeros(shape)
        with autograd.record():
            assert q(x).shape == shape
    for name, value in values(q).items():
        same_bits(value, before[name])


# ---------------------------------------------------------------- extreme data

EXTREMES = {
    'constant': lambda shape: np.full(shape, 0.7), 'negative': lambda shape: np.full(shape, -0.7),
    'zero': np.zeros, 'huge': lambda shape: np.linspace(-1e30, 1e30, int(np.prod(shape))).reshape(shape),
    'tiny': lambda shape: np.linspace(-1e-30, 1e-30, int(np.prod(shape))).reshape(shape),
    'denormal': lambda shape: np.full(shape, 1e-44), 'outlier': lambda shape: np.eye(1, int(np.prod(shape))).reshape(
        shape) * 1e20}


@over([case for case in ROUNDING if case.bits == 4])
@pytest.mark.parametrize('kind', EXTREMES)
def test_extreme_inputs_have_finite_outputs_gradients_and_state(case, kind):
    x = EXTREMES[kind](case.shape).astype(np.float32)
    q = case.make()
    for training in (True, False):
        y, dx, dparams = run(q, x, training=training)
        for name, value in {'y': y, 'dx': dx, **dparams, **values(q)}.items():
            assert np.isfinite(value).all(), name


@over(few(ROUNDING))
def test_a_quantizer_with_a_usual_range_survives_extreme_inputs(case):
    q = case.ready(case.data(1))
    for make in EXTREMES.values():
        y, dx, dparams = run(q, make(case.shape).astype(np.float32), training=False)
        for name, value in {'y': y, 'dx': dx, **dparams}.items():
            assert np.isfinite(value).all(), name


@over(few(ROUNDING))
@pytest.mark.parametrize('value', [0.0, -3.0, 1e30])
def test_a_single_element_has_a_finite_output_and_gradient(case, value):
    x = np.full((1, 1), value, np.float32)
    q = case.make(shape=x.shape) if case.per_channel else case.make()
    for training in (True, False):
        y, dx, dparams = run(q, x, training=training)
        for number in (y, dx, *dparams.values()):
            assert np.isfinite(number).all()


@over(few([case for case in ROUNDING if case.name != 'lsqplus' or case.role == 'weight']))
def test_an_all_zero_tensor_stays_zero(case):
    x = np.zeros(case.shape, np.float32)
    q = case.make()
    for training in (True, False):
        y = run(q, x, training=training)[0]
        # mid-rise grids have no zero: their floor of 1e-8 / L counts as zero
        assert np.abs(y).max() <= (1e-8 if q.grid.midrise else 0)


@over(few(ACTIVATIONS))
@pytest.mark.parametrize('training', [True, False], ids=['training', 'inference'])
def test_nan_and_inf_come_out_non_finite_exactly_where_they_went_in(case, training):
    q = trained(case)
    x = case.data(3)
    bad = np.zeros(x.size, bool)
    bad[[10, 31, 77]] = True
    x.reshape(-1)[[10, 31, 77]] = np.nan, np.inf, -np.inf
    y = run(q, x, training=training)[0]
    same_bits(~np.isfinite(y).reshape(-1), bad)


@over(few(ACTIVATIONS))
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_non_finite_batches_do_not_poison_the_state(case, value):
    q = trained(case)
    before = values(q)
    x = case.data(3)
    x.reshape(-1)[10] = value
    run(q, x)
    after = values(q)
    if value == -np.inf and case.name == 'int8' and not q.grid.signed:
        after.pop('amax')               # its statistic is the maximum, which -Inf leaves finite
    for name in after:
        same_bits(after[name], before[name])


@over(few(ACTIVATIONS))
def test_finite_elements_of_a_broken_batch_are_quantized_as_in_inference(case):
    q = trained(case)
    x = case.data(3)
    x.reshape(-1)[10] = np.nan
    trained_y = run(q, x)[0]
    same_bits(trained_y, infer(q, x))


@over(few(WEIGHTS))
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_broken_weight_is_never_hidden(case, value):
    x = case.data(1)
    q = case.ready(x)
    x.reshape(-1)[10] = value
    assert not np.isfinite(infer(q, x).reshape(-1)[10])


# ---------------------------------------------------------------- hybridized


def history(case, hybridized, order):
    """All that can be seen of a sequence of passes, True for training."""
    q = case.make(hybridized)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for seed, training in enumerate(order):
            y, dx, dparams = run(q, case.data(seed, 1 + seed / 2), case.data(seed + 50), training)
            seen.append({'y': y, 'dx': dx, **{'d' + name: value for name, value in dparams.items()}, **values(q)})
    return seen


def assert_hybridized_equals_imperative(case, order):
    for static, dynamic in zip(history(case, True, order), history(case, False, order)):
        assert static.keys() == dynamic.keys()
        for name, value in dynamic.items():
            np.testing.assert_array_equal(static[name], value, err_msg=name)


@over(EVERYTHING)
def test_hybridized_equals_imperative_to_the_last_bit(case):
    assert_hybridized_equals_imperative(case, (True, True, True, False))


@over(few(EVERYTHING))
def test_a_graph_that_ran_in_inference_first_equals_imperative_to_the_last_bit(case):
    assert_hybridized_equals_imperative(case, (False, True, False, True, True, False))


@over([case for case in ACTIVATIONS if case.bits == 4])
def test_one_cached_graph_serves_batches_of_several_sizes(case):
    q = case.make(hybridized=True)
    reference = case.make()
    for size in (3, 1, 2):
        x = case.data(size)[:size]
        same_bits(run(q, x)[0], run(reference, x)[0])


@over([case for case in ROUNDING if case.bits == 4])
def test_tracing_to_a_symbol_keeps_the_numbers(case, tmp_path):
    q = trained(case, hybridized=True)
    x = case.data(3)
    expected = infer(q, x)
    q.export(str(tmp_path / 'q'))
    loaded = mx.gluon.SymbolBlock.imports(str(tmp_path / 'q-symbol.json'), ['data'], str(tmp_path / 'q-0000.params'))
    same_bits(loaded(nd.array(x)).asnumpy(), expected)


# ---------------------------------------------------------------- the interface


def test_every_reference_has_a_quantizer_and_the_other_way_round():
    assert set(METHODS) == set(quantizers.available())


@over(ROUNDING)
def test_quantizers_say_their_role_and_grid(case):
    q = case.make()
    assert (q.role, q.grid.bits) == (case.role, case.bits)


@pytest.mark.parametrize('role', ['weight', 'activation'])
def test_identity_returns_its_input_and_has_no_codes(role):
    q = Case('none', role, 8).make()
    x = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    same_bits(infer(q, x), x)
    with pytest.raises(RuntimeError, match='does not quantize: it has no codes'):
        q.quantize(nd.array(x))
    with pytest.raises(RuntimeError, match='no scale and no zero point'):
        q.qparams()


# ---------------------------------------------------------------- errors


def names_by_role():
    return [(role, name) for role in ('weight', 'activation') for name in quantizers.available(role) if name != 'none']


every_method = pytest.mark.parametrize('role, name', names_by_role())


@every_method
@pytest.mark.parametrize('bits', [0, 2.5, 33, True, '4', None, -1])
def test_other_bit_widths_are_an_error_that_shows_the_value(role, name, bits):
    with pytest.raises(ValueError, match=rf'bits={bits!r}( is not a bit width: pass an integer from 1 to 16|: )'):
        quantizers.create(name, bits, role)


@pytest.mark.parametrize('role, name, options', [
    ('weight', 'int8', {}), ('weight', 'lsq', {}), ('weight', 'lsqplus', {}), ('weight', 'qil', {}),
    ('weight', 'gdrq', {}), ('weight', 'sawb', {}),
    ('activation', 'int8', {'signed': True}), ('activation', 'pact', {'signed': True}),
    ('activation', 'gdrq', {'signed': True}), ('activation', 'lsq', {'signed': True})])
def test_one_bit_is_an_error_where_it_leaves_no_useful_code(role, name, options):
    with pytest.raises(ValueError, match=r'bits=1\b'):
        quantizers.create(name, 1, role, **options)


def test_one_bit_is_legal_elsewhere():
    one_bit = {(case.role, case.name) for case in ROUNDING if case.bits == 1}
    assert one_bit == {('weight', 'affine'), ('weight', 'fqn'), ('weight', 'dorefa')} | {
        ('activation', name) for name in quantizers.available('activation') if name != 'none'}


def test_nine_bits_are_too_many_for_sawb():
    with pytest.raises(ValueError, match='bits=9: SAWB supports 2 to 8 bits'):
        quantizers.create('sawb', 9)


@every_method
def test_an_unknown_option_is_a_type_error_that_names_it(role, name):
    with pytest.raises(TypeError, match='no_such_option'):
        quantizers.create(name, 4, role, no_such_option=1)


@pytest.mark.parametrize('name', [name for role, name in names_by_role() if role == 'activation'])
def test_activations_have_no_scale_per_channel(name):
    with pytest.raises(ValueError, match='per_channel=True: .* quantizes activations, which have one scale'):
        quantizers.create(name, 4, 'activation', per_channel=True)


@pytest.mark.parametrize('name', ['dorefa', 'qil'])
def test_methods_with_one_scale_per_tensor_refuse_channels(name):
    with pytest.raises(ValueError, match='per_channel=True: '):
        quantizers.create(name, 4, 'weight', per_channel=True)


@pytest.mark.parametrize('name', [name for role, name in names_by_role() if role == 'weight'])
def test_weights_have_both_signs(name):
    with pytest.raises(ValueError, match='signed=False: .* quantizes weights, which have both signs'):
        quantizers.create(name, 4, 'weight', signed=False)


@pytest.mark.parametrize('name', ['cliprelu', 'dorefa', 'qil'])
def test_unsigned_activations_refuse_signed_inputs(name):
    with pytest.raises(ValueError, match='signed=True: '):
        quantizers.create(name, 4, 'activation', signed=True)


@pytest.mark.parametrize('axis', [2, -1, None, '0'])
def test_weights_have_their_channels_on_axis_0_or_1(axis):
    with pytest.raises(ValueError, match=rf'axis={axis!r}: output channels are axis 0, or 1'):
        quantizers.create('int8', 8, axis=axis)


@pytest.mark.parametrize('role, name, option, value', [
    ('activation', 'int8', 'grad_mode', 'Clip'), ('activation', 'int8', 'ema_decay', 1.0),
    ('activation', 'int8', 'ema_decay', -0.1), ('activation', 'affine', 'ema_decay', 2),
    ('activation', 'affine', 'percentile', 50), ('activation', 'affine', 'percentile', 100.5),
    ('activation', 'affine', 'grad_mode', None), ('activation', 'cliprelu', 'threshold', 0.0),
    ('activation', 'cliprelu', 'threshold', float('nan')), ('weight', 'dorefa', 'rescale', 'mean'),
    ('weight', 'sawb', 'grid', 'narrow'), ('weight', 'sawb', 'grad_mode', 'pass'), ('weight', 'gdrq', 'ktimes', 0),
    ('weight', 'gdrq', 'alpha_mode', 'best'), ('weight', 'gdrq', 'group_size', 0), ('weight', 'gdrq', 'group_size', -2),
    ('weight', 'gdrq', 'group_size', 1.0), ('activation', 'gdrq', 'ktimes', -1.0), ('activation', 'gdrq', 'lam', 0),
    ('activation', 'gdrq', 'lam', 1.5), ('activation', 'lsq', 'delay_quant', -1),
    ('activation', 'pact', 'delay_quant', 1.5),
    ('activation', 'int8', 'delay_quant', True), ('weight', 'lsq', 'ewgs', -0.2), ('weight', 'qil', 'ewgs', 0.2)])
def test_a_wrong_option_value_is_an_error_that_shows_it(role, name, option, value):
    shown = f'{option}={value!r}' if option != 'ewgs' or value < 0 else 'no element-wise gradient scaling'
    with pytest.raises(ValueError, match=shown):
        quantizers.create(name, 4, role, **{option: value})
