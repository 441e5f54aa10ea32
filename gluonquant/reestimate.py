"""`reestimate_batchnorm`: running statistics anew, from data."""
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from mxnet import nd
from mxnet.gluon import Block, Parameter

from .calibrate import check_batches, infer
from .graph import GraphNet
from .layers import FoldedBatchNorm, named_blocks
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
    check_batches(batches)
    norms = _norms(net)
    if not norms:
        raise ValueError(f'{type(net).__name__} has no BatchNorm with statistics of its own')
    # One BatchNorm may stand in several places of a graph.
    moments = {id(norm.mean): _Moments() for norm in norms}
    seen = {norm.place: moments[id(norm.mean)] for norm in norms}
    with _watching(net, seen):
        infer(net, loader, batches, forward, 'estimate from')
    values = [(norm, *seen[norm.place].result()) for norm in norms if seen[norm.place].count]
    for norm, mean, var in values:
        if not (np.isfinite(mean).all() and np.isfinite(var).all()):
            raise ValueError(f'{norm.name}: the statistics are not finite. Go back to an earlier checkpoint')
    for norm, mean, var in values:
        norm.mean.set_data(nd.array(mean, dtype=norm.mean.dtype))
        norm.var.set_data(nd.array(var, dtype=norm.var.dtype))
    return net


class _Moments:
    """The mean over batches of mean and variance, the variance of the batches' means included."""

    def __init__(self):
        self.count, self._mean, self._square = 0, 0, 0

    def update(self, mean, var):
        mean, var = (array.asnumpy().astype('float64') for array in (mean, var))
        self.count += 1
        self._mean = self._mean + mean
        self._square = self._square + (var + mean ** 2)

    def result(self):
        mean = self._mean / self.count
        return mean, self._square / self.count - mean ** 2


class _Norm(NamedTuple):
    """A BatchNorm with statistics of its own: its name, the block or node, the Parameters."""
    name: str
    place: Any
    mean: Parameter
    var: Parameter


def _norms(net):
    found = [_Norm(path, block, block.running_mean, block.running_var) for path, block in batchnorms(net).items()
             if not isinstance(block, FoldedBatchNorm)]
    for path, block in named_blocks(net):
        if isinstance(block, GraphNet):
            for node in block.graph.nodes():
                if node.op == 'BatchNorm':
                    name = '.'.join(filter(None, (path, block.label(node))))
                    found.append(_Norm(name, node, *(block.parameter(entry.node.name) for entry in node.inputs[3:5])))
    return found


@contextmanager
def _watching(net, seen):
    """Let every BatchNorm normalize by the batch and show its statistics; undone on the way out."""
    graphs = [block for _, block in named_blocks(net) if isinstance(block, GraphNet)]
    blocks = [place for place in seen if isinstance(place, Block)]
    try:
        for block in blocks:
            block.forward = _block_forward(block, seen[block])
        for graph in graphs:
            graph._run = _graph_run(graph._run, seen)
        yield
    finally:
        for block in blocks:
            del block.forward
        for graph in graphs:
            del graph._run


def _block_forward(block, moments):
    def forward(x):
        gamma, beta = (parameter.data(x.context) for parameter in (block.gamma, block.beta))
        axis = block._kwargs.get('axis', 1)
        settings = {name: block._kwargs[name] for name in ('eps', 'fix_gamma')}
        out = nd.BatchNorm(x, gamma, beta, *_statistics(x, axis, moments), use_global_stats=True, axis=axis, **settings)
        return nd.relu(out) if getattr(block, 'fuse_relu', False) else out
    return forward


def _graph_run(run, nodes):
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
