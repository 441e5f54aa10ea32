"""What inference costs: float and int8, in MXNet, ONNX Runtime and OpenVINO, on one core.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/inference.py --output results/inference.json \
        --picture results/inference.png

8 bits, method int8, every sum and pooling quantized, each engine with the placement that it wants. All engines of a net
live in one process and run in turn, so that a slow spell of the machine hits all; figures are medians. Float nets have
their BatchNorm merged; the batch is 1 (latency) and 32 (throughput). Random weights and inputs: neither changes the
work done. --profile adds where ONNX Runtime's time goes, by operator.
"""
import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter

import matplotlib
import mxnet as mx
import numpy as np
import onnx
import onnxruntime
import openvino
from common import machine, save
from gluoncv.model_zoo import get_model

import gluonquant as gq
from gluonquant.export import lower
from gluonquant.export.onnx_file import write

matplotlib.use('Agg')           # before pyplot, which would look for a display
import matplotlib.pyplot as plt  # noqa: E402

NETS = {'resnet18_v1b': 224, 'cifar_resnet20_v1': 32, 'mobilenetv2_1.0': 224}
BASE = 'ONNX Runtime float'
COLORS = {'MXNet float': '#b8c4d6', BASE: '#8a97a8', 'ONNX Runtime int8': '#d9822b', 'OpenVINO int8': '#5b8db8',
          'MXNet int8': '#7aa874'}


def make_net(model, side):
    """A float net with the statistics of one that was trained, and an input for it."""
    mx.random.seed(0)
    net = get_model(model, classes=10 if 'cifar' in model else 1000)
    net.initialize(mx.init.Xavier())
    data = mx.nd.random.normal(shape=(2, 3, side, side))
    net(data)
    for name, parameter in net.collect_params().items():
        if name.endswith('running_var'):
            parameter.set_data(mx.nd.random.uniform(0.5, 1.5, shape=parameter.shape))
    return net, data


def quantized(net, data, target):
    """``net`` at 8 bits, as ``target`` wants it."""
    made = gq.attach(net, 8, method='int8', target=target)
    gq.calibrate(made, [data])
    return gq.finalize(made)


def session(path, **options):
    """A session of ONNX Runtime on one thread."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(path, settings, providers=['CPUExecutionProvider'])


def engines(model, side, batch, folder):
    """{name: function that computes one batch}."""
    net, data = make_net(model, side)
    shape, x = (1, 3, side, side), np.random.RandomState(0).randn(batch, 3, side, side).astype(np.float32)
    float_net = gq.graph.as_graph(net)
    gq.fold(float_net, 'merge')
    paths = {name: os.path.join(folder, f'{model}_{name}.onnx') for name in ('float', 'onnxruntime', 'openvino')}
    write(onnx, lower(float_net, {'data': shape}), paths['float'])
    for target in ('onnxruntime', 'openvino'):
        gq.export_onnx(quantized(net, data, target), paths[target], shape, target)
    array = mx.nd.array(x)

    def in_mxnet(block):
        block.hybridize(static_alloc=True, static_shape=True)
        return lambda: block(array).wait_to_read()

    def in_onnxruntime(path):
        made = session(path)
        return lambda: made.run(None, {'data': x})

    def in_openvino(path):
        core = openvino.Core()
        graph = core.read_model(path)
        graph.reshape({'data': list(x.shape)})
        request = core.compile_model(graph, 'CPU', {'INFERENCE_NUM_THREADS': 1, 'PERFORMANCE_HINT': 'LATENCY',
                                                    'INFERENCE_PRECISION_HINT': 'f32'}).create_infer_request()
        return lambda: request.infer({'data': x})
    return {'MXNet float': in_mxnet(float_net), BASE: in_onnxruntime(paths['float']),
            'ONNX Runtime int8': in_onnxruntime(paths['onnxruntime']), 'OpenVINO int8': in_openvino(paths['openvino']),
            'MXNet int8': in_mxnet(gq.to_mxnet_int8(quantized(net, data, 'onednn')))}, paths


def measure(runs, seconds):
    """{name: median seconds}: all take turns for about ``seconds`` each."""
    for run in runs.values():
        for _ in range(3):
            run()
    times = {name: [] for name in runs}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds * len(runs) or len(times[BASE]) < 9:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def profile(path, shape, folder, repeats=30):
    """{operator: (microseconds, number of nodes)} in ONNX Runtime's optimized graph."""
    made = session(path, enable_profiling=True, profile_file_prefix=os.path.join(folder, 'profile'))
    x = np.random.RandomState(0).randn(*shape).astype(np.float32)
    for _ in range(repeats):
        made.run(None, {'data': x})
    with open(made.end_profiling(), encoding='utf8') as file:
        events = json.load(file)
    found = {}
    for event in events:
        if event.get('cat') == 'Node' and event['name'].endswith('_kernel_time'):
            found.setdefault((event['args']['op_name'], event['name']), []).append(event['dur'])
    total, count = Counter(), Counter()
    for (op, _), durations in found.items():
        total[op] += statistics.median(durations)
        count[op] += 1
    return {op: (total[op], count[op]) for op in sorted(total, key=total.get, reverse=True)}


