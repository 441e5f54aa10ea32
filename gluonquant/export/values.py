"""Tensors while a graph is written: real, on a grid as codes, or not written yet because that depends on the reader."""
from typing import Any, Callable, NamedTuple, Optional, Tuple


class Grid(NamedTuple):
    """Codes of a tensor in their container, an integer type: x = scale * (code - zero_point), low <= code <= high.

    ``encoder`` : (offset, scale) if codes are made of (x - offset) / scale, as QIL does.
    ``path`` : of the quantizer.
    """
    path: str
    scale: Any
    zero_point: int
    low: int
    high: int
    dtype: str
    encoder: Optional[Tuple[float, Any]] = None


class Real(NamedTuple):
    """A float32 tensor of this name; ``grid``: the one its values are known to lie on."""
    name: str
    grid: Optional[Grid] = None


class Codes(NamedTuple):
    """An integer tensor of this name."""
    name: str
    grid: Grid


class Moved(NamedTuple):
    """What an operator makes that moves or selects elements, of codes as of real numbers.

    ``write(name, sources, grid)`` writes it as ``name``, on tensors of the names ``sources``, codes of ``grid`` or, if
    that is None, real ones; it returns the name.
    """
    name: str
    sources: Tuple[Any, ...]
    write: Callable


class Clamped(NamedTuple):
    """min(max(source, low), high); a bound may be None."""
    name: str
    source: Any
    low: Optional[float]
    high: Optional[float]
