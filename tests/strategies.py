"""Hypothesis strategies: grids, shapes, and float32 values where quantizers go wrong."""
import numpy as np
from hypothesis import strategies as st

from gluonquant.grid import Grid

FLOAT32 = np.finfo(np.float32)


@st.composite
def grids(draw):
    """Any legal grid."""
    width = draw(st.integers(1, 16))
    kinds = [{'signed': False}, {'signed': True}, {'signed': True, 'midrise': True}]
    if width > 1:
        kinds.append({'signed': True, 'narrow_range': True})
    return Grid(width, **draw(st.sampled_from(kinds)))


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
powers_of_two = st.integers(-20, 20).map(lambda exponent: 2.0 ** exponent)


def neighbours(value):
    """A number and the float32 numbers on either side of it."""
    value = np.float32(value)
    return [np.nextafter(value, np.float32(-np.inf)), value, np.nextafter(value, np.float32(np.inf))]


def adversarial(scale, qmin, qmax):
    """Single float32 values: codes, halves and clip edges with their neighbours, +-0, denormal, huge."""
    codes = st.integers(qmin - 2, qmax + 2)
    exact = codes.map(lambda code: np.float32(code * scale))
    halves = codes.map(lambda code: np.float32((code + 0.5) * scale))
    edges = st.sampled_from([np.float32(qmin * scale), np.float32(qmax * scale)])
    near = st.one_of(exact, halves, edges).flatmap(lambda value: st.sampled_from(neighbours(value)))
    special = st.sampled_from([0.0, -0.0, float(FLOAT32.smallest_subnormal), -float(FLOAT32.smallest_subnormal),
                               float(FLOAT32.tiny), 1e30, -1e30]).map(np.float32)
    ordinary = st.floats(qmin * scale - scale, qmax * scale + scale, width=32).map(np.float32)
    return st.one_of(near, special, ordinary)


@st.composite
def adversarial_arrays(draw, scale, qmin, qmax, max_size=24):
    """Flat float32 arrays of `adversarial` values."""
    values = draw(st.lists(adversarial(scale, qmin, qmax), min_size=1, max_size=max_size))
    return np.array(values, np.float32)
