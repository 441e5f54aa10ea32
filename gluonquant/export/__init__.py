"""From a quantized net to files that inference engines read."""
from .lower import lower
from .onnx_file import export_onnx

__all__ = ['export_onnx', 'lower']
