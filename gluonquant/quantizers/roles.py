"""The two places of a quantizer: in front of a weight, in front of a layer's input."""
import numpy as np
from mxnet import nd

from .. import functional as Q
from .. import observers, ops
from .base import OFF, Quantizer


class WeightQuantizer(Quantizer):
    """A quantizer of weights: one scale for the tensor, per output channel, or per group of channels.

    Parameters
    ----------
    bits : int
    grid : Grid
    per_channel : bool
        One scale for each index of ``axis``.
    axis : int
        The output channels: 0 for Conv and Dense weights, 1 for transposed convolutions.
    shape : tuple of int, optional
        Shape of the weight, 0 where it is not known yet; None = taken from the first weight seen. Inside a net it
        lets MXNet infer an unknown number of input channels through the quantizer.
    group_size : int
        How many channels share a scale when ``per_channel``.
    """
    role = 'weight'
    per_channel_default = False
    tracks = True
    holds = True                # the scale follows the weight, so freezing must remember it
    has_zero_point = False

    def __init__(self, bits, grid, signed=None, per_channel=None, axis=0, shape=None, group_size=1, **kwargs):
        super().__init__(bits, grid, **kwargs)
        if signed is not None and not signed:
            raise ValueError(f'signed=False: {type(self).__name__} quantizes weights, which have both signs')
        if axis not in (0, 1):
            raise ValueError(f'axis={axis!r}: output channels are axis 0, or 1 for transposed convolutions')
        self.per_channel = self.per_channel_default if per_channel is None else bool(per_channel)
        self.axis = axis
        self.group_size = group_size
        self.shape = shape
        self._set_channels(shape[axis] if shape else 0)
        if self.holds:
            with self.name_scope():
                self.held_scale = self.state('held_scale', shape=self.scale_shape())
                if self.has_zero_point:
                    self.held_zero = self.state('held_zero', shape=self.scale_shape())

    def scale_shape(self):
        """Shape of a Parameter with one value per row; (0,) while the number of channels is unknown."""
        return (self.channels // self.group_size,) if self.per_channel else (1,)

    def _set_channels(self, channels):
        if channels % self.group_size:
            raise ValueError(f'group_size={self.group_size} does not divide the {channels} output channels of '
                             f'{self.where}')
        self.channels = channels

    def infer_shape(self, x):
        self._set_channels(x.shape[self.axis])
        shape = self.scale_shape()
        for parameter in self._reg_params.values():
            if parameter.shape == (0,):
                parameter.shape = shape

    def can_fuse(self, data):
        return super().can_fuse(data) and self._shape_known(data)

    def _shape_known(self, data):
        # The extension interface infers shapes forwards only.
        if isinstance(data, nd.NDArray):
            return True
        shape = self.shape if self.bound is None else self.bound.shape
        return shape is not None and all(size > 0 for size in shape)

    def fused_options(self):
        return {**super().fused_options(), 'axis': self.axis if self.per_channel else -1, 'group': self.group_size}

    def rows(self, F, x):
        # Inference leaves convolution weights in a blocked layout, which MXNet's reshape cannot read if they are
        # grouped ("could not create a primitive descriptor for a reorder primitive"); a product puts them back.
        x = x * 1
        if not self.per_channel:
            return F.reshape(x, shape=(1, -1))
        rows = F.reshape(x if self.axis == 0 else F.swapaxes(x, 0, 1), shape=(0, -1))
        if self.group_size > 1:
            rows = F.reshape(F.reshape(rows, shape=(-4, -1, self.group_size, -2)), shape=(0, -1))
        return rows

    def unrows(self, F, rows, x):
        swapped = self.per_channel and self.axis == 1
        if self.shape is None:
            out = F.reshape_like(rows, F.swapaxes(x, 0, 1) if swapped else x)
        else:       # reshape_like fails while a dimension of x is unknown; a reshape with one open dimension does not
            target = [size or -1 for size in self.shape]
            if swapped:
                target[:2] = target[1::-1]
            out = F.reshape(rows, shape=tuple(target))
        # Adding zeros of x lets MXNet infer the weight's shape from the layer, against the direction of the reshapes.
        return (F.swapaxes(out, 0, 1) if swapped else out) + F.zeros_like(x)

    def per_axis(self, values):
        return np.repeat(values, self.group_size) if self.per_channel else values

    def levels_in_use(self, F, rows, fixed):
        scale, zero_point = self.levels(F, rows, fixed)
        if not self.holds:
            return scale, zero_point
        scale = Q.choose(F, fixed['frozen'], F.reshape(fixed['held_scale'], shape=(-1, 1)), scale)
        if zero_point is not None:
            zero_point = Q.choose(F, fixed['frozen'], F.reshape(fixed['held_zero'], shape=(-1, 1)), zero_point)
        return scale, zero_point

    def freeze(self, x=None):
        """Keep the scale of the present weight (``x``, or the layer's own) although the weight goes on changing."""
        if self.holds and self.value('frozen')[0] == 0:
            scale, zero_point = self._levels(self._weight(x))
            self.write(held_scale=scale)
            if self.has_zero_point:
                self.write(held_zero=zero_point)
        self._set_frozen(True)

    def _weight(self, x):
        x = self.source if x is None else x
        if x is None and self.marker is None:
            raise RuntimeError(f'the scale of {self.where} ({type(self).__name__}) follows the weight: pass the weight')
        return x

    def row_values(self, x):
        """The weight as a float64 array (R, K), for initial values."""
        x = x if isinstance(x, nd.NDArray) else nd.array(x)
        return self.rows(nd, x.astype('float32')).asnumpy().astype('float64')


class ActivationQuantizer(Quantizer):
    """A quantizer of activations: one scale for the tensor, known before the tensor is.

    Parameters
    ----------
    bits : int
    grid : Grid
    delay_quant : int
        The first ``delay_quant`` training passes leave x as it is and only collect statistics; so does inference
        until they are over. Counted in the saved state ``steps``.
    """
    role = 'activation'
    signed_supported = True
    follows = False             # the forward pass updates statistics
    reads_input_again = False   # the gradient needs the input, not only where it was clipped
    default_observer = 'minmax'
    observer_options = {}

    def __init__(self, bits, grid, per_channel=None, axis=0, delay_quant=0, **kwargs):
        super().__init__(bits, grid, **kwargs)
        if per_channel:
            raise ValueError(f'per_channel=True: {type(self).__name__} quantizes activations, which have one scale '
                             'per tensor; per-channel input scales do not factor out of a convolution')
        if isinstance(delay_quant, bool) or not isinstance(delay_quant, int) or delay_quant < 0:
            raise ValueError(f'delay_quant={delay_quant!r}: pass a number of training steps >= 0')
        self.delay_quant = delay_quant
        if delay_quant:
            with self.name_scope():
                self.steps = self.state('steps', merge='max')

    def can_fuse(self, data):
        # The backward pass of a method that reads its input again cannot see how often the delay had been counted.
        return super().can_fuse(data) and not (self.delay_quant and self.reads_input_again)

    def operands(self, F, data, mode, params):
        tensors = super().operands(F, data, mode, params)
        if (self.follows or self.delay_quant) and not ops.in_layout():
            tensors['training'] = Q.is_training(F)
        return tensors

    def fused_options(self):
        return {**super().fused_options(), **({'delay': self.delay_quant} if self.delay_quant else {})}

    def advance(self, F, rows, mode, params, fixed):
        if not self.tracks and not self.delay_quant:
            return {}
        learning = Q.is_training(F) * (mode > OFF)
        if self.tracks:
            learning = learning * (1 - fixed['frozen'])
        changed = self.track(F, rows, learning, params, fixed)
        if self.delay_quant:
            changed['steps'] = Q.assign(F, params['steps'], fixed['steps'] + learning)
            changed['past_delay'] = changed['steps'] - learning >= self.delay_quant
        return changed

    def track(self, F, rows, learning, params, fixed):
        """New values of the statistics, written where ``learning`` is 1: {} for learned ranges."""
        return {}

    def ready(self, F, fixed):
        ready = super().ready(F, fixed)
        return ready * fixed['past_delay'] if self.delay_quant else ready

    def freeze(self):
        """Keep the range as it is; RuntimeError if there is none to keep."""
        self.require_range()
        super().freeze()

    def affine_bounds(self):
        """(lowest, highest) representable value."""
        scale, zero_point = (values[0] for values in self._levels(None))
        return float(scale * (self.grid.qmin - zero_point)), float(scale * (self.grid.qmax - zero_point))

    def observer(self, name=None):
        """A new observer of the kind this method is calibrated with by default, or of the named kind."""
        if name is None:
            made = observers.create(self.default_observer, **self.observer_options)
        else:
            made = observers.create(name)
        made.chosen = name is not None
        return made

    def seen(self, x):
        """``x`` as an Observer that has seen it."""
        if isinstance(x, observers.Observer):
            return x
        observer = self.observer()
        observer.update(x)
        return observer

