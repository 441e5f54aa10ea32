"""Integer grids: which codes an n-bit tensor may hold. Pure Python."""
from dataclasses import dataclass
from numbers import Integral

MAX_BITS = 16


def check_bits(bits, where='bits', least=1):
    """Return ``bits`` if it is an integer in [least, 16], else raise ValueError with ``where`` in front."""
    if isinstance(bits, bool) or not isinstance(bits, Integral) or not least <= bits <= MAX_BITS:
        raise ValueError(f'{where}={bits!r} is not a bit width: pass an integer from {least} to {MAX_BITS}')
    return int(bits)


@dataclass(frozen=True)
class Grid:
    """The integer codes of an n-bit tensor: at most ``2**bits`` of them, ``qmin`` to ``qmax`` inclusive.

    ======================= ========================== =============
    grid                    codes                      levels
    ======================= ========================== =============
    signed, narrow_range    -Q .. Q, Q = 2**(n-1) - 1  2**n - 1
    signed                  -2**(n-1) .. 2**(n-1) - 1  2**n
    unsigned                0 .. 2**n - 1              2**n
    midrise                 odd integers, +-(2**n - 1) 2**n
    ======================= ========================== =============

    Parameters
    ----------
    bits : int, 1 to 16
    signed : bool
        Codes on both sides of zero.
    narrow_range : bool
        Symmetric signed codes, without the lowest one.
    midrise : bool
        Odd codes only, so that 0 is not a level; needs a container of ``bits + 1`` bits.

    Raises
    ------
    ValueError
        A bit width outside 1..16, or a narrow signed grid with one bit (its only code would be 0).
    """
    bits: int
    signed: bool = True
    narrow_range: bool = False
    midrise: bool = False

    def __post_init__(self):
        check_bits(self.bits)
        if self.bits == 1 and self.signed and self.narrow_range:
            raise ValueError('bits=1 leaves a narrow signed grid with the single code 0: pass bits >= 2')

    @property
    def steps(self):
        """L = 2**bits - 1, the number of steps between the lowest and the highest of 2**bits levels."""
        return 2 ** self.bits - 1

    @property
    def qmin(self):
        if not self.signed:
            return 0
        if self.midrise:
            return -self.steps
        return -2 ** (self.bits - 1) + (1 if self.narrow_range else 0)

    @property
    def qmax(self):
        if self.midrise or not self.signed:
            return self.steps
        return 2 ** (self.bits - 1) - 1

    @property
    def levels(self):
        """How many codes there are."""
        return self.qmax - self.qmin + 1 if not self.midrise else 2 ** self.bits

    @property
    def dtype(self):
        """Name of the smallest NumPy integer type that holds every code."""
        name = 'int' if self.qmin < 0 else 'uint'
        for width in (8, 16, 32):
            reach = 2 ** (width - 1) if self.qmin < 0 else 2 ** width
            if self.qmax < reach and -self.qmin <= reach:
                return f'{name}{width}'
        raise AssertionError('a grid of at most 16 bits fits 32')
