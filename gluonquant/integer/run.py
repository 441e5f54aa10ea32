"""Running a `Model`: one function for each operator, on the values of `values`."""
import numpy as np

from . import operators
from .files import read
from .model import Model
from .values import Grid, Quantized, Real


class Runner:
    """Computes a model with integer arithmetic, node by node.

    Parameters
    ----------
    model : Model, or the path of an ONNX or a packed file

    Raises
    ------
    ValueError
        An operator that is not known here; its node is named.
    """

    def __init__(self, model):
        self.model = model if isinstance(model, Model) else read(model)
        for node in self.model.nodes:
            if node.op not in operators.TABLE and node.op not in ('QuantizeLinear', 'DequantizeLinear'):
                raise ValueError(f'node {node.name!r}: the operator {node.op} does not run here')
        self._uses = {}
        for node in self.model.nodes:
            for name in node.inputs:
                self._uses[name] = self._uses.get(name, 0) + 1

    def __call__(self, *inputs, keep=(), watch=None):
        """The outputs for the given inputs.

        Parameters
        ----------
        inputs : float32 arrays, in the order of ``model.inputs``
        keep : names of tensors to return too, or 'codes' for all tensors of integers
        watch : callable(node, value, grid), optional
            Is told what each QuantizeLinear rounds, a value of `values`, and to which grid.

        Returns
        -------
        dict, {name: array}
            float32 for real tensors, int8 or uint8 for codes.

        Raises
        ------
        ValueError
            The number of inputs, or the shape of one, is not that of the model.
        """
        self._check(inputs)
        values = {**self.model.constants, **{name: Real(np.asarray(array, np.float32))
                                             for name, array in zip(self.model.inputs, inputs)}}
        kept, uses = {}, dict(self._uses)
        for node in self.model.nodes:
            made = self._run(node, [values[name] if name else None for name in node.inputs], watch)
            for name, value in zip(node.outputs, made):
                values[name] = value
                integer = isinstance(value, np.ndarray) and value.dtype in (np.int8, np.uint8)
                if name in self.model.outputs or name in keep or (keep == 'codes' and integer):
                    kept[name] = value if isinstance(value, np.ndarray) else value.real()
            for name in node.inputs:
                if name:
                    uses[name] -= 1
                    if not uses[name]:
                        del values[name]
        return {**{name: kept[name] for name in self.model.outputs}, **kept}

    def _check(self, inputs):
        expected = self.model.inputs
        if len(inputs) != len(expected):
            raise ValueError(f'the model takes {len(expected)} inputs ({", ".join(expected)}), not {len(inputs)}')
        for (name, shape), array in zip(expected.items(), inputs):
            found = np.shape(array)
            if len(found) != len(shape) or any(want not in (None, size) for want, size in zip(shape, found)):
                raise ValueError(f'the input {name!r} has shape {found}, the model takes {shape}')

    def _run(self, node, inputs, watch):
        if node.op == 'QuantizeLinear':
            value, scale, zero = inputs
            value = Real(value) if isinstance(value, np.ndarray) else value
            grid = Grid(scale, zero, zero.dtype, node.attrs.get('axis', 1))
            if watch is not None:
                watch(node, value, grid)
            return [value.codes(grid)]
        if node.op == 'DequantizeLinear':
            codes, scale, *zero = inputs
            zero = zero[0] if zero else np.zeros(np.shape(scale), codes.dtype)
            return [Quantized(codes, Grid(scale, zero, codes.dtype, node.attrs.get('axis', 1)))]
        try:
            made = operators.TABLE[node.op](node.attrs, *inputs)
        except ValueError as error:
            raise ValueError(f'node {node.name!r} ({node.op}): {error}') from None
        return made if isinstance(made, list) else [made]


def run(model, *inputs, keep=()):
    """The outputs of ``model``, a `Model` or the path of an ONNX file: see `Runner`."""
    return Runner(model)(*inputs, keep=keep)
