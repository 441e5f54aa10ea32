"""State, modes and Parameters: when they change, that they are saved, and what an optimizer can do to them."""
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from cases import ROUNDING, Case, infer, learned, over, run, same_bits, values
from mxnet import autograd, gluon, nd

from gluonquant import quantizers
from gluonquant.quantizers import OBSERVE, OFF, QUANTIZE

FEW = [case for case in ROUNDING if case.bits == 4]         # state has nothing to do with the number of bits
FEW_WEIGHTS = [case for case in FEW if case.role == 'weight']
FEW_ACTIVATIONS = [case for case in FEW if case.role == 'activation']
LEARNED = [case for case in FEW if learned(case.make())]
CALIBRATED = [case for case in FEW if case.make().marker and not case.make().default_range]
STATIC = pytest.mark.parametrize('hybridized', [False, True], ids=['imperative', 'hybridized'])


def assert_same_values(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@contextmanager
def quiet():
    """A warning of ours is an error; those of MXNet's dependencies are not."""
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        yield


def statistics(case):
    """The state that follows the data."""
    if case.name == 'cliprelu':
        return []
    return [name for name in ('amax', 'lo', 'hi', 'threshold') if name in values(case.make())]


FOLLOWING = [case for case in FEW_ACTIVATIONS if statistics(case)]


# ---------------------------------------------------------------- when state changes


@over(FEW)
@STATIC
def test_inference_changes_no_state(case, hybridized):
    q = case.ready(case.data(1), hybridized)
    run(q, case.data(1))
    before = values(q)
    infer(q, case.data(2, 5.0))
    run(q, case.data(3, 5.0), training=False)           # recorded, in prediction mode
    assert_same_values(values(q), before)


@over(FOLLOWING)
@STATIC
def test_training_moves_the_statistics(case, hybridized):
    q = case.ready(case.data(1), hybridized)
    before = values(q)
    run(q, case.data(2, 5.0))
    after = values(q)
    assert all(np.abs(after[name]) > np.abs(before[name]) for name in statistics(case))


@over(FOLLOWING)
def test_a_training_pass_that_is_not_recorded_still_moves_the_statistics(case):
    q = case.ready(case.data(1))
    before = values(q)
    with autograd.train_mode():
        q(nd.array(case.data(2, 5.0))).wait_to_read()
    assert values(q)[statistics(case)[0]] != before[statistics(case)[0]]


@over(FOLLOWING)
@STATIC
def test_frozen_statistics_stay_and_unfrozen_ones_move_again(case, hybridized):
    q = case.ready(case.data(1), hybridized)
    run(q, case.data(1))
    q.freeze()
    before = values(q)
    run(q, case.data(2, 5.0))
    assert_same_values(values(q), before)
    q.unfreeze()
    run(q, case.data(2, 5.0))
    assert all(values(q)[name] != before[name] for name in statistics(case))


@over(LEARNED)
@STATIC
def test_frozen_parameters_get_no_step_and_unfrozen_ones_do(case, hybridized):
    q = case.ready(case.data(1), hybridized)
    trainer = gluon.Trainer(q.collect_params(), 'sgd', {'learning_rate': 0.01, 'momentum': 0.9, 'wd': 0.1})

    def step():
        run(q, case.data(2), np.ones(case.shape, np.float32))
        trainer.step(1)
        return {name: q.value(name) for name in values(q) if name != 'frozen'}

    before = step()
    q.freeze()
    assert_same_values(step(), before)
    q.unfreeze()
    after = step()
    # the exponent of QIL is trained on request only
    assert any(np.any(after[name] != before[name]) for name in learned(q))


@over(LEARNED)
def test_a_frozen_quantizer_gives_the_same_output_and_input_gradient(case):
    x, g = case.data(1), case.data(2)
    q = case.ready(x)
    free = run(q, x, g)[:2]
    q.freeze()
    for actual, expected in zip(run(q, x, g)[:2], free):
        same_bits(actual, expected)


@over([case for case in FEW_WEIGHTS if 'held_scale' in values(case.make())])
@STATIC
def test_a_frozen_weight_quantizer_keeps_its_scale_while_the_weight_goes_on(case, hybridized):
    x = case.data(1)
    q = case.make(hybridized)
    run(q, x)
    held = q.qparams(nd.array(x))
    q.freeze(nd.array(x))
    for got, expected in zip(q.qparams(nd.array(3 * x)), held):
        same_bits(got, expected)
    y = infer(q, 3 * x)
    codes = q.quantize(nd.array(3 * x)).asnumpy()
    same_bits(y, case.spread(held.scale) * (codes - case.spread(held.zero_point)).astype(np.float32))
    assert np.abs(codes - case.spread(held.zero_point)).max() <= 2 ** case.bits
    q.unfreeze()
    same_bits(infer(q, 3 * x), infer(case.make(), 3 * x))


@over([case for case in FEW_WEIGHTS if 'held_scale' in values(case.make())])
def test_freezing_twice_keeps_the_first_scale(case):
    x = case.data(1)
    q = case.make()
    q.freeze(nd.array(x))
    held = q.qparams(nd.array(x))
    q.freeze(nd.array(3 * x))
    same_bits(q.qparams(nd.array(x)).scale, held.scale)


# ---------------------------------------------------------------- modes


def difficult(case):
    x = case.data(1, 5.0)
    x.reshape(-1)[8:16] = [1e38, -1e38, 1e-38, 1e30, -1e30, 2.0 ** 24 + 2, -3, 7]
    return x


@over(FEW)
@STATIC
@pytest.mark.parametrize('mode', [OFF, OBSERVE], ids=['off', 'observe'])
def test_off_and_observe_return_x_to_the_last_bit(case, hybridized, mode):
    q = case.ready(case.data(1), hybridized)
    q.set_mode(mode)
    x = difficult(case)
    same_bits(run(q, x)[0], x)
    same_bits(infer(q, x), x)


@over(FEW)
@STATIC
def test_off_changes_no_state(case, hybridized):
    q = case.make(hybridized)
    q.set_mode(OFF)
    before = values(q)
    run(q, case.data(1))
    infer(q, case.data(1))
    assert_same_values(values(q), before)


@over(FEW)
def test_off_does_not_warn(case):
    q = case.make()
    q.set_mode(OFF)
    with quiet():
        infer(q, case.data(1))


@over(FOLLOWING)
@STATIC
def test_observe_collects_what_quantize_collects(case, hybridized):
    q, other = case.make(hybridized), case.make(hybridized)
    q.set_mode(OBSERVE)
    for seed in (1, 2):
        run(q, case.data(seed, seed))
        run(other, case.data(seed, seed))
    q.set_mode(QUANTIZE)
    assert_same_values(values(q), values(other))


@over(FEW)
def test_a_graph_follows_the_mode_without_tracing_again(case):
    q = case.ready(case.data(1), hybridized=True)
    x = case.data(2)
    quantized = infer(q, x)
    for mode, expected in ((OFF, x), (OBSERVE, x), (QUANTIZE, quantized)):
        q.set_mode(mode)
        same_bits(infer(q, x), expected)


def test_other_modes_are_an_error():
    with pytest.raises(ValueError, match=r'mode=3: pass quantizers\.OFF, OBSERVE or QUANTIZE'):
        Case('int8', 'activation', 8).make().set_mode(3)


# ---------------------------------------------------------------- delay


@over(FEW_ACTIVATIONS)
@STATIC
def test_quantization_starts_after_the_delay(case, hybridized):
    q = case.ready(case.data(1), hybridized, delay_quant=2)
    free = case.ready(case.data(1))
    for step in range(4):
        x = case.data(step, 2.0)
        expected = run(free, x)[0]
        same_bits(run(q, x)[0], x if step < 2 else expected)


@over(FEW_ACTIVATIONS)
def test_inference_during_the_delay_returns_x(case):
    q = case.ready(case.data(1), delay_quant=2)
    x = case.data(5, 2.0)
    for _ in range(2):
        same_bits(infer(q, x), x)
        run(q, case.data(1))
    assert np.abs(infer(q, x) - x).max() > 0


@over(FOLLOWING)
@STATIC
def test_statistics_are_collected_during_the_delay(case, hybridized):
    q, free = case.make(hybridized, delay_quant=3), case.make()
    for step in range(2):
        run(q, case.data(step, 2.0))
        run(free, case.data(step, 2.0))
    for name in statistics(case):
        same_bits(q.value(name), free.value(name))


@over([case for case in FEW_ACTIVATIONS if learned(case.make())])
def test_learned_ranges_get_no_gradient_during_the_delay(case):
    q = case.ready(case.data(1), delay_quant=1)
    g = case.data(2)
    _, dx, dparams = run(q, case.data(1, 5.0), g)
    same_bits(dx, g)
    assert not any(gradient.any() for gradient in dparams.values())


@over(FEW_ACTIVATIONS)
def test_the_delay_counts_on_after_loading(case, tmp_path):
    q = case.ready(case.data(1), delay_quant=2)
    run(q, case.data(1))
    q.save_parameters(str(tmp_path / 'q'))
    other = case.make(delay_quant=2)
    other.load_parameters(str(tmp_path / 'q'))
    x = case.data(2, 2.0)
    same_bits(run(other, x)[0], x)                      # the second of two
    assert np.abs(run(other, x)[0] - x).max() > 0


# ---------------------------------------------------------------- before calibration


@over(CALIBRATED)
@STATIC
def test_uncalibrated_inference_returns_x_and_warns_once(case, hybridized):
    q = case.make(hybridized)
    x = case.data(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(3):
            same_bits(infer(q, x), x)
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(messages) == 1
    assert f'{q.where} ({type(q).__name__}) is not calibrated: its input passes unquantized' in messages[0]


@over([case for case in FEW if case not in CALIBRATED])
def test_methods_that_need_no_range_quantize_at_once_without_warning(case):
    q = case.make()
    with quiet():
        y = infer(q, case.data(1))
    assert np.abs(y - case.data(1)).max() > 0


@over(CALIBRATED)
def test_calibration_ends_the_warnings(case):
    q = case.ready(case.data(1))
    assert q.calibrated
    with quiet():
        infer(q, case.data(1))


@over(CALIBRATED)
def test_qparams_and_codes_before_calibration_are_an_error(case):
    q = case.make()
    x = nd.array(case.data(1))
    assert not q.calibrated
    for ask in (q.qparams, q.quantize):
        with pytest.raises(RuntimeError, match=rf'{q.where} \({type(q).__name__}\) has no range yet: call gq.cal'):
            ask(x)


@over([case for case in FEW_WEIGHTS if 'held_scale' in values(case.make())])
def test_qparams_of_a_scale_that_follows_the_weight_ask_for_the_weight(case):
    q = case.make()
    with pytest.raises(RuntimeError, match=rf'the scale of {q.where} \({type(q).__name__}\) follows the weight'):
        q.qparams()


@over([case for case in CALIBRATED if not case.make().starts_by_itself])
def test_inside_a_net_training_without_a_range_is_an_error(case):
    q = case.make()
    q.nested = True
    with pytest.raises(RuntimeError, match=rf'{q.where} \({type(q).__name__}\) has no range yet and cannot train'):
        run(q, case.data(1))


@over([case for case in FEW_WEIGHTS if case.per_channel])
@pytest.mark.parametrize('ask', ['qparams', 'quantize', 'freeze', 'forward', 'save'])
def test_the_number_of_channels_is_taken_from_the_first_weight_seen(case, ask, tmp_path):
    x = case.data(1)
    q = case.make(shape=None)
    known = case.ready(x)
    if case in CALIBRATED:
        q.init_from(nd.array(x))
    if ask == 'save':
        infer(q, x)
        q.save_parameters(str(tmp_path / 'q'))
        q = case.make(shape=None)
        q.load_parameters(str(tmp_path / 'q'))
    elif ask == 'forward':
        infer(q, x)
    else:
        getattr(q, ask)(nd.array(x))
    same_bits(infer(q, x), infer(known, x))
    same_bits(q.qparams(nd.array(x)).scale, known.qparams(nd.array(x)).scale)


# ---------------------------------------------------------------- saving


@over(FEW)
@STATIC
def test_a_new_object_with_loaded_parameters_gives_identical_outputs(case, hybridized, tmp_path):
    q = case.make()
    for seed in (1, 2):
        run(q, case.data(seed))
    q.save_parameters(str(tmp_path / 'q'))
    other = case.make(hybridized)
    other.load_parameters(str(tmp_path / 'q'))
    x = case.data(3, 2.0)
    with quiet():
        same_bits(infer(other, x), infer(q, x))
    assert_same_values(values(other), values(q))


@over(FEW)
@STATIC
def test_training_continues_after_loading_without_calibrating_again(case, hybridized, tmp_path):
    q = case.make()
    run(q, case.data(1))
    q.save_parameters(str(tmp_path / 'q'))
    other = case.make(hybridized)
    other.load_parameters(str(tmp_path / 'q'))
    x, g = case.data(2, 3.0), case.data(4)
    for actual, expected in zip(run(other, x, g)[:2], run(q, x, g)[:2]):
        same_bits(actual, expected)
    assert_same_values(values(other), values(q))


@over(FEW)
def test_frozen_and_mode_are_saved(case, tmp_path):
    q = case.ready(case.data(1))
    q.freeze(*[nd.array(case.data(1))] if case.role == 'weight' else [])
    q.set_mode(OBSERVE)
    q.save_parameters(str(tmp_path / 'q'))
    other = case.make()
    other.load_parameters(str(tmp_path / 'q'))
    assert_same_values(values(other), values(q))
    x = case.data(2)
    same_bits(infer(other, x), x)


@over(FEW)
def test_saving_does_not_warn(case, tmp_path):
    q = case.make()
    if not case.per_channel:
        with quiet():
            q.save_parameters(str(tmp_path / 'q'))


# ---------------------------------------------------------------- Parameters under an optimizer

BOUNDS = {'alpha': 1e-3, 'scale': 1e-8, 'gamma': 0.1}


@over(LEARNED)
@pytest.mark.parametrize('push', ['pushed', 'natural'])
def test_scales_stay_positive_through_100_hard_steps(case, push):
    x = case.data(1)
    q = case.ready(x, True, **({'train_gamma': True} if (case.name, case.role) == ('qil', 'weight') else {}))
    trainer = gluon.Trainer(q.collect_params(), 'sgd', {'learning_rate': 10.0, 'momentum': 0.9})
    rng = np.random.default_rng(1)
    for step in range(100):
        run(q, x, rng.normal(0, 10, x.shape).astype(np.float32))
        for parameter in learned(q).values():
            if push == 'pushed':                        # far below every bound, and now and then far above
                parameter.grad()[:] = -1e3 if step % 20 == 19 else 1e3 * rng.random()
        trainer.step(1)
        if step % 10 < 2:
            assert (q.qparams(nd.array(x)).scale > 0).all()
            assert_within_bounds(q)
    assert np.isfinite(infer(q, x)).all()


def assert_within_bounds(q):
    now = {name: parameter.data().asnumpy() for name, parameter in q._reg_params.items()}
    for name in learned(q):
        # float32 holds the bound to one part in 1e7
        assert (now[name] >= BOUNDS.get(name, -np.inf) * (1 - 1e-6)).all(), name
    if 'center' in now:
        assert now['distance'] >= 1e-4 * now['start'] * (1 - 1e-6)
        assert now['center'] >= now['distance']
        assert now.get('gamma', 1) <= 10


@over(LEARNED)
def test_every_learned_value_moves_in_a_step(case):
    q = case.ready(case.data(1), **({'train_gamma': True} if (case.name, case.role) == ('qil', 'weight') else {}))
    trainer = gluon.Trainer(q.collect_params(), 'sgd', {'learning_rate': 0.1})
    before = values(q)
    run(q, case.data(1, 2.0), case.data(2))
    trainer.step(1)
    assert all(np.any(q.value(name) != before[name]) for name in learned(q))


@over(LEARNED)
def test_outputs_after_a_hard_step_survive_saving(case, tmp_path):
    """The file is written before anyone has used, and so projected, the Parameter."""
    x = case.data(1)
    q = case.ready(x)
    trainer = gluon.Trainer(q.collect_params(), 'sgd', {'learning_rate': 1e4})
    run(q, x)
    for parameter in learned(q).values():
        parameter.grad()[:] = 1.0
    trainer.step(1)
    q.save_parameters(str(tmp_path / 'q'))
    other = case.make()
    other.load_parameters(str(tmp_path / 'q'))
    same_bits(infer(other, x), infer(q, x))
    assert_within_bounds(other)


MULTIPLIERS = {
    ('pact', 'activation'): {'alpha': (1, 1)},
    ('lsq', 'activation'): {'scale': (1, 0)}, ('lsq', 'weight'): {'scale': (1, 0)},
    ('lsqplus', 'activation'): {'scale': (1, 0), 'offset': (1, 0)}, ('lsqplus', 'weight'): {'scale': (1, 0)},
    ('qil', 'activation'): {'center': (0.01, 0), 'distance': (0.01, 0)},
    ('qil', 'weight'): {'center': (0.01, 0), 'distance': (0.01, 0), 'gamma': (0, 0)},
}


@over(FEW)
def test_learning_rate_and_decay_multipliers_are_those_of_the_recipe(case):
    expected = MULTIPLIERS.get((case.name, case.role), {})
    found = {name: (p.lr_mult, p.wd_mult) for name, p in learned(case.make()).items()}
    assert found == expected


def test_gamma_of_qil_is_trained_on_request():
    q = Case('qil', 'weight', 3).make(train_gamma=True)
    assert (q.gamma.lr_mult, q.gamma.wd_mult) == (0.01, 0)


@over(FEW)
def test_state_has_no_gradient_and_no_decay(case):
    q = case.make()
    for name, parameter in q._reg_params.items():
        if name not in learned(q):
            assert (parameter.grad_req, parameter.wd_mult) == ('null', 0), name


@over(FEW)
def test_weight_decay_reaches_alpha_only(case):
    q = case.ready(case.data(1))
    trainer = gluon.Trainer(q.collect_params(), 'sgd', {'learning_rate': 0.1, 'wd': 0.1})
    before = values(q)
    run(q, case.data(1), np.zeros(case.shape, np.float32))
    during = values(q)
    trainer.step(1)
    for name, value in values(q).items():
        expected = before[name] * np.float32(0.99) if name == 'alpha' else during[name]
        # wd is applied as 1 - lr * wd or as lr * wd * w; one rounding apart
        np.testing.assert_allclose(value, expected, rtol=2e-7 if name == 'alpha' else 0, err_msg=name)


@over(FEW)
def test_all_parameters_exist_before_the_first_pass(case):
    q = case.make()
    before = set(q.collect_params())
    run(q, case.data(1))
    assert set(q.collect_params()) == before


@over(FEW)
def test_a_quantizer_that_was_never_initialized_initializes_itself(case):
    q = quantizers.create(case.name, case.bits, case.role, signed=case.signed, axis=case.axis,
                          per_channel=case.per_channel if case.role == 'weight' else None)
    other = case.make()
    same_bits(run(q, case.data(1))[0], run(other, case.data(1))[0])
