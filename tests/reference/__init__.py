"""Float64 NumPy references of every quantizer, written from the papers' formulas and independent of the library.

Each module has `weight` and/or `activation`, both returning a `common.Result`; `initial` gives starting parameters.
"""
from . import affine, cliprelu, dorefa, fqn, gdrq, int8, lsq, lsqplus, none, observers, pact, qil, sawb
from .common import Result

__all__ = ['METHODS', 'Result', 'observers']

METHODS = {'int8': int8, 'affine': affine, 'fqn': fqn, 'pact': pact, 'sawb': sawb, 'dorefa': dorefa, 'qil': qil,
           'gdrq': gdrq, 'lsq': lsq, 'lsqplus': lsqplus, 'cliprelu': cliprelu, 'none': none}
