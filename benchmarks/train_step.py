"""What a fake-quant training step costs: time and peak memory over the float step of the same net.

    python benchmarks/train_step.py --output results/train_step.json

`convert` computes global average pooling by a mean, which alone makes a net faster: so there are two float nets to
divide by, the stock one and one tuned in the same way. It also takes ReLU6 into the quantizers; in the float
mobilenetv2 that is MXNet's clip and most of the time, and other operators of MXNet are no faster there.

All tiers of a method live in one process with both float nets and take steps in turn, so that a slow spell of the
machine hits all; a ratio is that of the medians in this process. (All methods together would take 20 GB.) Memory is the
peak of a process of its own that only takes steps, over what it held after importing, with one thread. Random weights
and inputs: neither changes the work done. Prints a table; with --output writes the figures as JSON, for plot.py.
"""
import argparse
import statistics
import time
from functools import lru_cache
from itertools import product

import mxnet as mx
from common import in_own_process, machine, save, tiers
from gluoncv.model_zoo import get_model
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

import gluonquant as gq

# name -> model, batch size, input side
NETS = {'resnet20': ('cifar_resnet20_v1', 128, 32), 'resnet18': ('resnet18_v1b', 8, 224),
        'mobilenetv2': ('mobilenetv2_1.0', 8, 224)}
STOCK, TUNED = ('float', 'stock'), ('float', 'tuned')


class MeanPool(nn.GlobalAvgPool2D):
    """Global average pooling as it is in a converted net."""

    def hybrid_forward(self, F, x):
        return F.mean(x, axis=(2, 3), keepdims=True)


def tune(block):
    """Give a float net the pooling of a converted one, by ``net.apply``."""
    if type(block) is nn.GlobalAvgPool2D:
        block.__class__ = MeanPool


def make_step(net_name, variant, bits):
    """A function that takes one training step; the first one, which traces the net in its tier, has been taken."""
    model, batch, side = NETS[net_name]
    method, tier = variant
    net = get_model(model, classes=10)
    net.initialize(mx.init.Xavier())
    data = nd.random.uniform(-1, 1, shape=(batch, 3, side, side))
    label = nd.array([i % 10 for i in range(batch)])
    previous = gq.ops.use(tier if method != 'float' else 'pure')
    if variant == TUNED:
        net.apply(tune)
    elif variant != STOCK:
        activation, _, weight = method.partition('+')
        gq.convert(net, bits=bits, activation=activation, weight=weight or activation)
        gq.calibrate(net, [data[:2]])       # a small batch: the peak of memory is to be that of a step
    net.hybridize(static_alloc=True, static_shape=True)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1e-4, 'momentum': 0.9}, kvstore=None)
    loss_function = gluon.loss.SoftmaxCrossEntropyLoss()

    def step():
        with autograd.record():
            loss = loss_function(net(data), label)
        loss.backward()
        trainer.step(batch)
        nd.waitall()
    step()
    gq.ops.use(previous)
    return step


def measure_time(net_name, variants, bits, steps):
    """{variant: seconds of a step}, medians of interleaved steps after two for warming up."""
    functions = {variant: make_step(net_name, variant, bits) for variant in variants}
    times = {variant: [] for variant in variants}
    for turn in range(steps + 1):
        for variant, step in functions.items():
            start = time.perf_counter()
            step()
            if turn:
                times[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(seconds) for variant, seconds in times.items()}


def measure_memory(net_name, variant, bits, steps=4):
    """Peak resident memory of ``steps`` steps in this process, in MB over its present size."""
    before = resident('VmRSS')
    step = make_step(net_name, variant, bits)
    for _ in range(steps - 1):
        step()
    return resident('VmHWM') - before


@lru_cache(maxsize=None)
def peak(net_name, variant, bits):
    """`measure_memory` in a process of its own, once for each variant."""
    return in_own_process({'OMP_NUM_THREADS': '1'}, measure_memory, net_name, variant, bits)


def resident(field):
    """Memory of this process in MB: 'VmRSS' now, 'VmHWM' at its peak (getrusage would count the parent's too)."""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024 / 1e6


def make_rows(net_name, threads, bits, times, peaks):
    """A dict for each variant of a net; ``peaks`` is {} where memory was not measured."""
    model, batch, _ = NETS[net_name]
    for (method, tier), seconds in times.items():
        row = {'net': net_name, 'model': model, 'batch': batch, 'threads': threads, 'method': method, 'tier': tier,
               'bits': bits, 'ms': 1000 * seconds, 'time_per_tuned': seconds / times[TUNED],
               'time_per_stock': seconds / times[STOCK]}
        if peaks:
            row.update(peak_mb=peaks[method, tier], memory_per_tuned=peaks[method, tier] / peaks[TUNED])
        yield row


def show(row):
    line = (f'{row["net"]:12}{row["threads"]:>7}  {row["method"]:11}{row["tier"]:9}{row["ms"]:8.0f}'
            f'{row["time_per_tuned"]:14.2f}{row["time_per_stock"]:14.2f}')
    if 'peak_mb' in row:
        line += f'{row["peak_mb"]:9.0f}{row["memory_per_tuned"]:16.2f}'
    print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nets', nargs='+', choices=sorted(NETS), default=list(NETS))
    parser.add_argument('--methods', nargs='+', default=['pact+sawb', 'lsq', 'int8'],
                        help='of activations, or of activations + weights')
    parser.add_argument('--tiers', nargs='+', choices=gq.ops.TIERS, default=tiers())
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--bits', type=int, default=4)
    parser.add_argument('--steps', type=int, default=10, help='timed steps of each variant')
    parser.add_argument('--no-memory', action='store_true', help='measure time only')
    parser.add_argument('--output', help='JSON file for the figures')
    args = parser.parse_args()
    rows = []
    print(f'{"net":12}threads  {"method":11}{"tier":9}{"ms/step":>8}{"/ float tuned":>14}{"/ float stock":>14}'
          f'{"peak MB":>9}{"/ float peak MB":>16}')
    for net_name, threads, method in product(args.nets, args.threads, args.methods):
        environment = {'OMP_NUM_THREADS': str(threads)}
        variants = [STOCK, TUNED, *product([method], args.tiers)]
        times = in_own_process(environment, measure_time, net_name, variants, args.bits, args.steps)
        peaks = {}
        if threads == 1 and not args.no_memory:
            peaks = {variant: peak(net_name, variant, args.bits) for variant in variants}
        found = list(make_rows(net_name, threads, args.bits, times, peaks))
        for row in found if method == args.methods[0] else found[2:]:       # the float nets once
            rows.append(row)
            show(row)
    save(args.output, machine=machine(args.threads), steps=args.steps, rows=rows)


if __name__ == '__main__':
    main()
