"""Quantize an image classifier and train on: float net -> convert -> calibrate -> fine-tune -> table.

    python recipes/image_classification.py                                      # digits, no download
    python recipes/image_classification.py --data-dir DIR --float-params FILE   # your images, your float net

The first command trains cifar_resnet20_v1 on 1,437 images of digits, converts it to 4 bits (first and last
layer: 8) and fine-tunes it. Into --save-dir go results.json, curves.png, float.params and quantized.params.

A run stopped at any moment, by Ctrl-C or by force, continues with the same command and --resume, and ends
with the same weights to the last bit as a run that was not stopped.
"""
import cluster

MEMBER = cluster.join()     # a server or scheduler goes no further

# ruff: noqa: E402
import json
import logging
import os
import shlex
import sys
import time
from functools import partial

import mxnet as mx
from gluoncv.model_zoo import get_model

import checkpoint
import data as images
import gluonquant as gq
import report
from loop import Loss, evaluate, hybridize, mix, seed_everything, train_stage
from options import FREE_OPTIONS, contexts, parse_args
from quantization import quantize, widths
from workers import Workers


def read_data(args, rank=0, workers=1):
    """Loaders for worker `rank` of `workers`, and the number of classes."""
    if args.dataset == 'digits':
        train, val, classes = images.read_digits(args.input_size or 32)
    elif args.dataset == 'cifar10':
        root = args.data_dir or os.path.join('~', '.mxnet', 'datasets', 'cifar10')
        train, val, classes = images.read_cifar10(root, args.resize)
    else:
        train, val, classes = images.read_directory(args.data_dir, args.resize)
    if args.hold_out:
        if args.hold_out > len(train) - args.batch_size:
            raise ValueError(f'--hold-out {args.hold_out} leaves less than one batch of the {len(train)} training '
                             f'images. Pass at most {len(train) - args.batch_size}.')
        train, val = train.split(args.hold_out)
    name = args.preset
    if not name:
        name = 'digits' if args.dataset == 'digits' else 'cifar' if max(val.shape) <= 64 else 'imagenet'
    preset = images.PRESETS[name]
    preset = preset._replace(mean=args.mean or preset.mean, std=args.std or preset.std)
    size = args.input_size or (preset.input_size if preset.area else min(preset.input_size, *val.shape[:2]))
    loaders = images.make_loaders(train, val, preset, size, args.batch_size, args.seed,
                                  args.calibration_batches, args.num_workers, rank, workers)
    for part in (train, val):
        part.cache(args.cache_mb * 1e6)
    logging.info('%d training and %d validation images of %dx%d, %d classes; preset %s, crops of %d',
                 len(train), len(val), *val.shape[:2], classes, name, size)
    return loaders, classes


def pretrained(net, args, classes, workers):
    """`net` with the parameters of --torch-params, or the network of --pretrained."""
    try:
        if args.torch_params:
            return gq.load_torch(args.torch_params, net, ctx=workers.contexts)
        return get_model(args.model, classes=classes, pretrained=True, ctx=workers.contexts)
    except Exception as error:          # whatever the file, the model zoo or the network bring up
        where = f'--torch-params {args.torch_params}' if args.torch_params else f'--pretrained {args.model}'
        raise SystemExit(f'{where}: {error}. Parameters from elsewhere go in by --float-params FILE (of gluoncv) or '
                         '--torch-params FILE.') from error


def make_teacher(args, classes, workers):
    """The network of --teacher, or None."""
    if not args.teacher:
        return None
    itself = args.teacher == 'float'
    path = os.path.join(args.save_dir, 'float.params') if itself else args.teacher_params
    try:
        net = get_model(args.model if itself else args.teacher, classes=classes, pretrained=not path)
        if path:
            net.load_parameters(path)
        net.collect_params().reset_ctx(workers.contexts)
    except Exception as error:          # whatever the model zoo, the network or the file bring up
        raise SystemExit(f'--teacher {args.teacher} cannot be had: {error}. Pass the name of a gluoncv model of '
                         f'{classes} classes, and its parameters as --teacher-params FILE.') from error
    hybridize(gq.fuse(net), args.mode)
    return net


