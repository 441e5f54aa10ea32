"""LSQ: the learned step."""
import numpy as np
import pytest
from cases import Case, infer, over, run, same_bits, values
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet import autograd, nd
from numpy.testing import assert_allclose

import strategies
from gluonquant import quantizers
from reference import lsq, lsqplus
from reference.observers import mse

UNSIGNED, SIGNED = Case('lsq', 'activation', 4), Case('lsq', 'activation', 4, True)
ALL = [Case('lsq', 'weight', 3), Case('lsq', 'weight', 3, per_channel=True), Case('lsq', 'weight', 3, None, True, 1),
       UNSIGNED, SIGNED]


@settings(max_examples=50, deadline=None)
@given(st.data(), strategies.powers_of_two, st.booleans())
def test_codes_are_numpys_for_difficult_numbers(data, scale, signed):
    q = (SIGNED if signed else UNSIGNED).make()
    q.write(scale=scale, initialized=1.0)
    x = data.draw(strategies.adversarial_arrays(scale, q.grid.qmin, q.grid.qmax)).reshape(1, -1)
    with np.errstate(over='ignore'):
        expected = np.clip(np.rint(x / np.float32(scale)), q.grid.qmin, q.grid.qmax)
    same_bits(q.quantize(nd.array(x)).asnumpy(), expected)
    same_bits(infer(q, x), expected.astype(np.float32) * np.float32(scale))


@settings(max_examples=30, deadline=None)
@given(st.data(), strategies.powers_of_two)
def test_gradients_are_the_references_for_difficult_numbers(data, scale):
    q = SIGNED.make()
    q.write(scale=scale, initialized=1.0)
    x = data.draw(strategies.adversarial_arrays(scale, -8, 7)).reshape(1, -1)
    g = np.linspace(1, 2, x.size, dtype=np.float32).reshape(x.shape)
    expected = lsq.activation(x, g, 4, signed=True, params={'scale': np.array([scale])})
    g[expected.ties] = 0
    expected = lsq.activation(x, g, 4, signed=True, params={'scale': np.array([scale])})
    _, dx, dparams = run(q, x, g)
    same_bits(dx[~expected.ties], expected.dx[~expected.ties])
    # up to 24 float32 terms of at most 2 * 8
    assert_allclose(dparams['scale'], expected.dparams['scale'], rtol=1e-5, atol=1e-5)


@over(ALL)
def test_the_step_starts_at_twice_the_mean_magnitude_over_the_root_of_qmax(case):
    x = case.data(1)
    expected = lsq.initial(x, case.bits, case.role, bool(case.signed), per_channel=case.per_channel, axis=case.axis)
    # float64 mean of float32 numbers, stored as float32
    assert_allclose(case.ready(x).value('scale'), expected['scale'], rtol=1e-6)


@pytest.mark.parametrize('signed', [False, True])
def test_activations_may_start_at_the_step_of_least_squared_error(signed):
    x = Case('lsq', 'activation', 4, signed).data(1)
    quantizer = quantizers.create('lsq', 4, role='activation', signed=signed, init='mse')
    quantizer.init_from(nd.array(x))
    expected = mse(x, -8, 7) / 7 if signed else mse(x, 0, 15) / 15
    assert_allclose(quantizer.value('scale'), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="init='max'"):
        quantizers.create('lsq', 4, role='activation', init='max')


@over(ALL)
def test_the_first_training_batch_sets_the_step_and_the_second_does_not(case):
    q = case.make()
    with autograd.record():
        q(nd.array(case.data(1)))
    first = q.value('scale')
    same_bits(first, case.ready(case.data(1)).value('scale'))
    with autograd.record():
        q(nd.array(case.data(2, 9.0)))
    same_bits(q.value('scale'), first)


def test_the_step_gradient_counts_the_elements_of_one_sample():
    x = np.full((8, 2, 3), 10.0, np.float32)
    q = UNSIGNED.make()
    q.write(scale=0.5, initialized=1.0)
    gradient = run(q, x)[2]['scale'][0]
    assert_allclose(gradient, 48 * 15 / np.sqrt(6 * 15), rtol=1e-6)     # 48 terms of 15, one float32 rsqrt


@pytest.mark.parametrize('per_channel, shared', [(False, 24), (True, 6)])
def test_the_step_gradient_of_weights_counts_the_elements_that_share_a_step(per_channel, shared):
    x = np.full((4, 2, 3), 10.0, np.float32)
    q = Case('lsq', 'weight', 3, per_channel=per_channel).make(shape=x.shape)
    q.write(scale=np.full(4 if per_channel else 1, 0.5), initialized=1.0)
    assert_allclose(run(q, x)[2]['scale'], shared * 3 / np.sqrt(shared * 3), rtol=1e-6)


def test_a_zero_weight_has_the_least_step_and_code_0():
    case = Case('lsq', 'weight', 4)
    q = case.ready(np.zeros(case.shape, np.float32))
    assert_allclose(q.value('scale'), 1e-8, rtol=1e-6)
    assert not q.quantize(nd.zeros(case.shape)).asnumpy().any()


def test_a_negative_step_is_projected_not_mirrored():
    q = UNSIGNED.make()
    q.write(scale=0.5, initialized=1.0)
    q.scale.set_data(nd.array([-0.5]))
    assert_allclose(q.scale.data().asnumpy(), 1e-8, rtol=1e-6)


def test_very_large_inputs_do_not_spoil_the_step_gradient():
    """v = x / scale overflows float32, the residual does not."""
    q = UNSIGNED.make()
    q.write(scale=0.125, initialized=1.0)
    y, _, dparams = run(q, np.array([[3e38, -3e38]], np.float32))
    same_bits(y, [[15 * 0.125, 0]])
    assert_allclose(dparams['scale'], 15 / np.sqrt(2 * 15), rtol=1e-6)


def test_lsqplus_weights_start_at_three_standard_deviations():
    case = Case('lsqplus', 'weight', 4)
    x = case.data(1) + np.float32(0.3)
    expected = lsqplus.initial(x, 4, 'weight')
    assert_allclose(values(case.ready(x))['scale'], expected['scale'], rtol=1e-6)
