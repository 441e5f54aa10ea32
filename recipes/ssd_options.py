"""The command line of train_ssd.py."""
import argparse
import os

import mxnet as mx

import quantization
from options import add_run, check_files, check_least, option

# Options that may differ between a run and its continuation, because no result depends on them.
FREE_OPTIONS = {'resume', 'overwrite', 'num_workers', 'logging_file', 'log_interval', 'cache_mb', 'save_dir'}
EPOCHS = {'pasted': 20, 'voc': 240, 'coco': 240}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description='Quantization-aware training of an SSD object detector.',
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group('data').add_argument
    add('--dataset', choices=['pasted', 'voc', 'coco'], default='pasted', help='pasted: made of real images, see '
        'detection_data.py; voc and coco are read by gluoncv')
    add('--dataset-root', metavar='DIR', help="folder of the data set; of pasted: images of objects, in RecordIO files "
        "train.rec, val.rec or folders train/<class>/, val/<class>/; by default scikit-learn's digits")
    add('--canvas-dir', metavar='DIR', help="what the objects of pasted are pasted on, as --dataset-root; by default "
        "scikit-learn's two sample pictures")
    add('--train-images', type=int, default=2000, help='training pictures of pasted')
    add('--val-images', type=int, default=500, help='validation pictures of pasted')
    add('--data-shape', type=int, default=128, help='side of what the network sees, in pixels')
    add('--num-workers', '-j', dest='num_workers', type=int, default=0, help='processes for loading')
    add('--cache-mb', type=int, default=4000, help='keep pasted pictures in memory if they fit into this')

    add = parser.add_argument_group('float network').add_argument
    add('--network', default='resnet18_v1b', help='base network: resnet18_v1b or mobilenet0.25 below 300 pixels, else '
        "one of gluoncv's, such as vgg16_atrous at 300 or resnet50_v1 at 512")
    add('--base-params', metavar='FILE', help='parameters of the base network trained as a classifier, of any classes')
    add('--pretrained-base', action='store_true', help="start from gluoncv's own, downloaded if need be")
    add('--float-params', metavar='FILE', help='start from these parameters of the whole detector')
    add('--epochs', type=int, help='train the float detector this long; by default 0 with --float-params, else '
        f"{EPOCHS['pasted']} for pasted and {EPOCHS['voc']} for voc and coco")
    add('--lr', type=float, default=0.01, help="its learning rate; gluoncv's script has 0.001")

    quantization.add_options(parser, bits=8)

    add = parser.add_argument_group('fine-tuning').add_argument
    add('--num-epochs', type=int, default=4, help='epochs of quantization-aware training')
    add('--fine-tune-lr', type=float, default=0.001, help='its learning rate')
    add('--freeze-bn', action='store_true', help='keep the statistics of BatchNorm as they are')

    add = parser.add_argument_group('both trainings').add_argument
    add('--batch-size', type=int, default=32)
    add('--lr-mode', choices=['step', 'poly', 'cosine', 'sine'], default='cosine', help='schedule of learning rates')
    add('--lr-decay', type=float, default=0.1, help='factor of --lr-mode step')
    add('--lr-decay-epoch', default='160,200', help='epochs after which --lr-mode step decays')
    add('--warmup-epochs', type=float, default=0, help='epochs in which the learning rate rises from 0')
    add('--momentum', type=float, default=0.9)
    add('--wd', type=float, default=5e-4, help='weight decay')

    add = add_run(parser, 'train_ssd', seed=233)
    add('--gpus', default='', help='GPUs to train on, such as 0,1; by default the CPU')
    add('--log-interval', type=int, default=100, help='batches between lines of the log; 0: one line an epoch')
    add('--val-interval', type=int, default=1, help='epochs between validations; the last epoch is always validated')

    args = parser.parse_args(argv)
    if args.target and not args.graph:
        parser.error('--target places quantizers in a graph: pass --graph, too.')
    if args.canvas_dir and args.dataset != 'pasted':
        parser.error(f'--canvas-dir is for --dataset pasted; {args.dataset} has whole pictures. Leave one out.')
    starts = [name for name in ('float_params', 'base_params', 'pretrained_base') if getattr(args, name)]
    if len(starts) > 1:
        parser.error(f"{option(starts[0])} and {option(starts[1])} both say what the float detector starts from. "
                     'Leave one out.')
    check_files(parser, args, 'float_params', 'base_params')
    for name in ('dataset_root', 'canvas_dir'):
        path = getattr(args, name)
        if path and not os.path.isdir(path):
            parser.error(f'{option(name)} {path}: no such folder.')
    if args.epochs is None:
        args.epochs = 0 if args.float_params else EPOCHS[args.dataset]
    if not args.float_params and not args.epochs:
        parser.error('there is no float detector to quantize. Pass --float-params FILE, or train one first with '
                     '--epochs N.')
    for name, what in (('lr_decay_epoch', 'epochs such as 160,200'), ('gpus', 'GPUs such as 0,1')):
        try:
            setattr(args, name, [int(word) for word in getattr(args, name).split(',') if word])
        except ValueError:
            parser.error(f'{option(name)} {getattr(args, name)} is not a list of {what}.')
    check_least(parser, args, batch_size=1, data_shape=32, train_images=1, val_images=1, epochs=0, num_epochs=0,
                calibration_batches=1, seed=0, num_workers=0, warmup_epochs=0, val_interval=1, log_interval=0)
    if args.batch_size % len(contexts(args)):
        parser.error(f'--batch-size {args.batch_size} cannot be divided among {len(contexts(args))} devices.')
    return args


def contexts(args):
    """The devices of this process."""
    return [mx.gpu(number) for number in args.gpus] or [mx.cpu()]
