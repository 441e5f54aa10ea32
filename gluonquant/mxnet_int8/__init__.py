"""A quantized net on MXNet's own integer operators."""
from .block import codes
from .build import to_mxnet_int8
from .layers import Step

__all__ = ['Step', 'codes', 'to_mxnet_int8']
