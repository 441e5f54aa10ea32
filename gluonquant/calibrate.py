"""`calibrate`: run batches through the float net, watch every input of a quantized layer, set the ranges."""
import json
import logging
import math
import os
from contextlib import contextmanager
from itertools import islice

from mxnet import autograd, nd

from . import observers
from .layers import layers, quantizers, unhybridized
from .registry import nearest

_OUTPUT = '.output_quantizer'
_log = logging.getLogger(__name__)


def calibrate(net, loader, batches=10, *, observer=None, table=None, forward=None):
    """Set every range of a converted net from data.

    The net runs unhybridized, in inference mode and without any quantization; what was hybridized is so again
    afterwards. Ranges of weights (LSQ, QIL) are set from the present weights. A range that several tensors share and
    that would follow the data in training (int8, affine, GDRQ; see `Target`) is that of all of them, and is frozen.

    Parameters
    ----------
    net : Block, converted
    loader : iterable of batches
        Each a tensor, or a sequence or DataBatch whose first element is the tensor (labels are not used).
    batches : int or None
        How many to take; None = all. 100 to 1000 images in all are enough.
    observer : str, optional
        'minmax', 'ema', 'percentile', 'mse' or 'kl' for all inputs; None = each method's own choice.
    table : dict or str, optional
        {layer path, or name of a tensor of an attached net: amax or (lo, hi)}, or a JSON file with that: ranges known
        from elsewhere; these layers' data are not used. What this function returns is such a table.
    forward : callable(net, batch), optional
        How to run a batch, for nets with several inputs.

    Returns
    -------
    dict
        {quantizer path: (lo, hi)}, the range of each input quantizer that saw data.

    Raises
    ------
    ValueError
        No quantized layer, an empty loader, NaN or Inf in the data (the layer is named), an unknown observer or
        table entry. The net is then as it was.
    """
    if not quantizers(net):
        raise ValueError(f'{type(net).__name__} has no quantizer: call gq.convert(net) or gq.attach(net) first')
    check_batches(batches)
    inputs = _inputs(net)
    watching = {path: quantizer.observer(observer) for path, quantizer in inputs.items()}
    fixed = _from_table(table or {}, net, inputs)
    watching.update(fixed)

    watched = {inputs[path]: (path, seen) for path, seen in watching.items() if path not in fixed}
    shown = {}      # what each quantizer has been shown of the present batch
    with observed({quantizer: _look(quantizer, *watched.get(quantizer, (None, None)), shown)
                   for quantizer in quantizers(net).values()}):
        infer(net, loader, batches, forward, 'calibrate with', lambda: _show_joint(watched, shown))

    unseen = [path for path, seen in watching.items() if not seen.count]
    if unseen:
        _log.warning('no data reached %s: still without a range', ', '.join(unseen))
    values = [(inputs[path], inputs[path].initial(seen)) for path, seen in watching.items() if seen.count]
    values += [(quantizer, quantizer.initial(quantizer.source)) for quantizer in quantizers(net, 'weight').values()
               if quantizer.grid is not None]
    for quantizer, initial in values:
        quantizer.write(**initial)
    for quantizer in inputs.values():
        if quantizer.tensors[1:] and quantizer.follows and quantizer.calibrated:
            quantizer.freeze()      # in training its average would follow one tensor after the other
    empty = [path for path, seen in watching.items() if seen.count and not inputs[path].calibrated]
    if empty:
        _log.warning('only zeros reached %s: still without a range', ', '.join(empty))
    return {path: inputs[path].affine_bounds() for path, seen in watching.items() if seen.count and path not in empty}


def set_ranges(net, table):
    """Set the ranges that ``table`` gives, as for `calibrate`, without any data."""
    inputs = _inputs(net)
    fixed = _from_table(table, net, inputs)
    for quantizer, initial in [(inputs[path], inputs[path].initial(seen)) for path, seen in fixed.items()]:
        quantizer.write(**initial)


def _inputs(net):
    return {path: quantizer for path, quantizer in quantizers(net, 'activation').items() if quantizer.grid is not None}


