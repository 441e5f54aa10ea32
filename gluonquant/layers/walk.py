"""Finding blocks in a net by their path."""
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


def layers(net):
    """{path: layer} of the quantized layers of ``net``."""
    return {path: block for path, block in named_blocks(net) if isinstance(block, QuantizedLayer)}


def quantizers(net, role=None):
    """{path: quantizer} of ``net``, one entry for a shared one; ``role``: 'weight' or 'activation' only."""
    return {path: block for path, block in named_blocks(net)
            if isinstance(block, (Quantizer, Identity)) and role in (None, block.role)}
