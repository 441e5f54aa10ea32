"""FQN: affine quantization with percentile ranges for activations (Li et al., CVPR 2019).

Weights: min/max of the current channel, as in affine.py. Activations: the percentiles (100 - P, P), P = 99.9.
"""
from . import affine

weight = affine.weight


def activation(x, g, bits, *, percentile=99.9, **options):
    return affine.activation(x, g, bits, percentile=percentile, **options)
