"""What a fake-quant training step costs: time and peak memory over the float step of the same net.

    OMP_NUM_THREADS=1 python benchmarks/train_step.py --output results/train_step.json

Both nets live in one process and take steps in turn, so that a slow spell of the machine hits both; the ratio is that
of the medians. Memory is the peak of a process of its own that only takes steps, over what it held after importing.
Random weights and inputs: neither changes the work done. Prints a table; with --output writes the figures as JSON.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import mxnet as mx
from gluoncv.model_zoo import get_model
from mxnet import autograd, gluon, nd

import gluonquant as gq

# name -> model, batch size, input side
NETS = {'resnet20': ('cifar_resnet20_v1', 128, 32), 'resnet18': ('resnet18_v1b', 8, 224),
        'mobilenetv2': ('mobilenetv2_1.0', 8, 224)}


def make_step(net_name, method, bits):
    """A function that takes one training step; ``method='float'`` leaves the net as it is."""
    model, batch, side = NETS[net_name]
    net = get_model(model, classes=10)
    net.initialize(mx.init.Xavier())
    data = nd.random.uniform(-1, 1, shape=(batch, 3, side, side))
    label = nd.array([i % 10 for i in range(batch)])
    if method != 'float':
        gq.calibrate(gq.convert(net, bits=bits, method=method), [data])
    net.hybridize(static_alloc=True, static_shape=True)
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1e-4, 'momentum': 0.9}, kvstore=None)
    loss_function = gluon.loss.SoftmaxCrossEntropyLoss()

    def step():
        with autograd.record():
            loss = loss_function(net(data), label)
        loss.backward()
        trainer.step(batch)
        nd.waitall()
    return step


def measure_time(net_name, methods, bits, steps):
    """{method: [seconds, ...]} of interleaved steps after two for warming up."""
    functions = {method: make_step(net_name, method, bits) for method in methods}
    times = {method: [] for method in methods}
    for turn in range(steps + 2):
        for method, step in functions.items():
            start = time.perf_counter()
            step()
            if turn >= 2:
                times[method].append(time.perf_counter() - start)
    return times


def measure_memory(net_name, method, bits, steps=4):
    """Peak resident memory of ``steps`` steps in this process, in MB over its present size."""
    before = resident('VmRSS')
    step = make_step(net_name, method, bits)
    for _ in range(steps):
        step()
    return resident('VmHWM') - before


def resident(field):
    """Memory of this process in MB: 'VmRSS' now, 'VmHWM' at its peak (getrusage would count the parent's too)."""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024 / 1e6


def in_own_process(net_name, method, bits):
    command = [sys.executable, os.path.abspath(__file__), '--memory', net_name, method, '--bits', str(bits)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def machine():
    """What the figures were measured on."""
    with open('/proc/cpuinfo') as file:
        model = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), 'unknown')
    return {'cpu': model, 'cpus': os.cpu_count(), 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS'),
            'python': platform.python_version(), 'mxnet': mx.__version__, 'gluonquant': gq.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nets', nargs='+', choices=sorted(NETS), default=['resnet20', 'resnet18'])
    parser.add_argument('--methods', nargs='+', default=['lsq', 'pact', 'int8'])
    parser.add_argument('--bits', type=int, default=4)
    parser.add_argument('--steps', type=int, default=10, help='timed steps of each net')
    parser.add_argument('--output', help='JSON file for the figures')
    parser.add_argument('--memory', nargs=2, metavar=('NET', 'METHOD'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(measure_memory(*args.memory, args.bits))
        return
    methods = ['float', *args.methods]
    rows = []
    print(f'{"net":12}{"method":10}{"ms/step":>9}{"/ float":>9}{"peak MB":>9}{"/ float":>9}')
    for net_name in args.nets:
        times = measure_time(net_name, methods, args.bits, args.steps)
        peaks = {method: in_own_process(net_name, method, args.bits) for method in methods}
        for method in methods:
            median, base = (statistics.median(times[name]) for name in (method, 'float'))
            rows.append({'net': net_name, 'model': NETS[net_name][0], 'batch': NETS[net_name][1], 'method': method,
                         'bits': args.bits, 'ms': 1000 * median, 'time_ratio': median / base,
                         'peak_mb': peaks[method], 'memory_ratio': peaks[method] / peaks['float']})
            print(f'{net_name:12}{method:10}{1000 * median:9.0f}{median / base:9.2f}{peaks[method]:9.0f}'
                  f'{peaks[method] / peaks["float"]:9.2f}', flush=True)
    if args.output:
        with open(args.output, 'w') as file:
            json.dump({'machine': machine(), 'steps': args.steps, 'rows': rows}, file, indent=1)


if __name__ == '__main__':
    main()
