"""What is decided about a net before it changes: frozen, comparable, to and from plain dicts."""
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Dict, Optional

PLAN_VERSION = 1


@dataclass(frozen=True)
class QuantizerSpec:
    """The arguments of one `quantizers.create` call, but for role and axis.

    ``signed=None`` in a `Rule` or in `convert` means: unsigned where the input is provably never negative.
    """
    method: str
    bits: int
    signed: Optional[bool] = None
    per_channel: Optional[bool] = None
    options: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """Other settings for the layers whose path matches ``pattern``; None keeps what applied before.

    Parameters
    ----------
    pattern : str
        Shell pattern on the layer's path in the net (``'features.4.*'``); also matches everything below it.
    bits : int, optional
        Both ``weight_bits`` and ``activation_bits``, unless those are given.
    weight, activation : str, optional
        Method names; ``'none'`` leaves that tensor float.
    weight_options, activation_options : dict, optional
        Options of the methods, merged into those that applied before unless the method changes.
    """
    pattern: str
    bits: Optional[int] = None
    weight: Optional[str] = None
    activation: Optional[str] = None
    weight_bits: Optional[int] = None
    activation_bits: Optional[int] = None
    per_channel: Optional[bool] = None
    signed: Optional[bool] = None
    weight_options: Optional[Dict[str, Any]] = None
    activation_options: Optional[Dict[str, Any]] = None

    def matches(self, path):
        """Whether the rule applies to the layer at ``path``."""
        return matches(self.pattern, path)

    def apply(self, config, start=lambda role, method, bits: QuantizerSpec(method, bits)):
        """``config`` with this rule's settings.

        ``start(role, method, bits)`` makes the QuantizerSpec that a change of method begins with.
        """
        changed = {}
        for role, method, bits, options, flags in (
                ('weight', self.weight, self.weight_bits, self.weight_options, {'per_channel': self.per_channel}),
                ('activation', self.activation, self.activation_bits, self.activation_options,
                 {'signed': self.signed})):
            spec = getattr(config, role)
            bits = self.bits if bits is None else bits
            bits = spec.bits if bits is None else bits
            if method is None or method == spec.method:
                spec = replace(spec, bits=bits)
            else:
                spec = replace(start(role, method, bits), signed=spec.signed)
            changed[role] = replace(spec, options={**spec.options, **(options or {})},
                                    **{name: value for name, value in flags.items() if value is not None})
        return replace(config, **changed)


def matches(pattern, path):
    """Whether the shell pattern fits ``path`` or one of the blocks it lies in."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, pattern + '.*')


@dataclass(frozen=True)
class LayerConfig:
    """How one layer is quantized.

    Parameters
    ----------
    weight, activation : QuantizerSpec
    gradient_bits : int, optional
        Quantize the gradient of the layer's output (DoReFa, third part).
    input_uses : int
        How often the layer reads that one tensor in a forward pass.
    batchnorm : str, optional
        Path of the BatchNorm that `fold` put into the layer.
    fold : 'folded', 'merged' or 'scaled', optional
        What became of it: computed with the layer; part of weight and bias; part of the bias and of a factor behind the
        weight quantizer.
    shares_input_with : str, optional
        Path of the layer whose input quantizer this one uses, because both read the same tensor.
    """
    weight: QuantizerSpec
    activation: QuantizerSpec
    gradient_bits: Optional[int] = None
    shares_input_with: Optional[str] = None
    input_uses: int = 1
    batchnorm: Optional[str] = None
    fold: Optional[str] = None

    def to_dict(self):
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The inverse of `to_dict`."""
        return cls(**{**values, 'weight': QuantizerSpec(**values['weight']),
                      'activation': QuantizerSpec(**values['activation'])})
