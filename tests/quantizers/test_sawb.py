"""SAWB: the scale from two moments."""
import numpy as np
import pytest
from cases import Case, infer, run, same_bits
from mxnet import nd
from numpy.testing import assert_allclose

from reference.sawb import MIDRISE, TREAD


@pytest.mark.parametrize('grid, table', [(None, MIDRISE), ('tread', TREAD)])
@pytest.mark.parametrize('bits', [2, 3, 4, 5, 6, 7, 8])
def test_alpha_is_the_published_combination_of_moments(bits, grid, table):
    c1, c2 = table.get(bits, TREAD[8])
    w = np.random.default_rng(1).normal(size=(1, 4000))
    alpha = c1 * np.sqrt((w ** 2).mean()) + c2 * np.abs(w).mean()
    q = Case('sawb', 'weight', bits).make(grid=grid)
    # float32 sums over 4000 numbers, and c1 and c2 of opposite sign and up to 35
    assert_allclose(q.qparams(nd.array(w)).scale * q.grid.qmax, min(alpha, np.abs(w).max()), rtol=1e-4)


@pytest.mark.parametrize('bits', [2, 7])
def test_the_default_grid_has_no_zero_up_to_7_bits(bits):
    q = Case('sawb', 'weight', bits).make()
    assert q.grid.midrise
    assert 0 not in infer(q, Case('sawb', 'weight', bits).data(1))


@pytest.mark.parametrize('grid', [None, 'midrise', 'tread'])
def test_8_bits_always_use_the_narrow_grid(grid):
    q = Case('sawb', 'weight', 8).make(grid=grid)
    assert (q.grid.midrise, q.grid.qmin, q.grid.qmax) == (False, -127, 127)


def test_two_bits_have_the_levels_of_the_paper():
    x = Case('sawb', 'weight', 2).data(1)
    q = Case('sawb', 'weight', 2).make()
    alpha = q.qparams(nd.array(x)).scale[0] * 3
    assert_allclose(np.unique(infer(q, x)), alpha * np.array([-1, -1 / 3, 1 / 3, 1]), rtol=1e-6)


@pytest.mark.parametrize('bits', [2, 4, 7])
def test_near_binary_weights_keep_alpha_between_mean_and_maximum(bits):
    """The linear rule becomes negative here."""
    x = np.array([[0.9, -1, 1, -1.1]], np.float32)
    alpha = Case('sawb', 'weight', bits).make().qparams(nd.array(x)).scale[0] * (2 ** bits - 1)
    assert 1 - 1e-6 <= alpha <= 1.1 + 1e-6


def test_clip_passes_no_gradient_beyond_alpha():
    x = np.array([[0.1] * 60 + [5.0]], np.float32)
    q = Case('sawb', 'weight', 2).make(grad_mode='clip')
    dx = run(q, x)[1]
    assert dx[0, -1] == 0
    assert (dx[0, :-1] == 1).all()


def test_zeros_count_as_zero_on_a_grid_without_zero():
    x = np.zeros((1, 5), np.float32)
    q = Case('sawb', 'weight', 4).make()
    assert np.abs(infer(q, x)).max() < 1e-8


def test_scale_is_the_same_in_training_and_inference():
    case = Case('sawb', 'weight', 4)
    q = case.make()
    same_bits(run(q, case.data(1))[0], infer(q, case.data(1)))
