"""The forward pass of a quantizer as one fused operator."""
from mxnet import nd

from .. import ops


class Fusable:
    """What a quantizer tells the fused operators.

    A class whose formulas they know names them by ``fused``; a class derived from it has to do so again, since it may
    have changed the formulas. Its options beyond the grid are `fused_options`.
    """
    fused = None

    def can_fuse(self, data):
        """Whether one operator can stand for this quantizer."""
        return 'fused' in type(self).__dict__ and self.ewgs is None

    def fused_options(self):
        """Attributes of the operator besides the grid."""
        return {}

    def single(self, F, data, mode, params):
        """The forward pass as the operator of the tier that runs."""
        return ops.fake_quantize(F, ops.name(self.role), self.operands(F, data, mode, params), method=self.fused,
                                 qmin=self.grid.qmin, qmax=self.grid.qmax, signed=self.grid.signed,
                                 gate=self.grad_mode == 'clip', **self.fused_options())

    def operands(self, F, data, mode, params):
        """The inputs of the fused operator by name.

        The extension interface overwrites gradients that it should add to: of Parameters and inputs with
        ``grad_req='add'``, and of a tensor that eight or more operators read. An identity in front does add; the layout
        tier needs none.
        """
        tensors = {'data': data, 'mode': mode, **params}
        if ops.in_layout():
            return tensors
        return {name: self._guarded(F, value) if name == 'data' or self._is_trainable(name) else value
                for name, value in tensors.items()}

    def _guarded(self, F, value):
        # MXNet would merge the identities of several quantizers, were they equal.
        own = {} if isinstance(value, nd.NDArray) else {'attr': {'__reader__': self.name}}
        return F.identity(value, **own)

    def _is_trainable(self, name):
        return name in self._reg_params and self._reg_params[name].trainable