def _from_table(table, net, inputs):
    if isinstance(table, (str, os.PathLike)):
        with open(table, encoding='utf8') as file:
            table = json.load(file)
    paths = {quantizer: path for path, quantizer in inputs.items()}
    known = {**inputs, **{path: layer.input_quantizer for path, layer in layers(net).items()},
             **{path[:-len(_OUTPUT)]: quantizer for path, quantizer in inputs.items() if path.endswith(_OUTPUT)},
             **{name: quantizer for quantizer in inputs.values() for name in quantizer.tensors}}
    fixed = {}
    for name, value in table.items():
        if name not in known:
            raise ValueError(f'table names {name!r}, which is no quantized layer or tensor.{nearest(name, known)}')
        quantizer = known[name]
        several = [path for path, one in inputs.items() if name in one.tensors]
        if several[1:] and name not in inputs:
            raise ValueError(f'table names {name!r}, a tensor in {len(several)} graphs: name one of {several}')
        if quantizer.grid is None:
            raise ValueError(f'table names {name!r}, whose input is not quantized')
        seen = observers.create('minmax')
        seen.update(nd.array(_range(name, value, quantizer.grid.signed)))
        fixed[paths[quantizer]] = seen
    return fixed


def _range(path, value, signed):
    """A table entry as [lo, hi]."""
    try:
        low, high = value if isinstance(value, (tuple, list)) else (-value if signed else 0.0, value)
        low, high = float(low), float(high)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not -math.inf < low < high < math.inf:
        raise ValueError(f'table gives {path!r} the range {value!r}: pass a positive amax, or (lo, hi) with lo < hi')
    return [low, high]


def check_batches(batches):
    """ValueError unless ``batches`` is a number of batches or None."""
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ValueError(f'batches={batches!r}: pass a number of batches >= 1, or None for all')


def infer(net, loader, batches, forward, purpose, after=lambda: None):
    """Run batches through ``net``, unhybridized and for inference; ``after()`` each. ValueError if there is none."""
    empty = True
    with unhybridized(net), autograd.pause(train_mode=False):
        for batch in islice(loader, batches):
            empty = False
            forward(net, batch) if forward is not None else net(batch_tensor(batch, net))
            after()
    if empty:
        raise ValueError(f'the loader gave no batch: nothing to {purpose}')


@contextmanager
def observed(forwards):
    """Give every quantizer of {quantizer: forward} that forward for a while."""
    try:
        for quantizer, forward in forwards.items():
            quantizer.forward = forward
        yield
    finally:
        for quantizer in forwards:
            del quantizer.forward


def _look(quantizer, path, observer, shown):
    """A forward that passes x on after showing it to the observer; symbols (shape inference) go the usual way."""
    original = quantizer.forward

    def forward(x):
        if not isinstance(x, nd.NDArray):
            return original(x)
        if observer is not None and not any(x is other for other in shown.get(quantizer, ())):
            # Layers that share the quantizer bring the same tensor; tensors that share it are observed as one.
            several = bool(quantizer.tensors[1:])
            shown[quantizer] = [*(shown.get(quantizer, ()) if several else ()), x]
            if not several:
                _update(observer, x, path)
        # In inference a convolution puts the array it reads its weight from into a layout of its own, for good, and
        # every optimizer step from then on reorders it twice: it gets a copy.
        return x if quantizer.role == 'activation' else x * 1
    return forward


def _show_joint(watched, shown):
    """What quantizers of several tensors have been shown of one batch goes to their observers, and is forgotten."""
    for quantizer, tensors in shown.items():
        if quantizer.tensors[1:]:
            path, observer = watched[quantizer]
            _update(observer, nd.concat(*(x.reshape(-1) for x in tensors), dim=0), path)
    shown.clear()


def _update(observer, x, path):
    try:
        observer.update(x)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def batch_tensor(batch, net):
    """The tensor of a batch, where the net's Parameters are."""
    data = getattr(batch, 'data', batch) if not isinstance(batch, nd.NDArray) else batch
    while isinstance(data, (list, tuple)):
        data = data[0]
    if not isinstance(data, nd.NDArray):
        data = nd.array(data)
    contexts = next((p.list_ctx() for p in net.collect_params().values() if p._data is not None), [data.context])
    return data.as_in_context(contexts[0])
