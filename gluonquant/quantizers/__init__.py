"""Quantizers: one file for each published method, one class for each role."""
from .affine import AffineActivation, AffineWeight, FQNActivation, FQNWeight
from .base import OBSERVE, OFF, QUANTIZE, QParams, Quantizer
from .bias import BiasQuantizer
from .cliprelu import ClipReLU
from .dorefa import DoReFaActivation, DoReFaWeight
from .fixed import FixedWeight
from .gdrq import GDRQActivation, GDRQWeight
from .identity import ActivationIdentity, Identity, WeightIdentity
from .int8 import Int8Activation, Int8Weight
from .lsq import LSQActivation, LSQWeight
from .lsqplus import LSQPlusActivation, LSQPlusWeight
from .pact import PACT
from .qil import QILActivation, QILWeight
from .registry import TABLES
from .roles import ActivationQuantizer, WeightQuantizer
from .sawb import SAWB

__all__ = [
    'OBSERVE', 'OFF', 'PACT', 'QUANTIZE', 'SAWB', 'ActivationIdentity', 'ActivationQuantizer', 'AffineActivation',
    'AffineWeight', 'BiasQuantizer', 'ClipReLU', 'DoReFaActivation', 'DoReFaWeight', 'FQNActivation', 'FQNWeight',
    'FixedWeight', 'GDRQActivation', 'GDRQWeight', 'Identity', 'Int8Activation', 'Int8Weight', 'LSQActivation',
    'LSQPlusActivation', 'LSQPlusWeight', 'LSQWeight', 'QILActivation', 'QILWeight', 'QParams', 'Quantizer',
    'WeightIdentity', 'WeightQuantizer', 'available', 'create', 'find',
]


def available(role=None):
    """Names of the methods to train with, sorted; of one role ('weight' or 'activation') if given."""
    tables = TABLES.values() if role is None else [_table(role)]
    return sorted({name for table in tables for name in table.names() if getattr(table.get(name), 'trains', True)})


def create(name, bits, role='weight', signed=None, per_channel=None, axis=0, **options):
    """Make a quantizer.

    Parameters
    ----------
    name : str
        One of ``available(role)``.
    bits : int
    role : 'weight' or 'activation'
    signed : bool, optional
        Activations: whether inputs are below zero too; None = the method's usual grid.
    per_channel : bool, optional
        Weights: one scale for each index of ``axis``; None = the method's usual choice.
    axis : 0 or 1
        The weight's output channels.
    options
        Of the method, see its class.

    Raises
    ------
    ValueError
        Unknown name or role, or values that the method does not support.
    TypeError
        An option that the method does not have.
    """
    return find(name, role)(bits, signed=signed, per_channel=per_channel, axis=axis, **options)


def find(name, role):
    """The class registered under ``name`` for ``role``; ValueError as in `create`."""
    table = _table(role)
    other = TABLES['activation' if role == 'weight' else 'weight']
    if isinstance(name, str) and name not in table.names() and name in other.names():
        raise ValueError(f'{name!r} quantizes {other.kind.split()[0]}s only. '
                         f'For a {role} use one of: {", ".join(table.names())}')
    return table.get(name)


def _table(role):
    if role not in TABLES:
        raise ValueError(f"role={role!r}: pass 'weight' or 'activation'")
    return TABLES[role]
