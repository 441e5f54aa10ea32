"""Deploy a trained net: finalize -> fine-tune a little -> ONNX and packed file -> verify every rung -> table.

    python recipes/deploy.py --run outputs/image_classification

Takes the folder of a run of image_classification.py, and its data. Writes into --save-dir, by default that folder:
final.params (the finalized net), net.onnx, net.gqp (packed) and deploy.json (accuracy of every rung, share of equal
codes of every tensor).
"""
import argparse
import json
import logging
import os
import shlex
import sys

import mxnet as mx
from gluoncv.model_zoo import get_model

import gluonquant as gq
import image_classification
import options as recipe_options
import report
from loop import Loss, evaluate, hybridize, make_schedule, seed_everything, train_epoch
from workers import Workers


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Export a trained net and prove what it computes.',
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add('--run', required=True, help='folder of a run of image_classification.py')
    add('--data-dir', help='images, if they are not where that run found them')
    add('--target', choices=['onnxruntime', 'openvino', 'tensorrt'], help='default: that of the run, or onnxruntime')
    add('--runtimes', nargs='*', default=['onnxruntime'], help='runtimes to verify: onnxruntime, openvino, mxnet')
    add('--num-epochs', type=int, default=0, help='epochs of training with the biases on their grid')
    add('--lr', type=float, default=0.0005, help='their learning rate, which falls to 0 as a cosine')
    add('--batches', type=int, help='validation batches to verify on; default: all')
    add('--overflow', choices=['raise', 'zero'], default='raise', help='of biases, see gluonquant.finalize')
    add('--save-dir', help='folder for all results; default: --run')
    args = parser.parse_args(argv)
    args.save_dir = args.save_dir or args.run
    for name in ('results.json', 'quantized.params'):
        if not os.path.isfile(os.path.join(args.run, name)):
            parser.error(f'--run {args.run}: there is no {name} in it. Pass the --save-dir of a finished run of '
                         'image_classification.py.')
    return args


def load_run(folder, data_dir):
    """(options of the run, loaders, the quantized net)."""
    with open(os.path.join(folder, 'results.json')) as file:
        options = argparse.Namespace(**{**vars(recipe_options.parse_args(['--float-epochs', '1'])),
                                        **json.load(file)['options']})
    if data_dir:
        options.data_dir = data_dir
    loaders, classes = image_classification.read_data(options)
    net = None if options.graph else get_model(options.model, classes=classes)
    return options, loaders, gq.load(os.path.join(folder, 'quantized.params'), net)


def fine_tune(net, loaders, workers, options, args):
    """Train the finalized net; returns {epoch: validation accuracy}."""
    schedule = make_schedule('cosine', args.lr, len(loaders.train), args.num_epochs, None, None)
    trainer = workers.trainer(net, 'sgd', {'lr_scheduler': schedule, 'momentum': options.momentum, 'wd': options.wd})
    history = []
    for epoch in range(args.num_epochs):
        loaders.sampler.epoch = (2, epoch)      # other crops than in the stages before
        seed_everything(options.seed, 2, epoch)
        row = train_epoch(net, trainer, loaders.train, loaders.train_count, Loss(), workers,
                              f'final {epoch + 1}/{args.num_epochs}')
        history.append({**row, 'val_accuracy': evaluate(net, loaders.val, workers)})
        logging.info('final epoch %d/%d: loss %.4f, validation %.4f', epoch + 1, args.num_epochs, row['loss'],
                     history[-1]['val_accuracy'])
    return history


def run(args):
    options, loaders, net = load_run(args.run, args.data_dir)
    target = args.target or options.target or 'onnxruntime'
    hybridize(net, options.mode)
    workers = Workers()
    accuracy = {'fine-tuned': evaluate(net, loaders.val, workers)}
    final = gq.finalize(net, overflow=args.overflow)
    hybridize(final, options.mode)
    accuracy['final'] = evaluate(final, loaders.val, workers)
    history = fine_tune(final, loaders, workers, options, args) if args.num_epochs else []
    if history:
        accuracy['final, trained'] = history[-1]['val_accuracy']
    final.hybridize(False)

    paths = {name: os.path.join(args.save_dir, file)
             for name, file in (('final', 'final.params'), ('onnx', 'net.onnx'), ('packed', 'net.gqp'))}
    shape = (1, *next(iter(loaders.val))[0].shape[1:])
    gq.save(final, paths['final'])
    gq.export_onnx(final, paths['onnx'], shape, target)
    gq.save_packed(final, paths['packed'], shape, target=target, architecture=options.model)

    labels, batches = [], []
    for number, (data, label) in enumerate(loaders.val):
        if number == args.batches:
            break
        labels.append(label)
        batches.append(data)
    labels = mx.nd.concat(*labels, dim=0).asnumpy()
    found = gq.verify(final, paths['onnx'], batches, args.runtimes)
    for rung, outputs in found.outputs.items():
        accuracy[f'{rung}, {len(labels)} images'] = float((outputs[0].argmax(1) == labels).mean())
    results = {'command': shlex.join(['python', *sys.argv]), 'versions': report.versions(), 'target': target,
               'threads': report.threads(), 'images': len(labels), 'accuracy': accuracy, 'history': history,
               'bytes': {name: os.path.getsize(path) for name, path in paths.items()}, 'verify': found.to_dict()}
    report.write_json(os.path.join(args.save_dir, 'deploy.json'), results)
    print(found)
    for rung, top1 in accuracy.items():
        print(f'{rung:32}{top1:8.4f}')
    for name, size in results['bytes'].items():
        print(f'{os.path.basename(paths[name]):32}{size / 1000:8,.1f} kB')
    return 0 if found.passed else 1


def main():
    args = parse_args()
    os.makedirs(args.save_dir, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s', datefmt='%H:%M:%S', handlers=[
        logging.StreamHandler(), logging.FileHandler(os.path.join(args.save_dir, 'deploy.log'))])
    sys.exit(run(args))


if __name__ == '__main__':
    main()
