"""`ranges` and `clipped`: what each quantizer represents, and how much of its tensor lies outside."""
from mxnet import nd

from .calibrate import check_batches, infer, observed
from .layers import quantizers

_TOLERANCE = 0.01       # of a step: scales are rounded, too


def ranges(net):
    """{quantizer path: (lowest, highest)} representable value of every quantizer that has a range; floats.

    Of a weight with several scales: the widest. Reading changes nothing.
    """
    found = {}
    for path, quantizer in _with_range(net).items():
        low, high = _bounds(quantizer, quantizer.source if quantizer.role == 'weight' else None)
        found[path] = float(low.min()), float(high.max())
    return found


def clipped(net, loader, batches=1, *, forward=None):
    """How much of each quantized tensor is clipped: {quantizer path: share in 0..1} of elements beyond its range.

    The net runs as it is, unhybridized and in inference mode; what was hybridized is so again afterwards.

    Parameters
    ----------
    net : Block, converted or attached
    loader : iterable of batches, as for `calibrate`
    batches : int or None
        How many to take; None = all.
    forward : callable(net, batch), optional

    Raises
    ------
    ValueError
        The loader gave no batch, or `batches` is no number of batches.
    """
    check_batches(batches)
    counts = {}
    with observed({quantizer: _count(path, quantizer, counts) for path, quantizer in _with_range(net).items()}):
        infer(net, loader, batches, forward, 'count')
    return {path: outside / total for path, (outside, total) in counts.items()}


def _with_range(net):
    return {path: quantizer for path, quantizer in quantizers(net).items()
            if quantizer.grid is not None and quantizer.calibrated
            and (quantizer.role == 'activation' or quantizer.source is not None)}


def _bounds(quantizer, x):
    """Lowest and highest representable value of each row, arrays (rows,)."""
    scale, zero_point = quantizer._levels(x)
    return scale * (quantizer.grid.qmin - zero_point), scale * (quantizer.grid.qmax - zero_point)


def _count(path, quantizer, counts):
    original = quantizer.forward

    def forward(x):
        if isinstance(x, nd.NDArray):
            rows = quantizer.rows(nd, x.astype('float32'))
            low, high = (nd.array(bound).reshape(-1, 1).as_in_context(x.context)
                         for bound in _bounds(quantizer, x if quantizer.role == 'weight' else None))
            margin = _TOLERANCE * (high - low) / (quantizer.grid.qmax - quantizer.grid.qmin)
            outside = (nd.broadcast_lesser(rows, low - margin) + nd.broadcast_greater(rows, high + margin)).sum()
            before = counts.get(path, (0, 0))
            counts[path] = before[0] + int(outside.asscalar()), before[1] + x.size
        return original(x)
    return forward
