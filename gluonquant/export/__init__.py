"""From a quantized net to files that inference engines read."""
from .lower import lower
from .onnx_file import export_onnx
from .tensorrt import export_tensorrt_ranges, lint_tensorrt

__all__ = ['export_onnx', 'export_tensorrt_ranges', 'lint_tensorrt', 'lower']
