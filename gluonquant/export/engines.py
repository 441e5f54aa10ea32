"""How each inference engine wants its graph written."""
from dataclasses import dataclass

from .values import Grid


@dataclass(frozen=True)
class Engine:
    """An engine that reads ONNX.

    Parameters
    ----------
    name : str
    signed, unsigned : str
        Types of the codes of activations on signed and on unsigned grids.
    moves_codes : bool
        Max pooling, concatenation, reshape and the like stand between codes. Otherwise they stand behind
        DequantizeLinear, and the engine sees by itself that they keep the grid.
    clips_codes : bool
        Grids narrower than their type are clipped as codes. Otherwise as real numbers, in front of QuantizeLinear.
    integer_bias : bool
        Biases are int32 codes behind DequantizeLinear.
    explicit : bool
        Quantizers of activations stand in the graph. Otherwise the engine is told their ranges, which have to be those
        of 8 symmetric bits.
    deep_stem : bool
        See `stem`.
    dense_points : bool
        A convolution that sees one place is written as a dense layer.
    quantizes_weights : bool
        The engine makes integers of float weights whose input is quantized, unless it is kept from it.
    """
    name: str
    signed: str
    unsigned: str
    moves_codes: bool
    clips_codes: bool
    integer_bias: bool
    explicit: bool = True
    deep_stem: bool = False
    dense_points: bool = False
    quantizes_weights: bool = False

    def grid(self, path, quantizer):
        """The `Grid` of an activation quantizer; ValueError says why the engine has none for it."""
        scale, zero_point = (values[0] for values in quantizer.qparams())
        own = quantizer.grid
        dtype = self.signed if own.qmin < 0 else self.unsigned
        lowest, highest = {'uint8': (0, 255), 'int8': (-128, 127)}[dtype]
        shift = 128 if dtype == 'uint8' and own.qmin < 0 else 0
        low, high = own.qmin + shift, own.qmax + shift
        if low < lowest or high > highest:
            raise ValueError(
                f'its codes, {quantizer.method} of {own.bits} bits, reach from {own.qmin} to {own.qmax}, which {dtype} '
                'does not hold. ' + ('Quantize to at most 8 bits' if own.bits > 8 else
                                     f'Attach with target={self.name!r}, so that codes are signed'))
        encoder = quantizer.encoder() if hasattr(quantizer, 'encoder') else None
        if not self.explicit and (own.bits != 8 or zero_point or encoder):
            raise ValueError(f'{quantizer.method} of {own.bits} bits is no symmetric 8-bit grid, and a range tells no '
                             "other. Attach with bits=8, method='int8', target='tensorrt'")
        return Grid(path, scale, int(zero_point) + shift, low, high, dtype, encoder)


ENGINES = {engine.name: engine for engine in (
    Engine('onnxruntime', 'uint8', 'uint8', moves_codes=True, clips_codes=True, integer_bias=True, deep_stem=True,
           dense_points=True, quantizes_weights=True),
    Engine('openvino', 'int8', 'uint8', moves_codes=False, clips_codes=True, integer_bias=True),
    Engine('tensorrt', 'int8', 'int8', moves_codes=False, clips_codes=False, integer_bias=False))}
PLAIN = Engine('tensorrt', 'int8', 'int8', moves_codes=False, clips_codes=False, integer_bias=False, explicit=False)
