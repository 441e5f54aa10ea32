"""What every quantizer is: a block from tensor to tensor of the same shape, on a grid of n bits."""
import warnings
from collections import namedtuple

import mxnet as mx
import numpy as np
from mxnet import autograd, nd
from mxnet.gluon import HybridBlock

from .. import functional as Q
from .. import ops
from ..grid import check_bits
from .fused import Fusable
from .parameter import LARGEST, QuantizerParameter

OFF, OBSERVE, QUANTIZE = 0, 1, 2      # values of the Parameter `mode`

QParams = namedtuple('QParams', 'scale zero_point')
QParams.__doc__ = """What a runtime needs: x = scale * (code - zero_point).

scale : float32 array, shape (1,) or (channels,).   zero_point : int32 array of the same shape."""


class Quantizer(Fusable, HybridBlock):
    """Rounds a tensor to the levels of an n-bit grid and lets gradients through: *fake quantization*.

    x -> scale * (code - zero_point), code an integer of ``self.grid``, rounded half to even.

    A method implements ``levels`` (scale and zero point), and where it differs from the linear rule ``codes``,
    ``decode`` and ``surrogate`` (the gradient). ``self.grid`` is the grid. All state is Parameters with
    ``grad_req='null'``: it is saved, loaded and moved with the weights. State changes in training mode only.

    Parameters
    ----------
    bits : int
        Width of the codes.
    ewgs : float, optional
        Element-wise gradient scaling with this delta (0.2 in our recipes) instead of plain straight-through.

    Inputs:  **x**: float tensor of any shape (float32; another type after ``cast``).
    Outputs: **out**: same shape and type. NaN and Inf come out as NaN. Before calibration, and while switched off,
    x itself.

    Raises
    ------
    ValueError
        Bits or options the method does not support.
    RuntimeError
        Training, or asking for ``qparams``, before a range exists.
    """
    min_bits = 1
    max_bits = 16
    marker = None               # name of the Parameter that is positive once a range exists
    default_range = False       # quantizes with a default range until a better one is known
    starts_by_itself = True     # the first training batch may set the range inside the graph
    tracks = False              # has state that follows the data, or learnable ranges: can be frozen
    ewgs_supported = False
    grad_mode = 'ste'           # 'clip': no gradient outside the representable range

    def __init__(self, bits, grid, ewgs=None, prefix=None, params=None):
        super().__init__(prefix=prefix, params=params)
        self.grid = grid
        if ewgs is not None and not self.ewgs_supported:
            raise ValueError(f'{type(self).__name__} has no element-wise gradient scaling; leave ewgs=None')
        if ewgs is not None and not ewgs >= 0:
            raise ValueError(f'ewgs={ewgs!r}: delta must be a number >= 0')
        self.ewgs = ewgs
        self.where = self.name          # `convert` puts the path of the layer here, for messages
        self._bound = ()                # the weight Parameter, by `bind`
        self.nested = False             # inside a net: `calibrate` is the way to set ranges
        self.tensors = []               # names of what it quantizes in a graph, where it may be several
        self._dtype = 'float32'
        self._known_ready = self._warned = False
        with self.name_scope():
            self.mode = self.state('mode', init=QUANTIZE)
            if self.tracks:
                self.frozen = self.state('frozen')

    @classmethod
    def check_bits(cls, bits):
        """ValueError unless ``bits`` is an integer this method supports."""
        check_bits(bits)
        if not cls.min_bits <= bits <= cls.max_bits:
            raise ValueError(f'bits={bits}: {cls.__name__} supports {cls.min_bits} to {cls.max_bits} bits')

    def state(self, name, shape=(1,), init=0.0, merge='mean'):
        """A saved value that no optimizer touches; ``merge`` says what several workers make of theirs."""
        return self._add(name, shape=shape, init=mx.init.Constant(init), grad_req='null', wd_mult=0.0, merge=merge)

    def learned(self, name, shape=(1,), init=1.0, lower=None, upper=LARGEST, lr_mult=1.0, wd_mult=0.0):
        """A value that the Trainer optimizes, kept within its bounds."""
        return self._add(name, shape=shape, init=mx.init.Constant(init), lower=lower, upper=upper, lr_mult=lr_mult,
                         wd_mult=wd_mult)

    def _add(self, name, **kwargs):
        parameter = QuantizerParameter(self.prefix + name, **kwargs)
        self.params.update({parameter.name: parameter})
        return parameter

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if isinstance(value, QuantizerParameter):
            if name == 'frozen':
                value.on_change = self._apply_frozen
            elif name == self.marker:
                value.on_change = self._forget_ready
                value.on_use = None if self.default_range else self._on_use

    def value(self, name):
        """The current value of a Parameter as a float32 array, without side effects."""
        parameter = self._reg_params[name]
        parameter.prepare()
        return parameter._reduce().asnumpy()

    def write(self, **values):
        """Set Parameters by name."""
        values = {self._reg_params[name]: np.asarray(value, dtype='float32').reshape(-1)
                  for name, value in values.items()}
        for parameter, value in values.items():
            parameter.shape = value.shape
            parameter.prepare()
            parameter._finish_deferred_init()
        with autograd.pause():
            for parameter, value in values.items():     # at once: those that bound each other would move
                parameter.set_data(nd.array(value))

    def cast(self, dtype):
        """Parameters stay float32 whatever the network's type; only inputs and outputs change."""
        self._dtype = np.dtype(dtype).name
        self._clear_cached_op()

    def hybrid_forward(self, F, x, mode, **params):
        data = x if self._dtype == 'float32' else F.cast(x, 'float32')
        forward = self.single if ops.name(self.role) and self.can_fuse(data) else self.composed
        out = forward(F, data, mode, params)
        return out if self._dtype == 'float32' else F.cast(out, self._dtype)

    def composed(self, F, data, mode, params):
        """The forward pass of plain MXNet operators."""
        rows = self.rows(F, data)
        constant = F.BlockGrad(rows)
        fixed = {name: F.BlockGrad(value) for name, value in params.items()}
        on = mode > OBSERVE
        fixed.update(self.advance(F, constant, mode, params, fixed))
        on = on * self.ready(F, fixed)
        scale, zero_point = self.levels_in_use(F, constant, fixed)
        code = self.codes(F, constant, scale, zero_point, fixed)
        value = self.decode(F, code, scale, on, fixed) + F.broadcast_mul(constant, 1 - on)
        gradient = self.surrogate(F, rows, on, code, scale, zero_point, params, fixed, data)
        return self.unrows(F, F.BlockGrad(value) + gradient, data)

    def rows(self, F, x):
        """x as rows that share a scale: (R, K)."""
        return F.reshape(x, shape=(1, -1))

    def unrows(self, F, rows, x):
        """Rows back in the shape of x."""
        return F.reshape_like(rows, x)

    def ready(self, F, fixed):
        """1 where quantization is due, shape (1,)."""
        return self.has_range(F, fixed)

    def has_range(self, F, fixed):
        """1 where there is a range to quantize with, shape (1,)."""
        if self.marker is None:
            return F.ones((1,))
        return F.ones_like(fixed[self.marker]) if self.default_range else fixed[self.marker] > 0

    def advance(self, F, rows, mode, params, fixed):
        """Write the state of this forward pass; returns the new values by name."""
        return {}

    def levels_in_use(self, F, rows, fixed):
        """`levels`, or what is held in their place since `freeze`."""
        return self.levels(F, rows, fixed)

    def levels(self, F, rows, fixed):
        """(scale, zero_point): arrays (R, 1); zero_point None means 0."""
        raise NotImplementedError

    def codes(self, F, rows, scale, zero_point, fixed):
        """code - zero_point for every element, (R, K)."""
        v = F.broadcast_div(rows, scale)
        if zero_point is None:
            return Q.round_half_even(F, Q.limit(F, v, self.grid.qmin, self.grid.qmax))
        v = F.broadcast_maximum(v, self.grid.qmin - zero_point)
        return Q.round_half_even(F, F.broadcast_minimum(v, self.grid.qmax - zero_point))

    def decode(self, F, code, scale, on, fixed):
        """The values of ``code``; zeros where the one-element ``on`` is 0."""
        return F.broadcast_mul(code, F.broadcast_mul(scale, on))

    def surrogate(self, F, rows, on, code, scale, zero_point, params, fixed, data):
        """Zeros (R, K) that carry the gradient: here the identity, or the mask of ``clip``."""
        zeros = Q.zero_with_gradient(F, rows)
        if self.grad_mode == 'clip':
            low, high = self.bounds(F, scale, zero_point, fixed)
            zeros = zeros * self.mask(F, rows, low, high, on)
        return self.scale_gradient(F, zeros, rows, on, code, scale, zero_point)

    def scale_gradient(self, F, zeros, rows, on, code, scale, zero_point=None):
        """Apply element-wise gradient scaling to ``zeros`` if it was asked for."""
        if self.ewgs is None:
            return zeros
        v = F.broadcast_div(F.BlockGrad(rows), scale)
        offset = F.zeros_like(scale) if zero_point is None else zero_point
        v = F.broadcast_minimum(F.broadcast_maximum(v, self.grid.qmin - offset), self.grid.qmax - offset)
        return Q.elementwise_gradient_scaling(F, zeros, F.broadcast_mul(v - code, on), self.ewgs)

    def mask(self, F, rows, low, high, on):
        """1 inside the closed range, and everywhere while switched off."""
        off = Q.BIG * (1 - on)
        return Q.inside(F, F.BlockGrad(rows), F.broadcast_sub(low, off), F.broadcast_add(high, off))

    def bounds(self, F, scale, zero_point, fixed):
        """The representable range (low, high)."""
        offset = F.zeros_like(scale) if zero_point is None else zero_point
        return (self.grid.qmin - offset) * scale, (self.grid.qmax - offset) * scale

    def forward(self, x):
        if isinstance(x, nd.NDArray):
            if x.size == 0:
                return x
            if autograd.is_training() and self._must_start():
                self.init_from(x)
        return super().forward(x)

    def _must_start(self):
        """Outside of a net, the first training batch sets ranges that the graph cannot set."""
        return not (self.nested or self.starts_by_itself or self.calibrated or self.value('mode')[0] == OFF)

    @property
    def calibrated(self):
        """Whether a range exists: always true for methods that need none."""
        if self._known_ready or self.marker is None:
            return True
        self._known_ready = bool((self.value(self.marker) > 0).all())
        return self._known_ready

    def _forget_ready(self):
        self._known_ready = False

    def _on_use(self):
        if self.calibrated:
            return
        mode, weight = self.value('mode')[0], self.source
        if mode == OFF:
            return
        if autograd.is_training():
            if weight is not None:
                with autograd.pause():
                    self.init_from(weight)
            elif mode == QUANTIZE and not self.starts_by_itself and self.nested:
                raise RuntimeError(
                    f'{self.where} ({type(self).__name__}) has no range yet and cannot train without one. '
                    'Call gq.calibrate(net, loader) before training, or load a quantized checkpoint.')
        elif mode == QUANTIZE and not self._warned:
            self._warned = True
            warnings.warn(f'{self.where} ({type(self).__name__}) is not calibrated: its input passes unquantized. '
                          'Call gq.calibrate(net, loader), or load a quantized checkpoint.', stacklevel=2)

    def bind(self, weight, read=None):
        """Remember the Parameter that this quantizer stands in front of (layers do it).

        ``read()`` gives the array if that is computed from the Parameter, in its shape.
        """
        self._bound = (weight, read)        # in a tuple, so that Gluon does not register it as ours

    @property
    def bound(self):
        """The Parameter given to `bind`, or None."""
        return self._bound[0] if self._bound else None

    @property
    def source(self):
        """The array of the bound weight, or None."""
        if self.bound is None or self.bound._data is None:
            return None
        read = self._bound[1]
        return self.bound.list_data()[0] if read is None else read()

    def renew(self):
        """Set the ranges anew from the bound weight, if they had been set: what stands in front of it has changed."""
        if self.marker is not None and self.source is not None and (self.value(self.marker) > 0).all():
            self.init_from(self.source)

    def init_from(self, x):
        """Set every range from data.

        Parameters
        ----------
        x : NDArray or ndarray of the tensor's values (a weight quantizer: the weight), or an Observer that has
            seen them.
        """
        self.write(**self.initial(x))

    def initial(self, x):
        """The values ``init_from`` would write, by Parameter name; {} for methods that need none."""
        return {}

    def qparams(self, x=None):
        """Scale and zero point as deployed, `QParams`.

        Parameters
        ----------
        x : NDArray, optional
            The weight, for quantizers whose scale follows the weight; inside a layer it is known.

        Raises
        ------
        RuntimeError
            No range yet, or no weight given.
        """
        scale, zero_point = self._levels(self._weight(x))
        return QParams(self.per_axis(scale.astype('float32')),
                       self.per_axis(np.rint(zero_point).astype('int32')))

    def quantize(self, x):
        """The integer codes of x on ``self.grid``: int32 NDArray of x's shape, equal to what training rounds to."""
        self.require_range()
        self._complete(x)
        with autograd.pause():
            data = x.astype('float32')
            rows = self.rows(nd, data)
            fixed = self._fixed()
            scale, zero_point = self.levels_in_use(nd, rows, fixed)
            code = self.codes(nd, rows, scale, zero_point, fixed)
            if zero_point is not None:
                code = nd.broadcast_add(code, zero_point)
            return self.unrows(nd, code, data).astype('int32')

    def _complete(self, x):
        """Give Parameters of unknown length their values, as a first forward pass would."""
        if x is not None and any(parameter.shape == (0,) for parameter in self._reg_params.values()):
            self.infer_shape(x)
        for parameter in self._reg_params.values():
            parameter.prepare()
            parameter._finish_deferred_init()

    def _levels(self, x):
        self.require_range()
        self._complete(x)
        with autograd.pause():
            rows = None if x is None else self.rows(nd, x.astype('float32'))
            fixed = self._fixed()
            scale, zero_point = self.levels_in_use(nd, rows, fixed)
            zeros = np.zeros(scale.shape) if zero_point is None else zero_point.asnumpy()
            scale = scale.asnumpy().reshape(-1)
        if not np.isfinite(scale).all():
            raise RuntimeError(f'{self.where} ({type(self).__name__}) has the scale {scale[~np.isfinite(scale)][0]}: '
                               'training has diverged or the weight is broken. Go back to an earlier checkpoint')
        return scale, zeros.reshape(-1)

    def _fixed(self):
        return {name: nd.array(self.value(name)) for name in self._reg_params if name != 'mode'}

    def require_range(self):
        """RuntimeError unless there is a range to quantize with."""
        if not self.calibrated and not self.default_range:
            raise RuntimeError(f'{self.where} ({type(self).__name__}) has no range yet: call gq.calibrate(net, '
                               'loader) or init_from(data) first')

    def _weight(self, x):
        return x

    def per_axis(self, values):
        """One value per row -> one value per channel."""
        return values

    def freeze(self):
        """Stop following the data: state stays, learnable ranges get no gradient and no optimizer step."""
        self._set_frozen(True)

    def unfreeze(self):
        """Resume what `freeze` stopped."""
        self._set_frozen(False)

    def _set_frozen(self, frozen):
        if self.tracks:
            self.write(frozen=float(frozen))

    def _apply_frozen(self):
        """Keep optimizers away from frozen ranges: weight decay and momentum move even what has no gradient."""
        frozen = self.value('frozen')[0] > 0
        for parameter in self._reg_params.values():
            if parameter.trainable:
                parameter.grad_req = 'null' if frozen else 'write'

    def set_mode(self, mode):
        """OFF: x passes, nothing is observed. OBSERVE: x passes, statistics are kept. QUANTIZE."""
        if mode not in (OFF, OBSERVE, QUANTIZE):
            raise ValueError(f'mode={mode!r}: pass quantizers.OFF, OBSERVE or QUANTIZE')
        self.write(mode=float(mode))
