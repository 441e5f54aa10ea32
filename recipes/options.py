"""The command line of image_classification.py."""
import argparse
import os

import mxnet as mx

import data as images
import quantization

# Options that may differ between a run and its continuation, because no result depends on them.
FREE_OPTIONS = {'resume', 'overwrite', 'num_workers', 'logging_file', 'cache_mb', 'save_dir', 'tensorboard'}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Quantization-aware training of an image classifier.',
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group('data').add_argument
    add('--dataset', choices=['digits', 'cifar10'], help='ready-made data; digits unless --data-dir is given')
    add('--data-dir', help='RecordIO files train.rec, val.rec or folders train/<class>/, val/<class>/')
    add('--preset', choices=sorted(images.PRESETS), help='mean, std, augmentation; default from image size')
    add('--input-size', type=int, help='side of the crop the network sees; by default from the preset')
    add('--resize', type=int, help='bring images to this shorter side first; by default they are not resized')
    add('--mean', type=float, nargs=3, help='mean of R, G, B in 0..255, instead of the preset')
    add('--std', type=float, nargs=3, help='standard deviation of R, G, B in 0..255, instead of the preset')
    add('-j', '--num-data-workers', dest='num_workers', type=int, default=0, help='processes for loading')
    add('--hold-out', type=int, default=0, metavar='N',
        help='validate on N of the training images, which are not trained on: for choosing options')
    add('--cache-mb', type=int, default=4000, help='keep decoded images in memory if they fit into this')

    add = parser.add_argument_group('float network').add_argument
    add('--model', default='cifar_resnet20_v1', help='name in the gluoncv model zoo')
    add('--float-params', metavar='FILE', help='start from these parameters (net.save_parameters)')
    add('--pretrained', action='store_true', help="start from gluoncv's own parameters, downloaded if need be")
    add('--torch-params', metavar='FILE', help="start from torchvision's or timm's parameters: .safetensors, .pth")
    add('--float-epochs', type=int, help='train the float network this long; 6 for digits, else 0')
    add('--float-lr', type=float, default=0.1, help='its learning rate, which falls to 0 as a cosine')

    add = quantization.add_options(parser, bits=4)
    add('--start-from', metavar='DIR', help='--save-dir of a run at more bits, whose weights fine-tuning starts from')

    add = parser.add_argument_group('fine-tuning').add_argument
    add('--num-epochs', type=int, default=4, help='epochs of quantization-aware training')
    add('--batch-size', type=int, default=64)
    add('--lr', type=float, default=0.02)
    add('--lr-mode', choices=['step', 'poly', 'cosine', 'sine'], default='cosine', help='schedule of --lr')
    add('--lr-decay', type=float, default=0.1, help='factor of --lr-mode step')
    add('--lr-decay-epoch', default='40,60', help='epochs after which --lr-mode step decays')
    add('--momentum', type=float, default=0.9)
    add('--wd', type=float, default=1e-4, help='weight decay')
    add('--warmup-epochs', type=float, default=0, help='epochs in which the learning rate rises from 0')
    add('--label-smoothing', type=float, default=0, help='part of the label that all classes share, such as 0.1')
    add('--mixup-alpha', type=float, default=0, metavar='A',
        help='train on mixtures of two images, with shares from Beta(A, A), such as 0.2; 0: on the images themselves')
    add('--teacher', metavar='MODEL', help="learn from this model's answers, too; 'float' is the float network itself")
    add('--teacher-params', metavar='FILE', help='parameters of --teacher MODEL; gluoncv downloads them by default')
    add('--temperature', type=float, default=4, help='softens the answers of --teacher')
    add('--hard-weight', type=float, default=0.5, help='weight of the label beside --teacher')
    add('--freeze-bn-after', type=float, default=0.8, help='part of the epochs before BatchNorm freezes')

    add = add_run(parser, 'image_classification', seed=0)
    add('--num-gpus', type=int, default=0, help='train on this many GPUs, each with its part of every batch')
    add('--num-cpus', type=int, default=1, help='without GPUs: on this many CPU contexts')
    add('--kvstore', default='device', choices=['local', 'device', 'dist_sync', 'dist_device_sync'],
        help='how gradients are added up; dist_sync: over the workers of a job, see '
        'recipes/launch.py, each with batches of --batch-size')
    add('--tensorboard', action='store_true', help='write curves, ranges and clipped shares for TensorBoard')

    args = parser.parse_args(argv)
    if args.target and not args.graph:
        parser.error('--target places quantizers in a graph: pass --graph, too.')
    if args.data_dir and args.dataset == 'digits':
        parser.error('--dataset digits comes with scikit-learn and takes no --data-dir. Leave one out.')
    args.dataset = args.dataset or ('directory' if args.data_dir else 'digits')
    starts = [name for name in ('float_params', 'torch_params', 'pretrained') if getattr(args, name)]
    if len(starts) > 1:
        parser.error(f'{option(starts[0])} and {option(starts[1])} both say where the float network comes from. '
                     'Leave one out.')
    if args.float_epochs is None:
        args.float_epochs = 0 if args.dataset != 'digits' or starts else 6
    check_files(parser, args, 'float_params', 'torch_params')
    if args.teacher_params and args.teacher in (None, 'float'):
        parser.error('--teacher-params are those of a --teacher MODEL: pass its name, too.')
    if args.start_from and not os.path.isfile(os.path.join(args.start_from, 'quantized.params')):
        parser.error(f'--start-from {args.start_from}: there is no quantized.params. Let that run end first.')
    if not starts and not args.float_epochs:
        parser.error('there is no float network to quantize. Pass --float-params FILE, --torch-params FILE or '
                     '--pretrained, or train one first with --float-epochs N.')
    try:
        args.lr_decay_epoch = [int(epoch) for epoch in args.lr_decay_epoch.split(',') if epoch]
    except ValueError:
        parser.error(f'--lr-decay-epoch {args.lr_decay_epoch} is not a list of epochs such as 40,60.')
    check_least(parser, args, batch_size=1, num_epochs=0, float_epochs=0, calibration_batches=1, seed=0, num_workers=0,
                hold_out=0, warmup_epochs=0, label_smoothing=0, mixup_alpha=0, hard_weight=0, num_gpus=0, num_cpus=1)
    if args.batch_size % len(contexts(args)):
        parser.error(f'--batch-size {args.batch_size} cannot be divided among {len(contexts(args))} devices.')
    return args


