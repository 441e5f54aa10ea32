"""Every quantizer that can be made, and one pass through it beside its float64 reference."""
from dataclasses import dataclass, field

import numpy as np
import pytest
from mxnet import autograd, nd

from gluonquant import quantizers
from reference import METHODS, Result

BITS = (1, 2, 3, 4, 8)
STATIC = {'static_alloc': True, 'static_shape': True}
WEIGHT_SHAPE = (4, 6, 3, 3)
ACTIVATION_SHAPE = (3, 4, 5, 5)


@dataclass(frozen=True)
class Case:
    """A method with its role, grid and granularity."""
    name: str
    role: str
    bits: int
    signed: object = None
    per_channel: bool = False
    axis: int = 0
    options: tuple = ()

    def __str__(self):
        words = [self.name, self.role, f'{self.bits}bit']
        if self.signed is not None:
            words.append('signed' if self.signed else 'unsigned')
        if self.per_channel:
            words.append(f'channel{self.axis}')
        return '-'.join(words + [f'{name}={value}' for name, value in self.options])

    def make(self, hybridized=False, **options):
        """A new quantizer."""
        if self.role == 'weight' and (hybridized or self.per_channel or 'group_size' in dict(self.options)):
            options.setdefault('shape', self.shape)
        q = quantizers.create(self.name, self.bits, self.role, signed=self.signed, axis=self.axis,
                              per_channel=self.per_channel if self.role == 'weight' else None,
                              **dict(self.options), **options)
        q.initialize()
        if hybridized:
            q.hybridize(**STATIC)
        return q

    def ready(self, x, hybridized=False, **options):
        """A new quantizer with its ranges set from ``x``."""
        if self.role == 'weight' and self.per_channel:
            options.setdefault('shape', x.shape)
        q = self.make(hybridized, **options)
        if self.name != 'none':
            q.init_from(nd.array(x))
        return q

    @property
    def shape(self):
        return WEIGHT_SHAPE if self.role == 'weight' else ACTIVATION_SHAPE

    def data(self, seed, size=1.0):
        """Gaussian float32 values with exact zeros, ties of a short scale and denormals among them."""
        x = np.random.default_rng(seed).normal(0, size, self.shape).astype(np.float32)
        x.reshape(-1)[:8] = np.float32(size) * np.array([0, -0.0, 0.5, -0.5, 1.5, 1, 1e-42, -1e-42], np.float32)
        return x

    def spread(self, values):
        """One value per scale, in a shape that broadcasts against x."""
        if not self.per_channel:
            return values.reshape(())
        shape = [1] * len(self.shape)
        shape[self.axis] = -1
        return values.reshape(shape)

    def groups(self, x):
        """x as rows that share a scale."""
        return np.moveaxis(x, self.axis, 0).reshape(x.shape[self.axis], -1) if self.per_channel else x.reshape(1, -1)

    def reference(self, x, g, before, after, training, **options):
        """The reference's `Result`, from the state before and the learned values after the forward."""
        options = {**dict(self.options), **options}
        if self.name == 'lsqplus' and 'nudged' in before:
            options['nudge_offset'] = bool(before['nudged'][0])
        compute = getattr(METHODS[self.name], self.role)
        if self.role == 'activation':
            if 'amax' in before:
                before = {'steps': np.zeros(1), **before}
            signed = self.signed if self.signed is not None else self.name == 'int8'
            return compute(x, g, self.bits, signed=signed, params=after, state=before, training=training, **options)
        if self.name == 'gdrq' and self.per_channel:        # the reference groups axis 0
            result = compute(x.swapaxes(0, self.axis), g.swapaxes(0, self.axis), self.bits, group_size=1, **options)
            for part in ('y', 'codes', 'dx', 'ties'):
                setattr(result, part, getattr(result, part).swapaxes(0, self.axis))
            return result
        return compute(x, g, self.bits, per_channel=self.per_channel, axis=self.axis, params=after, **options)


@dataclass
class Pass:
    """What one forward and backward pass did, and what the reference says."""
    x: np.ndarray
    g: np.ndarray
    y: np.ndarray
    dx: np.ndarray
    expected: Result
    codes: np.ndarray = None
    dparams: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)


def values(q):
    """All Parameters of a quantizer by short name."""
    return {name: q.value(name) for name in q._reg_params} if hasattr(q, 'value') else {}


def learned(q):
    """The Parameters that an optimizer moves, by short name."""
    return {name: parameter for name, parameter in q._reg_params.items() if parameter.grad_req != 'null'}


def run(q, x, g=None, training=True):
    """(y, dx, {name: gradient of the Parameter}) as NumPy arrays."""
    x = nd.array(x, dtype=x.dtype)
    x.attach_grad()
    with autograd.record(train_mode=training):
        y = q(x)
    y.backward(nd.ones_like(y) if g is None else nd.array(g, dtype=x.dtype), train_mode=training)
    return y.asnumpy(), x.grad.asnumpy(), {name: p.grad().asnumpy() for name, p in learned(q).items()}


def compared(case, q, x, seed, training=True, **options):
    """One pass with a random head gradient, set to 0 where float32 may choose the other neighbour."""
    g = np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)
    before = values(q)
    data = nd.array(x)
    data.attach_grad()
    with autograd.record(train_mode=training):
        y = q(data)
    after = values(q)
    expected = case.reference(x, g, before, after, training, **options)
    g[expected.ties] = 0
    expected = case.reference(x, g, before, after, training, **options)
    y.backward(nd.array(g), train_mode=training)
    on_grid = case.name != 'none' and np.isfinite(expected.scale).all()
    return Pass(x, g, y.asnumpy(), data.grad.asnumpy(), expected,
                q.quantize(data).asnumpy() if on_grid else None,
                {name: p.grad().asnumpy() for name, p in learned(q).items()}, after)


def infer(q, x):
    """y in inference, as a NumPy array."""
    return q(nd.array(x, dtype=x.dtype)).asnumpy()


def same_bits(actual, expected):
    """Equal to the last bit, NaN included; +0 and -0 count as equal."""
    np.testing.assert_array_equal(actual, expected)


def _legal(**kwargs):
    try:
        case = Case(**kwargs)
        return case, case.make().grid
    except ValueError:
        return None, None


def _cases():
    for role in ('weight', 'activation'):
        for name in quantizers.available(role):
            if name == 'none':
                yield Case(name, role, 8)
                continue
            grids = set()
            for bits in BITS:
                for signed in (None,) if role == 'weight' else (False, True):
                    case, grid = _legal(name=name, role=role, bits=bits, signed=signed)
                    if case is None or grid in grids:       # `signed` changes nothing where the range finds out
                        continue
                    grids.add(grid)
                    yield case
                    if role == 'weight':
                        for axis in (0, 1):
                            case, _ = _legal(name=name, role=role, bits=bits, per_channel=True, axis=axis)
                            if case is not None:
                                yield case


EVERYTHING = list(_cases())
ROUNDING = [case for case in EVERYTHING if case.name != 'none']
WEIGHTS = [case for case in ROUNDING if case.role == 'weight']
ACTIVATIONS = [case for case in ROUNDING if case.role == 'activation']


def few(cases):
    """Those with 1 and 4 bits, for facts that have little to do with the number of bits."""
    return [case for case in cases if case.bits in (1, 4) or case.name == 'none']


def over(cases, argument='case'):
    """Parametrize a test over cases."""
    return pytest.mark.parametrize(argument, cases, ids=str)
