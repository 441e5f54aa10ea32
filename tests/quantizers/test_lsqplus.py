"""LSQ+: the learned offset."""
import numpy as np
import pytest
from cases import Case, infer, run, same_bits
from mxnet import nd
from numpy.testing import assert_allclose

from reference import lsqplus

CASE = Case('lsqplus', 'activation', 4)


def made(scale, offset, **options):
    q = CASE.make(**options)
    q.write(scale=scale, offset=offset, initialized=1.0)
    return q


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('shift', [0.0, 2.0, -2.0])
def test_the_start_is_the_range_of_least_squared_error(bits, shift):
    case = Case('lsqplus', 'activation', bits)
    x = case.data(1) + np.float32(shift)
    q = case.ready(x)
    expected = lsqplus.initial(x, bits, 'activation')
    # float64 arithmetic on float32 numbers, stored as float32
    assert_allclose(q.value('scale'), expected['scale'], rtol=1e-6)
    assert_allclose(q.value('offset'), expected['offset'], rtol=1e-6)


def test_values_are_multiples_of_the_scale_above_the_offset():
    q = made(0.5, -1.1)
    y = infer(q, np.linspace(-3, 9, 200, dtype=np.float32).reshape(1, -1))
    assert_allclose(np.unique(y), -1.1 + 0.5 * np.arange(16), rtol=1e-6, atol=1e-6)     # one product, one sum


@pytest.mark.parametrize('offset, zero_point', [(-1.1, 2), (-1.25, 2), (0.3, 0), (-100.0, 15)])
def test_the_zero_point_is_the_rounded_offset_on_the_grid(offset, zero_point):
    assert made(0.5, offset).qparams() == (0.5, zero_point)             # 2.5 rounds to even


@pytest.mark.parametrize('offset, nudged', [(-1.1, -1.0), (0.3, 0.0), (-100.0, -7.5)])
def test_nudging_trains_with_the_offset_that_is_deployed(offset, nudged):
    q = made(0.5, offset)
    q.nudge_offset()
    x = np.linspace(-9, 9, 200, dtype=np.float32).reshape(1, -1)
    codes = q.quantize(nd.array(x)).asnumpy()
    same_bits(infer(q, x), codes.astype(np.float32) * np.float32(0.5) + np.float32(nudged))
    q.nudge_offset(False)
    assert np.abs(infer(q, x) - codes * 0.5 - nudged).max() > 0


def test_nudging_can_be_asked_for_at_construction_and_is_saved(tmp_path):
    q = made(0.5, -1.1, nudge_offset=True)
    x = np.linspace(-3, 3, 50, dtype=np.float32).reshape(1, -1)
    q.save_parameters(str(tmp_path / 'q'))
    other = CASE.make()
    other.load_parameters(str(tmp_path / 'q'))
    same_bits(infer(other, x), infer(q, x))
    assert 0 in infer(q, x)


def test_gradients_with_nudging_are_the_references():
    q = made(0.3, -0.7, nudge_offset=True)
    x, g = CASE.data(1), CASE.data(2)
    params = {'scale': q.value('scale'), 'offset': q.value('offset')}
    g[lsqplus.activation(x, g, 4, params=params, nudge_offset=True).ties] = 0
    expected = lsqplus.activation(x, g, 4, params=params, nudge_offset=True)
    _, dx, dparams = run(q, x, g)
    assert_allclose(dx, expected.dx, rtol=1e-6)
    for name, gradient in dparams.items():
        assert_allclose(gradient, expected.dparams[name], rtol=1e-4, err_msg=name)      # 300 float32 additions
