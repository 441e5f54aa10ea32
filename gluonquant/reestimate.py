"""`reestimate_batchnorm`: running statistics anew, from data."""
from contextlib import contextmanager
from itertools import islice

from mxnet import autograd, nd

from .calibrate import batch_tensor
from .graph import GraphNet
from .layers import FoldedBatchNorm, named_blocks, unhybridized
from .switches import batchnorms
from .symbol_graph import invoke


def reestimate_batchnorm(net, loader, batches=20, *, forward=None):
    """Set the running statistics of every BatchNorm to those of ``batches`` batches; returns net.

    Running averages follow weights that change and forget; after fine-tuning at few bits this gives statistics of the
    final weights, all batches weighing alike. Each BatchNorm normalizes by the batch, as in training, while quantizers
    quantize and everything else, Dropout for example, is as in inference. A BatchNorm that was folded keeps its
    statistics: they are part of a weight whose range is known.

    Parameters
    ----------
    net : Block, float, converted or attached
    loader : iterable of batches, as for `calibrate`
    batches : int or None
        How many to take; None = all.
    forward : callable(net, batch), optional
        How to run a batch, for nets with several inputs.

    Raises
    ------
    ValueError
        No BatchNorm, an empty loader, or statistics that are not finite (named); the net is then as it was.
    """
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ValueError(f'batches={batches!r}: pass a number of batches >= 1, or None for all')
    norms = _norms(net)
    if not norms:
        raise ValueError(f'{type(net).__name__} has no BatchNorm with statistics of its own')
    seen = {name: _Moments() for name in norms}
    count = 0
    with unhybridized(net), _watching(net, norms, seen), autograd.pause(train_mode=False):
        for batch in islice(loader, batches):
            count += 1
            if forward is not None:
                forward(net, batch)
            else:
                net(batch_tensor(batch, net))
    if not count:
        raise ValueError('the loader gave no batch: nothing to estimate from')
    values = {name: moments.result() for name, moments in seen.items() if moments.count}
    for name, (mean, var) in values.items():
        if not bool(((mean.abs() < 3e38) * (var.abs() < 3e38)).min().asscalar()):
            raise ValueError(f'{name}: the statistics are not finite. Go back to an earlier checkpoint')
    for name, (mean, var) in values.items():
        running_mean, running_var = norms[name][1]
        running_mean.set_data(mean)
        running_var.set_data(var)
    return net


class _Moments:
    """The mean over batches of mean and variance, the variance of the batches' means included."""

    def __init__(self):
        self.count, self._mean, self._square = 0, 0, 0

    def update(self, mean, var):
        self.count += 1
        self._mean = self._mean + mean.astype('float64')
        self._square = self._square + (var + nd.square(mean)).astype('float64')

    def result(self):
        mean = self._mean / self.count
        return mean.astype('float32'), (self._square / self.count - nd.square(mean)).astype('float32')


def _norms(net):
    """{name: (block or node, (running mean, running variance))} of every BatchNorm with statistics of its own."""
    found = {path: (block, (block.running_mean, block.running_var)) for path, block in batchnorms(net).items()
             if not isinstance(block, FoldedBatchNorm)}
    for _, block in named_blocks(net):
        if isinstance(block, GraphNet):
            found.update((block.label(node), (node, tuple(block.parameter(entry.node.name) for entry in
                                                          node.inputs[3:5])))
                         for node in block.graph.nodes() if node.op == 'BatchNorm')
    return found


@contextmanager
def _watching(net, norms, seen):
    """Let every BatchNorm normalize by the batch and show its statistics; undone on the way out."""
    nodes = {norm: seen[name] for name, (norm, _) in norms.items()}
    graphs = [block for _, block in named_blocks(net) if isinstance(block, GraphNet)]
    blocks = [norm for norm, _ in norms.values() if hasattr(norm, 'forward')]
    try:
        for block in blocks:
            block.forward = _block_forward(block, nodes[block])
        for graph in graphs:
            graph._run = _graph_run(graph, graph._run, nodes)
        yield
    finally:
        for block in blocks:
            del block.forward
        for graph in graphs:
            del graph._run


def _block_forward(block, moments):
    def forward(x):
        gamma, beta = (parameter.data(x.context) for parameter in (block.gamma, block.beta))
        mean, var = _statistics(x, block._kwargs['axis'], moments)
        return nd.BatchNorm(x, gamma, beta, mean, var, **{**block._kwargs, 'use_global_stats': True})
    return forward


def _graph_run(graph, run, nodes):
    def watched(F, node, inputs):
        if node not in nodes or F is not nd:
            return run(F, node, inputs)
        statistics = _statistics(inputs[0], int(node.attrs.get('axis', 1)), nodes[node])
        fixed = type(node)(node.op, node.name, {**node.attrs, 'use_global_stats': 'True'}, node.inputs, [])
        return invoke(F, fixed, [*inputs[:3], *statistics])
    return watched


def _statistics(x, axis, moments):
    mean = nd.mean(x, axis=axis, exclude=True)
    shape = [1] * x.ndim
    shape[axis] = -1
    var = nd.mean(nd.square(nd.broadcast_sub(x, mean.reshape(shape))), axis=axis, exclude=True)
    moments.update(mean, var)
    return mean, var
