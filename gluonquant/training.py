"""What fine-tuning loops need beside a `gluon.Trainer`: learning rates over a fixed number of updates."""
import math

from mxnet.lr_scheduler import LRScheduler


def _check_total(total):
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        raise ValueError(f'total={total!r}: pass the number of optimizer updates, an integer >= 1')
    return total


class SineSchedule(LRScheduler):
    """lr(i) = base_lr sin(pi i / total) for update i = 1 .. total, 0 afterwards: rises, then falls to 0.

    For int8 fine-tuning: half the float learning rate, two epochs.

    Parameters
    ----------
    base_lr : float
    total : int, optimizer updates in all
    """

    def __init__(self, base_lr, total):
        super().__init__(base_lr)
        self.total = _check_total(total)

    def __call__(self, num_update):
        if not 0 < num_update < self.total:
            return 0.0
        return self.base_lr * math.sin(math.pi * num_update / self.total)


class CosineSchedule(LRScheduler):
    """lr(i) falls from base_lr to final_lr along half a cosine over ``total`` updates, then stays.

    Parameters
    ----------
    base_lr, final_lr : float
    total : int, optimizer updates in all
    """

    def __init__(self, base_lr, total, final_lr=0.0):
        super().__init__(base_lr)
        self.total = _check_total(total)
        self.final_lr = final_lr

    def __call__(self, num_update):
        done = min(num_update / self.total, 1.0)
        return self.final_lr + (self.base_lr - self.final_lr) * (1 + math.cos(math.pi * done)) / 2
