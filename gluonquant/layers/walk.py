"""Finding blocks in a net by their path."""
from contextlib import contextmanager

from mxnet.gluon import HybridBlock

from ..quantizers import Identity, Quantizer
from .base import QuantizedLayer


def named_blocks(net):
    """Yield (path, block) of ``net`` and everything below it; a block that stands in several places once."""
    seen = set()

    def walk(path, block):
        if id(block) in seen:
            return
        seen.add(id(block))
        yield path, block
        for name, child in block._children.items():
            yield from walk(f'{path}.{name}' if path else name, child)
    yield from walk('', net)


@contextmanager
def unhybridized(net):
    """Run block by block for a while."""
    hybrid = [block for _, block in named_blocks(net) if isinstance(block, HybridBlock) and block._active]
    try:
        for block in hybrid:
            block._active = False
        yield
    finally:
        for block in hybrid:
            block._active = True


def layers(net):
    """{path: layer} of the quantized layers of ``net``."""
    return {path: block for path, block in named_blocks(net) if isinstance(block, QuantizedLayer)}


def quantizers(net, role=None):
    """{path: quantizer} of ``net``, one entry for a shared one; ``role``: 'weight' or 'activation' only."""
    return {path: block for path, block in named_blocks(net)
            if isinstance(block, (Quantizer, Identity)) and role in (None, block.role)}
