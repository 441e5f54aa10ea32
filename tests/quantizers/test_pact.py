"""PACT: the learned clipping level."""
import numpy as np
import pytest
from cases import Case, infer, run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet import gluon, nd
from numpy.testing import assert_allclose

import strategies
from reference import pact

UNSIGNED, SIGNED = Case('pact', 'activation', 4), Case('pact', 'activation', 4, True)


@settings(max_examples=50, deadline=None)
@given(st.data(), strategies.powers_of_two.filter(lambda scale: scale > 2e-4), st.booleans())
def test_codes_are_numpys_for_difficult_numbers(data, scale, signed):
    q = (SIGNED if signed else UNSIGNED).make()
    q.write(alpha=scale * q.grid.qmax)
    x = data.draw(strategies.adversarial_arrays(scale, q.grid.qmin, q.grid.qmax)).reshape(1, -1)
    with np.errstate(over='ignore'):
        expected = np.clip(np.rint(x / np.float32(scale)), q.grid.qmin, q.grid.qmax)
    same_bits(q.quantize(nd.array(x)).asnumpy(), expected)
    same_bits(infer(q, x), expected.astype(np.float32) * np.float32(scale))


def test_alpha_starts_at_8():
    q = UNSIGNED.make()
    assert q.value('alpha') == 8
    assert_allclose(q.qparams().scale, 8 / 15, rtol=1e-7)


@pytest.mark.parametrize('case', [UNSIGNED, SIGNED], ids=str)
def test_calibration_starts_alpha_at_the_percentile(case):
    x = case.data(1, 3.0)
    q = case.ready(x)
    expected = pact.initial(x, 4, 'activation', bool(case.signed))
    assert_allclose(q.value('alpha'), expected['alpha'], rtol=1e-6)     # float32 interpolation


def test_calibration_with_zeros_starts_alpha_at_its_bound():
    assert UNSIGNED.ready(np.zeros((2, 3), np.float32)).value('alpha') == np.float32(1e-3)


def test_alpha_recovers_after_it_was_pushed_below_its_floor():
    q = UNSIGNED.make()
    trainer = gluon.Trainer(q.collect_params(), 'sgd', {'learning_rate': 1.0})
    x = np.full((1, 4), 2.0, np.float32)
    run(q, x, np.full((1, 4), 100, np.float32))                         # nothing is clipped at alpha = 8
    q.alpha.grad()[:] = 1e6
    trainer.step(1)
    run(q, x, np.full((1, 4), -0.5, np.float32))
    assert q.alpha.grad().asscalar() == -2
    trainer.step(1)
    assert_allclose(q.value('alpha'), 2.001, rtol=1e-6)


def test_training_and_inference_are_the_same():
    q = UNSIGNED.ready(UNSIGNED.data(1))
    x = UNSIGNED.data(2, 3.0)
    same_bits(run(q, x)[0], infer(q, x))


def test_a_nan_alpha_is_an_error_that_names_the_quantizer():
    q = UNSIGNED.make()
    q.write(alpha=np.nan)
    with pytest.raises((ValueError, RuntimeError), match=q.where):
        q.qparams()
