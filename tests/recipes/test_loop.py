"""Learning rates over the updates of a run, as the optimizer asks for them: 1, 2, ..."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

from loop import Loss, make_schedule, mix


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


def test_a_warm_up_rises_to_the_schedule():
    assert make_schedule('cosine', 0.1, 3, 4, None, None, warmup_epochs=0.1)(1) > 0
    plain = make_schedule('cosine', 0.1, 4, 3, None, None)
    warm = make_schedule('cosine', 0.1, 4, 3, None, None, warmup_epochs=1)
    assert [warm(i) for i in (1, 2, 4, 5, 12)] == pytest.approx(
        [plain(1) / 4, plain(2) / 2, plain(4), plain(5), plain(12)])


@pytest.mark.parametrize('smoothing', [0, 0.1])
def test_the_loss_is_that_of_label_and_teacher_and_no_gradient_reaches_the_teacher(smoothing):
    random = np.random.default_rng(0)
    data, output = (random.normal(size=(4, 3)).astype('float32') for _ in range(2))
    label = np.array([0, 2, 1, 1])
    teacher = gluon.nn.Dense(3, in_units=3)
    teacher.initialize(mx.init.Normal(1))
    made = Loss(3, smoothing, teacher, temperature=2, hard_weight=0.25)
    logits = mx.nd.array(output)
    logits.attach_grad()
    with autograd.record():
        found = made(mx.nd.array(data), logits, mx.nd.array(label))
    found.backward()
    assert not teacher.weight.grad().asnumpy().any() and logits.grad.asnumpy().any()

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    answer = np.exp(log_softmax(teacher(mx.nd.array(data)).asnumpy() / 2))
    target = np.eye(3)[label] * (1 - smoothing) + smoothing / 3
    expected = (0.25 * -(target * log_softmax(output)).sum(axis=1)
                + 0.75 * 4 * -(answer * log_softmax(output / 2)).sum(axis=1))
    np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-5)


@pytest.mark.parametrize('smoothing', [0, 0.1])
def test_mixtures_are_judged_by_their_shares(smoothing):
    np.random.seed(0)
    data, label = mx.nd.array([[0.0], [1.0], [2.0], [4.0]]), mx.nd.array([0, 2, 1, 1])
    mixture, shares = mix(data, label, classes=3, alpha=1)
    share = 1 - mixture.asnumpy()[0, 0] / 4
    assert 0.5 < share < 1
    np.testing.assert_allclose(mixture.asnumpy()[:, 0], [4 * (1 - share), 2 - share, 1 + share, 4 * share], rtol=1e-6)
    np.testing.assert_allclose(shares.asnumpy(), [[share, 1 - share, 0], [0, 1 - share, share],
                                                  [0, share, 1 - share], [1 - share, share, 0]], rtol=1e-6)
    output = mx.nd.random.normal(shape=(4, 3))
    hard = Loss(3, smoothing)
    found = Loss(3, smoothing, mixed=True)(None, output, shares)
    expected = share * hard(None, output, label) + (1 - share) * hard(None, output, label[::-1])
    np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), rtol=1e-5)
