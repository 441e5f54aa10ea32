"""How long `attach` takes against the number of nodes in the graph: is it linear?

    OMP_NUM_THREADS=1 python benchmarks/attach.py --output results/attach.json --picture results/attach.png

Medians of seconds for nets of the Gluon zoo, one process, with the net already built, for the default placement and for
one made for a target; tracing and making the quantizers included. The exponent is that of the best power of the number
of nodes, by least squares of the logarithms: 1 is linear, 2 quadratic.
"""
import argparse
import gc
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
from common import machine, save
from mxnet.gluon.model_zoo import vision

import gluonquant as gq

MODELS = ['alexnet', 'vgg16', 'squeezenet1.0', 'resnet18_v1', 'resnet34_v1', 'mobilenetv2_1.0', 'resnet50_v1',
          'inceptionv3', 'resnet101_v1', 'densenet121', 'resnet152_v1', 'densenet201']
PLACEMENTS = [None, 'onnxruntime']


def measure_once(net, target):
    """(seconds, number of nodes of the float graph, number of quantizers)."""
    gc.collect()
    gc.disable()        # as timeit does: what a collection costs depends on what else the process holds
    start = time.perf_counter()
    attached = gq.attach(net, target=target)
    seconds = time.perf_counter() - start
    gc.enable()
    attached.graph.strip()
    return seconds, len(attached.graph.nodes()), len(attached._children)


def measure(models, repeats):
    """A dict for each model and placement."""
    rows = []
    measure_once(vision.get_model(models[0]), None)
    for model in models:
        net = vision.get_model(model)
        for target in PLACEMENTS:
            seconds, nodes, quantizers = zip(*(measure_once(net, target) for _ in range(repeats)))
            rows.append({'model': model, 'target': target, 'nodes': nodes[0], 'quantizers': quantizers[0],
                         'seconds': statistics.median(seconds)})
    return rows


def exponent(rows):
    """The p for which seconds ~ nodes ** p."""
    nodes, seconds = (np.log([row[key] for row in rows]) for key in ('nodes', 'seconds'))
    return float(np.polyfit(nodes, seconds, 1)[0])


def plot(rows, path):
    """Seconds against nodes, and the line through the origin that fits them best."""
    import matplotlib
    matplotlib.use('Agg')       # before pyplot, which would look for a display
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for target, color in zip(PLACEMENTS, ('#5b8db8', '#d9822b')):
        found = [row for row in rows if row['target'] == target]
        nodes, seconds = (np.array([row[key] for row in found]) for key in ('nodes', 'seconds'))
        slope = (nodes * seconds).sum() / (nodes * nodes).sum()
        label = f'{target or "default placement"}: seconds ~ nodes ^ {exponent(found):.2f}'
        axes.plot(nodes, seconds, 'o', color=color, label=label)
        axes.plot([0, nodes.max()], [0, slope * nodes.max()], color=color, linewidth=0.8)
    for row in rows:
        if row['target'] is None and row['nodes'] > 700:
            axes.annotate(row['model'], (row['nodes'], row['seconds']), fontsize=7, xytext=(4, -9),
                          textcoords='offset points')
    axes.set(xlabel='nodes of the float graph', ylabel='seconds', title='gq.attach, one thread')
    axes.spines[['top', 'right']].set_visible(False)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, help='of the Gluon zoo')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--output', help='JSON file for the figures')
    parser.add_argument('--picture', help='PNG file of seconds against nodes')
    parser.add_argument('--figures', type=Path, help='plot this JSON file and measure nothing')
    args = parser.parse_args()
    if args.figures:
        rows = json.loads(args.figures.read_text(encoding='utf8'))['rows']
    else:
        rows = measure(args.models, args.repeats)
        threads = os.environ.get('OMP_NUM_THREADS')
        save(args.output, machine=machine(threads and int(threads)), repeats=args.repeats, rows=rows,
             exponents={str(target): exponent([row for row in rows if row['target'] == target])
                        for target in PLACEMENTS})
    for row in rows:
        print(f'{row["model"]:20}{row["target"] or "":14}{row["nodes"]:6}{row["quantizers"]:6}{row["seconds"]:10.3f}')
    if args.picture:
        plot(rows, args.picture)


if __name__ == '__main__':
    main()
