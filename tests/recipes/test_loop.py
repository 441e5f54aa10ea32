"""Learning rates over the updates of a run, as the optimizer asks for them: 1, 2, ..."""
import pytest

from loop import make_schedule


def rates(mode, decay_epochs=(1, 2), epochs=3):
    schedule = make_schedule(mode, 0.1, 4, epochs, 0.5, decay_epochs)
    return [schedule(update) for update in range(1, 4 * epochs + 1)]


def test_step_decays_after_the_named_epochs():
    assert rates('step') == pytest.approx([0.1] * 4 + [0.05] * 4 + [0.025] * 4)


def test_step_without_an_epoch_in_reach_is_constant():
    assert rates('step', decay_epochs=(40, 60)) == pytest.approx([0.1] * 12)


@pytest.mark.parametrize('mode', ['poly', 'cosine', 'sine'])
def test_other_schedules_end_at_zero(mode):
    found = rates(mode)
    assert max(found) <= 0.1 and found[-1] == pytest.approx(0, abs=1e-9)
    assert all(rate > 0 for rate in found[:-1])