def run(args, workers):
    folder = os.path.join(args.save_dir, 'checkpoints')
    state = checkpoint.start_or_resume(args, folder, FREE_OPTIONS, {'accuracy': {}}, workers)
    try:
        loaders, classes = read_data(args, workers.rank, workers.count)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    try:
        net = get_model(args.model, classes=classes)
    except ValueError:
        raise SystemExit(f'--model {args.model} is not in the gluoncv model zoo. See gluoncv.model_zoo.'
                         'get_model_list().') from None
    seed_everything(args.seed)

    mixing = partial(mix, classes=classes, alpha=args.mixup_alpha) if args.mixup_alpha else None
    hard_loss = Loss(classes, args.label_smoothing, mixed=bool(mixing))
    board = None
    if args.tensorboard and workers.first:
        board = report.Board(os.path.join(args.save_dir, 'tensorboard'), first=len(state['history']) + 1)

    def save(net, trainer=None):
        state['step'] += 1
        state.pop('path', None)
        if not workers.first:
            return
        quantized = state['stage'] == 'quantized'
        writers = {'net.params': partial(gq.save if quantized else checkpoint.save_float, net)}
        if trainer:
            writers['trainer.states'] = trainer.save_states
        checkpoint.write(folder, state['stage'], state['epoch'], state, writers)
        if trainer and board:
            board.note(len(state['history']), state['history'][-1], net, loaders.calibration)

    if state['stage'] == 'float':
        if state['path']:
            net.load_parameters(os.path.join(state['path'], 'net.params'), ctx=workers.contexts)
        elif args.float_params:
            net.load_parameters(args.float_params, ctx=workers.contexts)
        elif args.torch_params or args.pretrained:
            net = pretrained(net, args, classes, workers)
        else:
            net.initialize(mx.init.Xavier(), ctx=workers.contexts)
            for data, _ in workers.share(next(iter(loaders.calibration))):
                net(data)               # completes shapes
        hybridize(gq.fuse(net), args.mode)
        train_stage('float', net, loaders, hard_loss, workers, args, state, save, mixing)
        start = time.time()
        state['accuracy']['float'] = evaluate(net, loaders.val, workers)
        if workers.first:
            checkpoint.save_float(net, os.path.join(args.save_dir, 'float.params'))
        if args.start_from:
            gq.load_weights(os.path.join(args.start_from, 'quantized.params'), net)
            with open(os.path.join(args.start_from, 'results.json')) as file:
                state['epochs_before'] = json.load(file)['epochs']
        net = quantize(net, loaders.calibration, args)
        hybridize(net, args.mode)
        state['accuracy']['calibrated only'] = evaluate(net, loaders.val, workers)
        logging.info('float %.4f, calibrated only %.4f', *state['accuracy'].values())
        state.update(stage='quantized', epoch=0, seconds=state['seconds'] + time.time() - start)
        save(net)
    else:
        net = gq.load(os.path.join(state['path'], 'net.params'), net, ctx=workers.contexts)
        hybridize(net, args.mode)
    teacher = make_teacher(args, classes, workers)
    loss_function = Loss(classes, args.label_smoothing, teacher, args.temperature, args.hard_weight,
                         bool(mixing))
    train_stage('quantized', net, loaders, loss_function, workers, args, state, save, mixing)
    if args.num_epochs:
        state['accuracy']['fine-tuned'] = state['history'][-1]['val_accuracy']
    if workers.first:
        if not state['finished']:
            gq.save(net, os.path.join(args.save_dir, 'quantized.params'))
            state['finished'] = True
            save(net)
        finish(net, args, state)
    workers.leave()


def finish(net, args, state):
    """Print the table; write results.json and curves.png."""
    summary = gq.summary(net)
    sizes = {'float': summary.float_bytes, 'quantized': summary.quantized_bytes}
    data = os.path.basename(os.path.abspath(args.data_dir)) if args.data_dir else args.dataset
    title = f'{args.model}, {widths(args)}, {data}'
    report.write_json(os.path.join(args.save_dir, 'results.json'), {
        'command': shlex.join(['python', *sys.argv]), 'versions': report.versions(),
        'threads': state['threads'], 'workers': state['workers'], 'seed': args.seed,
        'wall_seconds': round(state['seconds'], 1),
        'epochs': args.num_epochs + state.get('epochs_before', 0), 'accuracy': state['accuracy'], 'bytes': sizes,
        'options': state['options'], 'history': state['history']})
    report.plot(os.path.join(args.save_dir, 'curves.png'), state['history'], state['accuracy'], title,
                {'loss': 'training'}, {'accuracy': 'training', 'val_accuracy': 'validation'})
    print(report.table(title, state['accuracy'], sizes))
    print(f"{state['seconds']:.0f} s; results.json, curves.png and quantized.params are in {args.save_dir}")


def main():
    args = parse_args()
    os.makedirs(args.save_dir, exist_ok=True)
    workers = Workers(args.kvstore, contexts(args), MEMBER)
    console = logging.StreamHandler()
    if not workers.first:
        console.setLevel(logging.WARNING)
        args.logging_file += f'.{workers.rank}'
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s', datefmt='%H:%M:%S', handlers=[
        console, logging.FileHandler(os.path.join(args.save_dir, args.logging_file))])
    kept = [word for word in sys.argv if word not in ('--resume', '--overwrite')]
    again = f'with\n  {shlex.join([sys.executable, *kept, "--resume"])}' if not MEMBER else 'all workers with --resume'
    try:
        run(args, workers)
    except KeyboardInterrupt:
        print(f'\nStopped. Only the epoch under way is lost; continue {again}', file=sys.stderr)
        sys.exit(130)               # as shells report an interrupt


if __name__ == '__main__':
    cluster.run(main)
