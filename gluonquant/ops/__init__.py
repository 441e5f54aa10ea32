"""Fused operators: a quantizer in one pass over memory instead of a dozen. Three tiers, slowest first:

- 'pure': no compiled code, MXNet's own operators.
- 'portable': operators through MXNet's extension interface.
- 'layout': the same operators, taught to take oneDNN's blocked arrays as they are; for one build of libmxnet.so.

The fastest that works is chosen at import, or the one named by the environment variable ``GLUONQUANT_OPS``. All tiers
compute the same numbers.
"""
import os
import warnings
from collections import namedtuple

from . import load
from .call import fake_quantize
from .find import Unavailable, Unsupported

__all__ = ['Backend', 'TIERS', 'backend', 'fake_quantize', 'in_layout', 'name', 'require', 'use']

TIERS = ('pure', 'portable', 'layout')

Backend = namedtuple('Backend', 'tier reason path')
Backend.__doc__ = """The tier that runs, why it does in one sentence, and the path of its library (None if 'pure')."""

_backend = Backend('pure', 'nothing else was tried', None)
_attempts = {}      # tier -> path of its library, or why it is Unavailable; each is tried once in a process


def backend():
    """The `Backend` that runs."""
    return _backend


def use(tier):
    """Choose the tier for graphs traced and blocks run from now on; returns the name of the previous one.

    Graphs that are already hybridized keep their operators: hybridize again.

    Parameters
    ----------
    tier : 'pure', 'portable', 'layout', or 'auto' for the fastest that works.

    Raises
    ------
    ValueError if there is no such tier; RuntimeError if it cannot run here. Nothing changes then.
    """
    global _backend
    _check(tier, (*TIERS, 'auto'))
    reached, obstacle = _climb(TIERS[-1] if tier == 'auto' else tier)
    reason = 'it was asked for'
    if obstacle and tier != 'auto':
        raise RuntimeError(f'the {tier} operators cannot run here: {obstacle}') from obstacle
    if tier == 'auto':
        reason = str(obstacle or 'libmxnet.so is the build it was checked against')
    if obstacle and not isinstance(obstacle, Unsupported):
        cost = {'pure': 'several times slower', 'portable': 'somewhat slower'}[reached]
        warnings.warn(f'gluonquant runs on its {reached} operators, which are {cost}: {obstacle}', RuntimeWarning,
                      stacklevel=2)
    previous, _backend = _backend.tier, Backend(reached, reason, _attempts.get(reached))
    return previous


def require(tier='portable'):
    """Raise RuntimeError, with the reason, unless at least this tier runs."""
    _check(tier, TIERS)
    if TIERS.index(_backend.tier) < TIERS.index(tier):
        raise RuntimeError(f'the {tier} operators are required, but the {_backend.tier} ones run: {_backend.reason}')


def name(role):
    """Name of the operator for 'activation' or 'weight' in the tier that runs; None in the pure tier."""
    if role not in load.ROLES:
        raise ValueError(f'no operator for role {role!r}: choose from {", ".join(load.ROLES)}')
    return None if _backend.tier == 'pure' else load.PREFIXES[_backend.tier] + role


def in_layout():
    """Whether the layout tier runs."""
    return _backend.tier == 'layout'


def _check(tier, known):
    if tier not in known:
        raise ValueError(f'no operators called {tier!r}: choose from {", ".join(known)}')


def _climb(highest):
    """The fastest tier up to ``highest`` that works, and what keeps us from the next; each needs those before it."""
    reached = 'pure'
    for tier in TIERS[1:TIERS.index(highest) + 1]:
        if tier not in _attempts:
            _attempts[tier] = _attempt(tier)
        if isinstance(_attempts[tier], Unavailable):
            return reached, _attempts[tier]
        reached = tier
    return reached, None


def _attempt(tier):
    try:
        return str({'portable': load.portable, 'layout': load.layout}[tier]())
    except Unavailable as reason:
        return reason


def _start():
    tier = os.environ.get('GLUONQUANT_OPS') or 'auto'
    try:
        use(tier)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f'GLUONQUANT_OPS={tier}: {error}') from error


_start()
