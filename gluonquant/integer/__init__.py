"""What is deployed, defined in NumPy: reads an exported graph and computes it with integers. Needs no MXNet.

    model = gluonquant.integer.read('net.onnx')
    outputs = gluonquant.integer.run(model, images)
"""
from .files import read
from .model import Model, Node
from .run import Runner, run
from .values import Quantized

__all__ = ['Model', 'Node', 'Quantized', 'Runner', 'read', 'run']
