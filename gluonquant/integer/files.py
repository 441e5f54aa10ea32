"""Reading a `Model` from whatever file holds one."""
from .onnx_file import read_onnx
from .packed_file import MAGIC, read_packed


def read(path):
    """The `Model` in an ONNX file of `export_onnx`, or in a file of `save_packed`.

    Raises
    ------
    ValueError
        The file is damaged, or neither of both.
    """
    with open(path, 'rb') as file:
        packed = file.read(len(MAGIC)) == MAGIC
    return read_packed(path).model() if packed else read_onnx(path)
