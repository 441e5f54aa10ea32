"""QIL: the learned interval."""
import numpy as np
import pytest
from cases import Case, compared, infer, over, run, same_bits
from mxnet import gluon, nd
from numpy.testing import assert_allclose

from reference import qil

WEIGHT, ACTIVATION = Case('qil', 'weight', 3), Case('qil', 'activation', 3)


def interval(case, center, distance, gamma=None, **options):
    q = case.make(**options)
    q.write(center=center, distance=distance, start=2.0, initialized=1.0, **({'gamma': gamma} if gamma else {}))
    return q


@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('gamma', [0.5, 1.0, 2.5])
def test_weights_with_a_pruning_point_and_an_exponent_follow_the_reference(gamma, rescale):
    q = interval(WEIGHT, 1.1, 0.7, gamma, rescale=rescale)
    case = Case('qil', 'weight', 3, options=(('rescale', rescale),))
    one = compared(case, q, case.data(1), seed=2)
    decided = ~one.expected.ties
    # gamma < 1 amplifies the rounding of the interval's place near the pruning point
    assert_allclose(one.y[decided], one.expected.y[decided], rtol=1e-5)
    assert_allclose(one.dx[decided], one.expected.dx[decided], rtol=1e-4, atol=1e-6)
    for name, gradient in one.dparams.items():
        assert_allclose(gradient, one.expected.dparams[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize('rescale', [True, False])
def test_activations_with_a_pruning_point_follow_the_reference(rescale):
    q = interval(ACTIVATION, 1.1, 0.7, rescale=rescale)
    case = Case('qil', 'activation', 3, options=(('rescale', rescale),))
    one = compared(case, q, case.data(1, 1.5), seed=2)
    decided = ~one.expected.ties
    assert_allclose(one.y[decided], one.expected.y[decided], rtol=1e-5)
    assert_allclose(one.dx[decided], one.expected.dx[decided], rtol=1e-5)
    for name, gradient in one.dparams.items():
        assert_allclose(gradient, one.expected.dparams[name], rtol=1e-4, err_msg=name)


def test_magnitudes_below_the_pruning_point_become_zero():
    q = interval(WEIGHT, 2.0, 1.0)
    same_bits(infer(q, np.array([[-0.99, 0, 0.5, 1.1]], np.float32)), [[0, 0, 0, 0]])   # 1.1: R(0.15) = 0


def test_magnitudes_above_the_clipping_point_become_the_top_level():
    q = interval(WEIGHT, 2.0, 1.0)
    same_bits(infer(q, np.array([[3, 4, -1e30]], np.float32)), [[3, 3, -3]])


def test_without_rescale_the_top_level_is_1():
    assert infer(interval(WEIGHT, 2.0, 1.0, rescale=False), np.array([[9.0]], np.float32)) == 1


@over([Case('qil', 'weight', bits) for bits in (2, 3, 4, 8)] + [ACTIVATION])
def test_the_start_is_the_identity_on_the_range_of_the_data(case):
    x = case.data(1)
    q, expected = case.ready(x), qil.initial(x, case.bits, case.role)
    for name, value in expected.items():
        assert_allclose(q.value(name), value, rtol=1e-6, err_msg=name)         # float64 statistics, stored as float32
    assert_allclose(q.value('start'), 2 * expected['distance'], rtol=1e-6)


def test_at_the_start_eight_bits_change_weights_by_half_a_step_at_most():
    case = Case('qil', 'weight', 8)
    x = case.data(1)
    q = case.ready(x)
    assert np.abs(infer(q, x) - x).max() <= q.qparams().scale[0] / 2 * (1 + 1e-4)       # float32 near a tie


def test_the_encoder_of_activations_is_a_plain_quantizer_of_the_shifted_input():
    q = interval(ACTIVATION, 1.25, 0.75)                    # p = 0.5, 2d = 1.5
    p, scale = q.encoder()
    assert (p, scale) == (0.5, 1.5 / 7)
    x = np.linspace(-1, 3, 777, dtype=np.float32).reshape(1, -1)
    codes = np.clip(np.rint((x - p) / scale), 0, 7)
    place = (x - p) / scale
    decided = np.abs(place - np.floor(place) - 0.5) > 1e-4  # halves: the encoder divides once, training twice
    same_bits(q.quantize(nd.array(x)).asnumpy()[decided], codes[decided])


@pytest.mark.parametrize('name, value, bounds', [
    ('distance', -1.0, {'distance': 2e-4, 'center': 1.0}), ('distance', 5.0, {'distance': 3.0, 'center': 3.0}),
    ('center', 0.3, {'distance': 0.4, 'center': 0.4}), ('center', -3.0, {'distance': 2e-4, 'center': 2e-4}),
    ('gamma', 0.0, {'gamma': 0.1}), ('gamma', 99.0, {'gamma': 10.0})])
def test_values_outside_their_bounds_are_projected_at_use(name, value, bounds):
    q = interval(WEIGHT, 1.0, 0.5, 1.0)                     # start = 2
    getattr(q, name).set_data(nd.array([value]))
    infer(q, WEIGHT.data(1))
    for bounded, expected in bounds.items():
        assert_allclose(getattr(q, bounded).data().asnumpy(), expected, rtol=1e-6, err_msg=bounded)


@pytest.mark.parametrize('case', [WEIGHT, ACTIVATION], ids=['weight', 'activation'])
def test_gradients_that_pull_center_and_distance_apart_do_not_let_the_interval_grow(case):
    """At p = 0 that is what they do. Raising center alone after each step lets both grow with each of them: weights'
    intervals in networks by factors of thousands, until every code is 0.
    """
    x = case.data(1)
    q = case.ready(x)
    start = q.value('center').item() + q.value('distance').item()
    trainer = gluon.Trainer(q.collect_params(), 'sgd', {'learning_rate': 1.0})
    for _ in range(100):
        run(q, x)
        for name, slope in (('center', 1.0), ('distance', -1.0)):
            getattr(q, name).grad()[:] = slope
        trainer.step(1)
    assert_allclose(q.value('center').item() + q.value('distance').item(), start, rtol=1e-5)


def test_gamma_stands_still_unless_it_is_trained():
    for train_gamma in (False, True):
        q = WEIGHT.ready(WEIGHT.data(1), train_gamma=train_gamma)
        trainer = gluon.Trainer(q.collect_params(), 'sgd', {'learning_rate': 1.0})
        run(q, WEIGHT.data(1), WEIGHT.data(2))
        trainer.step(1)
        assert (q.value('gamma') != 1) == train_gamma


def test_an_interval_without_elements_has_zero_gradients():
    q = interval(WEIGHT, 50.0, 0.5, rescale=False)
    _, dx, dparams = run(q, WEIGHT.data(1))
    for gradient in (dx, *dparams.values()):
        assert not gradient.any()


def test_a_progressive_schedule_starts_from_the_parameters_of_more_bits(tmp_path):
    x = WEIGHT.data(1)
    wide = Case('qil', 'weight', 4).ready(x)
    wide.write(center=1.3, distance=0.9)
    wide.save_parameters(str(tmp_path / 'q'))
    narrow = WEIGHT.make()
    narrow.load_parameters(str(tmp_path / 'q'))
    run(narrow, x)
    assert (narrow.value('center'), narrow.value('distance')) == (np.float32(1.3), np.float32(0.9))
