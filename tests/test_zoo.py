"""Every classification net of both model zoos goes through the whole life of a quantized net."""
import gc
import os

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon, nd

import gluonquant as gq
from gluonquant.fuse import fused
from zoo import ZOO, build, entry_id


def outputs(out):
    return list(out) if isinstance(out, (list, tuple)) else [out]


def run(net, x):
    return [out.asnumpy() for out in outputs(net(x))]


def settle_statistics(net, x):
    """Give BatchNorm running statistics of x, as training would; with the initial ones deep random nets overflow."""
    norms = [block for _, block in gq.layers.named_blocks(net) if isinstance(block, gluon.nn.BatchNorm)]
    momenta = [norm._kwargs['momentum'] for norm in norms]
    for norm in norms:
        norm._kwargs['momentum'] = 0.0
    with autograd.record():
        loss = sum(out.mean() for out in outputs(net(x)))
    loss.backward()             # MXNet writes running statistics in the backward pass
    for norm, momentum in zip(norms, momenta):
        norm._kwargs['momentum'] = momentum


def pooled_by_mean(net):
    """The hybridized float ``net`` with the one rewriting of converted nets that moves last bits: global average
    pooling becomes a mean. The untrained nets here amplify a difference of 1e-7 to any size."""
    out = mx.sym.Group(outputs(net(mx.sym.var('data'))))
    pooled = gluon.SymbolBlock(fused(out), mx.sym.var('data'), net.collect_params())
    pooled.hybridize()
    return pooled


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    # Searching a graph for common subexpressions takes time quadratic in its size: minutes for the deepest nets.
    monkeypatch.setenv('MXNET_ELIMINATE_COMMON_EXPR', '0')
    yield
    gc.collect()


@pytest.mark.parametrize('entry', [pytest.param(entry, id=entry_id(entry), marks=[] if entry.fast else pytest.mark.slow)
                                   for entry in ZOO])
def test_net_converts_loads_calibrates_and_trains(entry, tmp_path):
    trains = entry.train or os.environ.get('MXNET_MKLDNN_ENABLED') == '0'    # see zoo.py
    mx.random.seed(0)
    np.random.seed(0)
    x = nd.array(np.random.RandomState(1).uniform(-1, 1, (2, 3, entry.size, entry.size)))
    float_net = build(entry)
    float_net.initialize(mx.init.Xavier(), force_reinit=True)
    if trains:
        settle_statistics(float_net, x)
    expected = run(pooled_by_mean(float_net), x)
    checkpoint = str(tmp_path / 'float.params')
    float_net.save_parameters(checkpoint)
    del float_net

    net = gq.convert(build(entry), bits=4)
    net.load_parameters(checkpoint, allow_missing=True)
    gq.calibrate(net, [x])
    assert all(row.calibrated == 'yes' for row in gq.summary(net).rows)

    net.hybridize()
    gq.set_mode(net, 'off')
    for out, reference in zip(run(net, x), expected):
        assert np.array_equal(out, reference)       # no quantization: that float net bit for bit

    gq.set_mode(net, 'quantize')
    quantized = run(net, x)
    assert any(not np.array_equal(out, reference) for out, reference in zip(quantized, expected))
    if not trains:
        return
    parameters = net.collect_params()
    trainer = gluon.Trainer(parameters, 'sgd', {'learning_rate': 1e-3}, kvstore=None)
    with autograd.record():
        loss = sum((out ** 2).mean() for out in outputs(net(x)))
    loss.backward()
    for name, parameter in parameters.items():
        if parameter.grad_req != 'null':
            assert np.isfinite(parameter.grad().asnumpy()).all(), name
    trainer.step(2)
    assert np.isfinite(loss.asscalar())
