"""GDRQ: clip at a multiple of the mean magnitude, then quantize linearly (Yu et al. 2019, arXiv:1908.01477).

For a uniform distribution max = 2 mean|x|, hence ``ktimes=2`` for weights. Training has two phases: *reshaping*
(clip only) pulls the distribution towards uniform, then *quantization*.

Differences from the paper: the threshold is a contraction towards the batch's, T + lam (t - T); the printed update
could not be read and the opposite sign diverges. Thresholds may be searched at the switch of phases.
"""
import numpy as np

from .. import functional as Q
from .. import observers
from ..grid import Grid
from .int8 import check_grad_mode
from .registry import activation, weight
from .roles import ActivationQuantizer, WeightQuantizer


class _Phased:
    """Phase 1 (``phase`` 0) clips only; phase 2 (``phase`` 1) quantizes. The phase is saved state."""

    def decode(self, F, code, scale, on, fixed):
        value = super().decode(F, code, scale, on * fixed['phase'], fixed)
        return value + F.broadcast_mul(fixed['clipped'], on * (1 - fixed['phase']))

    def set_phase(self, quantize):
        """False: reshaping. True: quantization."""
        self.write(phase=float(bool(quantize)))


@weight('gdrq')
class GDRQWeight(_Phased, WeightQuantizer):
    """T = ktimes * mean|w| per group, scale = T / qmax, codes of clip(w, -T, T); from the present weight always.

    Parameters
    ----------
    group_size : int
        Consecutive output channels that share a threshold; -1 = the whole tensor. Must divide their number.
    do_quant : bool
        Start in the quantizing phase.
    alpha_mode : 'mean', or 'search': entering the quantizing phase (`search`) finds the T of least squared error
        for each group and keeps T / mean|w|.
    grad_mode : 'ste' (default) or 'clip' (zero where |w| > T)

    State: ``phase`` (1,), ``ratio`` (groups,), the multiple of mean|w| in use.
    """
    fused = 'gdrq'
    min_bits = 2

    def __init__(self, bits=4, ktimes=2.0, group_size=-1, do_quant=True, alpha_mode='mean', grad_mode='ste',
                 per_channel=None, **kwargs):
        self.check_bits(bits)
        _check_ktimes(ktimes)
        if alpha_mode not in ('mean', 'search'):
            raise ValueError(f"alpha_mode={alpha_mode!r}: pass 'mean' or 'search'")
        if per_channel and group_size == -1:
            group_size = 1
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size == 0 or group_size < -1:
            raise ValueError(f'group_size={group_size!r}: pass a number of output channels, or -1 for the whole tensor')
        super().__init__(bits, Grid(bits, narrow_range=True), per_channel=group_size > 0,
                         group_size=max(group_size, 1), **kwargs)
        self.ktimes = float(ktimes)
        self.alpha_mode = alpha_mode
        self.grad_mode = check_grad_mode(grad_mode)
        with self.name_scope():
            self.phase = self.state('phase', init=float(do_quant))
            self.ratio = self.state('ratio', shape=self.scale_shape(), init=ktimes)

    def levels(self, F, rows, fixed):
        mean = Q.row_mean(F, F.abs(rows))
        return F.maximum(mean * F.reshape(fixed['ratio'], shape=(-1, 1)), Q.EPS) / self.grid.qmax, None

    def advance(self, F, rows, mode, params, fixed):
        scale, _ = self.levels_in_use(F, rows, fixed)
        low, high = self.bounds(F, scale, None, fixed)
        return {'clipped': F.broadcast_minimum(F.broadcast_maximum(rows, low), high)}

    def set_phase(self, quantize):
        super().set_phase(quantize)
        if quantize and self.alpha_mode == 'search':
            self.search()

    def search(self, x=None):
        """Set ``ratio`` so that T minimises ||w - Q(w)|| in each group (candidates of the MSE observer)."""
        ratio = []
        for row in self.row_values(self._weight(x)):
            observer = observers.create('mse', max_values=None)
            observer.update(row)
            ratio.append(observer.range(self.grid)[1] / max(np.abs(row).mean(), Q.EPS))
        self.write(ratio=ratio)


@activation('gdrq')
class GDRQActivation(_Phased, ActivationQuantizer):
    """Threshold T follows ktimes * mean|x|: the first batch sets it, then T + lam * (t - T), in training only.

    Parameters
    ----------
    signed : bool, default False
        False: clip to [0, T]. True: to [-T, T].
    ktimes : float
        2 for uniform data; 3 to 4 suits half-Gaussian activations with their long tail.
    lam : float in (0, 1]
        0.001 for long training, 0.01 to 0.05 for short fine-tuning.
    do_quant : bool
        Start in the quantizing phase.
    grad_mode : 'clip' (default) or 'ste'

    State: ``threshold`` (1,), 0 = no range yet; ``phase`` (1,).
    """
    fused = 'gdrq'
    follows = True
    marker = 'threshold'
    tracks = True

    def __init__(self, bits=4, signed=None, ktimes=2.0, lam=0.001, do_quant=True, grad_mode='clip', **kwargs):
        signed = bool(signed)
        self.check_bits(bits)
        _check_ktimes(ktimes)
        super().__init__(bits, Grid(bits, signed, narrow_range=signed), **kwargs)
        self.ktimes = float(ktimes)
        if not 0 < lam <= 1:
            raise ValueError(f'lam={lam!r}: pass a number in (0, 1]')
        self.decay = 1.0 - lam
        self.grad_mode = check_grad_mode(grad_mode)
        with self.name_scope():
            self.threshold = self.state('threshold')
            self.phase = self.state('phase', init=float(do_quant))

    def fused_options(self):
        return {**super().fused_options(), 'decay': self.decay, 'ktimes': self.ktimes}

    def initial(self, x):
        seen = self.seen(x)
        return {'threshold': seen.range(self.grid)[1] if seen.chosen else self.ktimes * seen.mean_abs}

    def track(self, F, rows, learning, params, fixed):
        batch = self.ktimes * F.reshape(F.mean(F.abs(rows), axis=1), shape=(1,))
        old = fixed['threshold']
        threshold = Q.moving_average(F, old, batch, self.decay, learning, old <= 0)
        return {'threshold': Q.assign(F, params['threshold'], threshold)}

    def advance(self, F, rows, mode, params, fixed):
        changed = super().advance(F, rows, mode, params, fixed)
        low, high = self.bounds(F, None, None, {**fixed, **changed})
        changed['clipped'] = F.broadcast_minimum(F.broadcast_maximum(rows, low), high)
        return changed

    def levels(self, F, rows, fixed):
        return F.maximum(F.reshape(fixed['threshold'], shape=(1, 1)), Q.EPS) / self.grid.qmax, None

    def bounds(self, F, scale, zero_point, fixed):
        reach = F.maximum(F.reshape(fixed['threshold'], shape=(1, 1)), Q.EPS)
        return (-reach if self.grid.signed else F.zeros_like(reach)), reach


def _check_ktimes(ktimes):
    if not ktimes > 0:
        raise ValueError(f'ktimes={ktimes!r}: pass a positive multiple of the mean magnitude')
