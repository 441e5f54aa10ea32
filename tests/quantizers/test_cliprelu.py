"""Clipped ReLU with a fixed threshold."""
import numpy as np
from cases import Case, infer, run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet import nd
from numpy.testing import assert_allclose

import strategies

CASE = Case('cliprelu', 'activation', 4)


@settings(max_examples=50, deadline=None)
@given(st.data(), strategies.powers_of_two)
def test_codes_are_numpys_for_difficult_numbers(data, scale):
    q = CASE.make(threshold=15 * scale)
    x = data.draw(strategies.adversarial_arrays(scale, 0, 15)).reshape(1, -1)
    with np.errstate(over='ignore'):
        expected = np.clip(np.rint(x / np.float32(scale)), 0, 15)
    same_bits(q.quantize(nd.array(x)).asnumpy(), expected)
    same_bits(infer(q, x), expected.astype(np.float32) * np.float32(scale))


def test_the_threshold_is_6_by_default():
    assert_allclose(infer(CASE.make(), np.array([[9.0]], np.float32)), 6, rtol=1e-6)       # 15 * (6 / 15)


def test_training_and_calibration_leave_the_threshold_alone():
    q = CASE.ready(CASE.data(1, 50.0), threshold=3.0)
    run(q, CASE.data(1, 50.0))
    assert q.value('threshold') == 3


def test_the_threshold_is_saved(tmp_path):
    CASE.ready(CASE.data(1), threshold=3.0).save_parameters(str(tmp_path / 'q'))
    q = CASE.make()
    q.load_parameters(str(tmp_path / 'q'))
    assert_allclose(q.qparams().scale, 3 / 15, rtol=1e-6)


def test_it_is_calibrated_from_the_start():
    assert CASE.make().calibrated


def test_negative_inputs_have_code_0():
    same_bits(CASE.make().quantize(nd.array([[-5, -1e-20, 0]])).asnumpy(), [[0, 0, 0]])
