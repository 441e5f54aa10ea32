"""How long it takes until a converted net trains, against its depth: does anything grow faster than linearly?

    OMP_NUM_THREADS=1 python benchmarks/convert.py --output results/convert.json

Seconds of `convert`, `calibrate` with one small batch, the first hybridized forward pass (which traces the net and
plans its memory) and the first training step (which makes the backward graph), for a net that has run once. Behind
each figure the exponent of its growth since the net before: 1 is linear, 2 quadratic. MXNet looks for common
subexpressions when a graph is made, unless MXNET_ELIMINATE_COMMON_EXPR is 0: one process measures with, one without.
"""
import argparse
import math
import os
import statistics
import time
from itertools import product

import mxnet as mx
from common import in_own_process, machine, save, tiers
from gluoncv.model_zoo import get_model
from mxnet import autograd, nd
from mxnet.gluon import nn

import gluonquant as gq

STAGES = ('convert', 'calibrate', 'forward', 'step')


def measure_once(model, tier, method):
    """{stage: seconds} for a new net, and how many layers it has; the tier 'float' converts nothing."""
    net = get_model(model, classes=10)
    net.initialize(mx.init.Xavier())
    data = nd.random.uniform(-1, 1, shape=(4, 3, 32, 32))
    net(data).wait_to_read()
    layers = []
    net.apply(lambda block: layers.append(block) if isinstance(block, (nn.Conv2D, nn.Dense)) else None)
    seconds = {}

    def timed(stage, function):
        start = time.perf_counter()
        function()
        nd.waitall()
        seconds[stage] = time.perf_counter() - start

    def train():
        with autograd.record():
            loss = net(data).sum()
        loss.backward()

    if tier != 'float':
        gq.ops.use(tier)
        timed('convert', lambda: gq.convert(net, method=method))
        timed('calibrate', lambda: gq.calibrate(net, [data]))
    net.hybridize(static_alloc=True, static_shape=True)
    timed('forward', lambda: net(data))
    timed('step', train)
    return seconds, len(layers)


def measure(models, tiers, method, repeats):
    """A dict for each model and tier: medians of the stages. What the process does for the first time is left out."""
    for tier in tiers:
        measure_once(models[0], tier, method)
    rows = []
    for tier, model in product(tiers, models):
        runs, layers = zip(*(measure_once(model, tier, method) for _ in range(repeats)))
        seconds = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES if stage in runs[0]}
        rows.append({'model': model, 'layers': layers[0], 'tier': tier, 'seconds': seconds})
    return rows


def add_growth(rows):
    """Write into each row how its seconds have grown since the net before it, of the same tier."""
    for before, row in zip([None, *rows], rows):
        deeper = before is not None and before['tier'] == row['tier'] and row['layers'] > before['layers']
        row['growth'] = {stage: math.log(row['seconds'][stage] / before['seconds'][stage])
                         / math.log(row['layers'] / before['layers']) for stage in row['seconds'] if deeper}


def show(row):
    line = f'{row["eliminate_common_expr"]:<5}{row["tier"]:10}{row["model"]:20}{row["layers"]:6}'
    for stage in STAGES:
        seconds, growth = row['seconds'].get(stage), row['growth'].get(stage)
        line += f'{seconds:10.3f}' if seconds is not None else f'{"":10}'
        line += f'  ^{growth:.1f}' if growth is not None else f'{"":6}'
    print(line.rstrip(), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', help='of the GluonCV zoo, for 32 x 32 images, by depth',
                        default=['cifar_resnet20_v1', 'cifar_resnet56_v1', 'cifar_resnet110_v1'])
    parser.add_argument('--tiers', nargs='+', choices=['float', *gq.ops.TIERS], default=['float', *tiers()])
    parser.add_argument('--method', default='lsq', help='a preset of gq.convert')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--output', help='JSON file for the figures')
    args = parser.parse_args()
    rows = []
    print(f'{"CSE":5}{"tier":10}{"model":20}{"layers":>6}' + ''.join(f'{stage:>10}{"":6}' for stage in STAGES))
    for eliminate in (1, 0):
        found = in_own_process({'MXNET_ELIMINATE_COMMON_EXPR': str(eliminate)}, measure, args.models, args.tiers,
                               args.method, args.repeats)
        add_growth(found)
        for row in found:
            row['eliminate_common_expr'] = eliminate
            rows.append(row)
            show(row)
    threads = os.environ.get('OMP_NUM_THREADS')
    save(args.output, machine=machine(threads and int(threads)), method=args.method, repeats=args.repeats, rows=rows)


if __name__ == '__main__':
    main()