def draw(rows, path):
    """Bars of speed over float ONNX Runtime, one group for each net, one panel for each batch."""
    batches = sorted({row['batch'] for row in rows})
    figure, panels = plt.subplots(1, len(batches), figsize=(5.5 * len(batches), 4), constrained_layout=True,
                                  sharey=True, squeeze=False)
    nets = list(dict.fromkeys(row['net'] for row in rows))
    for axes, batch in zip(panels[0], batches):
        for number, (engine, color) in enumerate(COLORS.items()):
            found = {row['net']: row['speed'] for row in rows if (row['engine'], row['batch']) == (engine, batch)}
            places = [place + 0.16 * (number - 2) for place in range(len(nets))]
            bars = axes.bar(places, [found.get(net, 0) for net in nets], 0.15, color=color, label=engine)
            axes.bar_label(bars, fmt='%.1f', fontsize=7)
        axes.axhline(1, color='gray', linewidth=0.8)
        axes.set(title=f'batch {batch}', xticks=range(len(nets)), xticklabels=nets)
        axes.spines[['top', 'right']].set_visible(False)
        axes.tick_params(axis='x', length=0)
    panels[0][0].set_ylabel('times as fast as float ONNX Runtime')
    panels[0][0].legend(fontsize=8, frameon=False, loc='upper right')
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--nets', nargs='+', default=list(NETS), choices=list(NETS))
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 32])
    parser.add_argument('--seconds', type=float, default=6, help='for each engine, net and batch')
    parser.add_argument('--profile', action='store_true')
    parser.add_argument('--output')
    parser.add_argument('--picture')
    args = parser.parse_args()
    rows, profiles = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for model in args.nets:
            for batch in args.batches:
                runs, paths = engines(model, NETS[model], batch, folder)
                medians = measure(runs, args.seconds)
                for engine, seconds in medians.items():
                    rows.append({'net': model, 'batch': batch, 'engine': engine, 'ms': round(1e3 * seconds, 4),
                                 'speed': round(medians[BASE] / seconds, 3)})
                    print(f'{model:20}{batch:4} {engine:20}{1e3 * seconds:10.3f} ms{rows[-1]["speed"]:8.2f}x')
            if args.profile:
                profiles[model] = {name: profile(paths[name], (1, 3, NETS[model], NETS[model]), folder)
                                   for name in ('float', 'onnxruntime')}
                for name, found in profiles[model].items():
                    print(model, name, {op: f'{time:.0f} us in {count}' for op, (time, count) in found.items()})
    versions = {'onnxruntime': onnxruntime.__version__, 'openvino': openvino.__version__.split('-')[0]}
    save(args.output, machine={**machine(1), **versions}, rows=rows, profiles=profiles)
    if args.picture:
        draw(rows, args.picture)


if __name__ == '__main__':
    main()