def add_run(parser, name, seed):
    """Add the options that every recipe has for a run, which is called `name`."""
    add = parser.add_argument_group('run').add_argument
    add('--mode', choices=['hybrid', 'imperative'], default='hybrid')
    add('--seed', type=int, default=seed)
    add('--save-dir', default=os.path.join('outputs', name), help='folder for all results')
    add('--resume', action='store_true', help='continue the run in --save-dir')
    add('--overwrite', action='store_true', help='discard an unfinished run in --save-dir')
    add('--logging-file', default='train.log', help='name of the log in --save-dir')
    return add


def option(name):
    """--the-name as it is typed."""
    return '--' + name.replace('_', '-')


def check_files(parser, args, *names):
    """Stop unless the files that these options name are there."""
    for name in names:
        path = getattr(args, name)
        if path and not os.path.isfile(path):
            parser.error(f'{option(name)} {path}: no such file.')


def check_least(parser, args, **least):
    """Stop if one of these options is below its least value."""
    for name, value in least.items():
        if getattr(args, name) < value:
            parser.error(f'{option(name)} {getattr(args, name)} is below {value}.')


def contexts(args):
    """The devices of this process."""
    return [mx.gpu(i) for i in range(args.num_gpus)] or [mx.cpu(i) for i in range(args.num_cpus)]
