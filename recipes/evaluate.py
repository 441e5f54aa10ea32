"""Measure a finished run of image_classification.py again, with some of its layers left float.

    python recipes/evaluate.py --run outputs/x/w4a4_lsq --ends-float --save-dir outputs/float_ends/w4a4_lsq
    python recipes/evaluate.py --run outputs/x --ends-float --save-dir outputs/float_ends      # every run below

Nothing is trained: what the quantizers of the other layers have learned stays. Writes results.json and train.log as the
run itself does, for tables.py.
"""
import argparse
import json
import logging
import shlex
import sys
from pathlib import Path

import deploy
import gluonquant as gq
import report
from loop import evaluate, hybridize
from workers import Workers


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--run', required=True, help='--save-dir of a finished run, or a folder of such folders')
    parser.add_argument('--data-dir', help='where the images are now, if not where the run found them')
    parser.add_argument('--ends-float', action='store_true', help='leave the layers of --first-last-bits float')
    parser.add_argument('--save-dir', required=True, help='folder for the results')
    args = parser.parse_args(argv)
    if not runs(args.run):
        parser.error(f'--run {args.run}: there is no results.json in it or below. Let that run end first.')
    return args


def runs(folder):
    """{name: folder} of the runs in a folder: itself, named '', or those below."""
    if (Path(folder) / 'results.json').exists():
        return {'': Path(folder)}
    return {path.parent.name: path.parent for path in sorted(Path(folder).glob('*/results.json'))
            if (path.parent / 'quantized.params').exists()}


def leave_ends_float(net):
    """Switch off the quantizers of the first and the last layer of a converted net; returns their paths."""
    layers = gq.layers.layers(net)
    if not layers:
        raise SystemExit('--ends-float is for runs without --graph: these layers share no quantizers with others.')
    ends = [list(layers)[0], list(layers)[-1]]
    for path in ends:
        layers[path].weight_quantizer.set_mode(gq.quantizers.OFF)
        layers[path].input_quantizer.set_mode(gq.quantizers.OFF)
    return ends


def measure(run, folder, args):
    """Evaluate the run in folder `run`, and write what comes out into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(run / 'results.json') as file:
        results = json.load(file)
    options, loaders, net = deploy.load_run(run, args.data_dir)
    floats = leave_ends_float(net) if args.ends_float else []
    hybridize(net, options.mode)
    top1 = evaluate(net, loaders.val, Workers())
    line = f'{run.name}: {top1:.4f}' + (f', with {", ".join(floats)} float' if floats else '')
    logging.info(line)
    (folder / 'train.log').write_text(f"$ {shlex.join(['python', *sys.argv])}\n{line}\n")
    report.write_json(str(folder / 'results.json'), {
        **results, 'command': shlex.join(['python', *sys.argv]), 'versions': report.versions(), 'float_layers': floats,
        'accuracy': {**results['accuracy'], 'fine-tuned': top1}, 'history': []})


def main():
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    for name, run in runs(args.run).items():
        measure(run, Path(args.save_dir) / name, args)


if __name__ == '__main__':
    main()
