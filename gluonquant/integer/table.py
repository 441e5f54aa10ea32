"""The table of operators: what computes a node, by the name of its operator.

A function takes the attributes and the inputs: arrays of codes or of constants, and values. It returns a value, an
array of codes, or a list of them.
"""
import numpy as np

from .values import F32, Quantized, Real

TABLE = {}


def operator(*names):
    """Function decorator: computes these operators."""
    def enter(function):
        TABLE.update(dict.fromkeys(names, function))
        return function
    return enter


def moving(*names):
    """Function decorator: ``function(attrs, array, *others)`` moves or selects elements, of whatever type."""
    def enter(function):
        return operator(*names)(moved(function))
    return enter


def moved(function):
    """``function``, see `moving`, on values."""
    def compute(attrs, value, *others):
        others = [other if other is None or isinstance(other, np.ndarray) else other.real() for other in others]
        if isinstance(value, Quantized):
            return each(function(attrs, value.array, *others), lambda array: Quantized(array, value.grid))
        if isinstance(value, np.ndarray) and value.dtype != F32:
            return function(attrs, value, *others)
        return each(function(attrs, real_of(value), *others), Real)      # a real constant becomes a value
    return compute


def real(*names):
    """Function decorator: ``function(attrs, *arrays)`` computes in float32."""
    def enter(function):
        def compute(attrs, *values):
            arrays = [value if value is None or isinstance(value, np.ndarray) else value.real() for value in values]
            return each(function(attrs, *arrays), lambda array: Real(np.asarray(array, F32)))
        return operator(*names)(compute)
    return enter


def each(made, wrap):
    """``wrap`` of an array, or of each of a list."""
    return [wrap(array) for array in made] if isinstance(made, list) else wrap(made)


def array_of(value):
    """The array of a value, of codes or real numbers, or a constant itself."""
    return value if isinstance(value, np.ndarray) else value.array if hasattr(value, 'array') else value.real()


def real_of(value):
    """The float32 array of a value, or a constant itself."""
    return value if isinstance(value, np.ndarray) else value.real()
