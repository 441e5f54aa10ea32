"""Elementary functions in float32, as ONNX Runtime computes them: quotients of polynomials by multiply-adds."""
import math

import numpy as np

F32 = np.float32

# Of odd powers in the numerator and even ones in the denominator, the highest first (those of Eigen).
_SIGMOID = ((4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03,
             2.48287947061529e-01),
            (6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03,
             1.16817656904453e-01, 9.93151921023180e-01))
_TANH = ((-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
          1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
         (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03))


def _quotient(x, coefficients):
    square = x * x
    top, bottom = (_polynomial(square, each) for each in coefficients)
    return (top * x) / bottom


def _polynomial(x, coefficients):
    value = np.full_like(x, F32(coefficients[0]))
    for coefficient in coefficients[1:]:
        value = (value.astype(np.float64) * x + np.float64(F32(coefficient))).astype(F32)
    return value


def sigmoid(x):
    """1 / (1 + exp(-x)), to about an ulp of 1."""
    return np.clip(_quotient(np.clip(x, F32(-18), F32(18)), _SIGMOID) + F32(0.5), F32(0), F32(1))


def tanh(x):
    """tanh(x), to about an ulp of 1."""
    return _quotient(np.clip(x, F32(-9), F32(9)), _TANH)


def softplus(x):
    """log(1 + exp(x))."""
    return np.logaddexp(x, F32(0))


def softsign(x):
    """x / (1 + |x|)."""
    return x / (1 + np.abs(x))


def softmax(x, axis):
    """exp(x) / sum(exp(x)) along an axis, of the type of x."""
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def largest(*arrays):
    """The largest of any number of arrays."""
    return np.maximum.reduce(np.broadcast_arrays(*arrays))


def smallest(*arrays):
    """The smallest of any number of arrays."""
    return np.minimum.reduce(np.broadcast_arrays(*arrays))


FUNCTIONS = {
    'Sub': np.subtract, 'Div': np.divide, 'Pow': np.power, 'Max': largest, 'Min': smallest, 'Sqrt': np.sqrt,
    'Exp': np.exp, 'Log': np.log, 'Abs': np.abs, 'Neg': np.negative, 'Tanh': tanh, 'Reciprocal': np.reciprocal,
    'Floor': np.floor, 'Ceil': np.ceil, 'Round': np.rint, 'Sin': np.sin, 'Cos': np.cos, 'Sigmoid': sigmoid,
    'Softplus': softplus, 'Softsign': softsign, 'Erf': np.vectorize(math.erf, otypes=[F32])}
