"""Learning rate schedules."""
import pytest
from mxnet import autograd, gluon, nd

from gluonquant.training import CosineSchedule, SineSchedule

ROUNDING = 1e-15        # of sin, cos and pi in float64
SCHEDULES = [lambda total: SineSchedule(0.1, total), lambda total: CosineSchedule(0.1, total)]
every_schedule = pytest.mark.parametrize('schedule', SCHEDULES, ids=['sine', 'cosine'])


@pytest.mark.parametrize('update, rate', [(0, 0), (2, 0.5), (3, 0.5 * 2 ** 0.5), (6, 1), (9, 0.5 * 2 ** 0.5), (10, 0.5),
                                          (12, 0), (13, 0), (24, 0), (36, 0)])
def test_sine_rises_to_the_base_rate_and_falls_to_0(update, rate):
    assert SineSchedule(0.2, 12)(update) == pytest.approx(0.2 * rate, abs=ROUNDING)


@pytest.mark.parametrize('update, rate', [(0, 1), (3, 0.5 + 0.25 * 2 ** 0.5), (4, 0.75), (6, 0.5), (8, 0.25), (12, 0),
                                          (13, 0), (24, 0)])
@pytest.mark.parametrize('final', [0.0, 0.05])
def test_cosine_falls_to_the_final_rate_and_stays(update, rate, final):
    assert CosineSchedule(0.2, 12, final)(update) == pytest.approx(final + (0.2 - final) * rate, abs=ROUNDING)


def test_sine_of_one_update_is_0():
    assert SineSchedule(0.2, 1)(1) == 0


@every_schedule
@pytest.mark.parametrize('total', [0, -3, 2.0, '10', True, None])
def test_total_must_be_a_number_of_updates(schedule, total):
    with pytest.raises(ValueError, match=f'total={total!r}: pass the number of optimizer updates, an integer >= 1'):
        schedule(total)


@every_schedule
def test_a_trainer_follows_the_schedule(schedule):
    weight = gluon.Parameter('weight', shape=(1,), init='zeros')
    weight.initialize()
    trainer = gluon.Trainer([weight], 'sgd', {'learning_rate': 0.1, 'lr_scheduler': schedule(4)}, kvstore=None)
    moved = []
    for _ in range(5):
        before = weight.data().asscalar()
        with autograd.record():
            loss = -weight.data() * nd.ones(1)
        loss.backward()
        trainer.step(1)
        moved.append(weight.data().asscalar() - before)
    assert moved == pytest.approx([schedule(4)(update) for update in range(1, 6)], abs=1e-7)    # float32


@every_schedule
def test_the_base_rate_can_be_changed_on_the_way(schedule):
    changed, doubled = schedule(8), schedule(8)
    changed.base_lr *= 2
    assert changed(3) == pytest.approx(2 * doubled(3), abs=ROUNDING)
