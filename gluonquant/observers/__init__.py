"""Observers: statistics of the batches they are shown. Values in, range out; NumPy only."""
from .base import Observer, SamplingObserver, _observers
from .ema import EMAObserver
from .kl import KLObserver, kl_bins
from .minmax import MinMaxObserver
from .mse import MSEObserver, mse_range
from .percentile import PercentileObserver

__all__ = ['EMAObserver', 'KLObserver', 'MSEObserver', 'MinMaxObserver', 'Observer', 'PercentileObserver',
           'SamplingObserver', 'available', 'create', 'kl_bins', 'mse_range']


def create(name, **options):
    """Make the observer registered under ``name``.

    Parameters
    ----------
    name : str
        One of :func:`available`.
    options
        Passed to its class, e.g. ``create('percentile', percentile=99.99)``.

    Raises
    ------
    ValueError
        An unknown name (the message lists the known ones), or an option out of its range.
    TypeError
        An option the class does not have.
    """
    return _observers.get(name)(**options)


def available():
    """Names of all observers, sorted."""
    return _observers.names()
