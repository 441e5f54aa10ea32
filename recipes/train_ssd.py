"""Quantize an SSD object detector and train on: float net -> convert -> calibrate -> fine-tune -> mAP table.

    python recipes/train_ssd.py                                                     # pasted digits, no download
    python recipes/train_ssd.py --dataset-root DIR --base-params FILE               # your images, pasted
    python recipes/train_ssd.py --dataset voc --network resnet50_v1 --data-shape 512 --float-params FILE

The options are those of gluoncv's train_ssd.py, where it has them. Into --save-dir go results.json, curves.png,
detections.png, float.params and quantized.params.

A run stopped at any moment, by Ctrl-C or by force, continues with the same command and --resume, and ends
with the same weights to the last bit as a run that was not stopped.
"""
import logging
import math
import os
import shlex
import sys
import time
from functools import partial

import mxnet as mx
import numpy as np
from gluoncv.loss import SSDMultiBoxLoss
from gluoncv.model_zoo import get_model
from gluoncv.model_zoo.ssd import SSD
from mxnet import autograd
from tqdm import tqdm

import checkpoint
import detection_data
import gluonquant as gq
import report
from loop import STAGES, hybridize, make_schedule, seed_everything
from options import option
from quantization import quantize, widths
from ssd_options import FREE_OPTIONS, contexts, parse_args
from workers import Workers

plt = report.plt

# Small detectors: layers of the base network at strides of 8, 16 and 32 pixels, then channels of two more layers.
SMALL = {'resnet18_v1b': (('layers2_relu3_fwd', 'layers3_relu3_fwd', 'layers4_relu3_fwd'), (256, 128), 128),
         'mobilenet0.25': (('relu10_fwd', 'relu22_fwd', 'relu26_fwd'), (128, 64), 64)}
STEPS = (8, 16, 32, 64, 128)
SIZES = (0.2, 0.36, 0.6, 0.7, 0.85, 1.0)       # of anchors, as parts of the picture's side
SHOWN = 4           # pictures in detections.png
SHOWN_SCORE = 0.3   # and the lowest score of a detection in it


def small_ssd(network, size, classes, pretrained_base=False):
    """gluoncv's SSD on the classifier `network`, for pictures of less than 300 pixels. Layers may have no values yet.

    The classifier is made inside of the detector, by its name, so that parameters are called the same in any process.
    """
    features, filters, min_depth = SMALL[network]
    return SSD(network, size, features, filters, [part * size for part in SIZES], [[1, 2, 0.5]] * len(STEPS), STEPS,
               classes, min_depth=min_depth, anchor_alloc_size=max(16, math.ceil(size / STEPS[0])),
               pretrained=pretrained_base)


def make_net(args, classes):
    """The float detector, initialized, on the CPU."""
    try:
        if args.data_shape < 300:
            if args.network not in SMALL:
                raise ValueError(f'below 300 pixels there are only {" and ".join(SMALL)}')
            net = small_ssd(args.network, args.data_shape, classes, args.pretrained_base)
        else:
            of_zoo = args.dataset in ('voc', 'coco')
            name = f"ssd_{args.data_shape}_{args.network}_{args.dataset if of_zoo else 'custom'}"
            options = {} if of_zoo else {'classes': list(classes)}
            net = get_model(name, pretrained_base=args.pretrained_base, **options)
    except (ValueError, KeyError) as error:
        raise SystemExit(f'--network {args.network} at --data-shape {args.data_shape}: {error}. See gluoncv.model_zoo.'
                         'get_model_list() for names of the kind ssd_<data-shape>_<network>_voc.') from None
    for name, parameter in net.collect_params().items():
        if parameter._data is None:
            initial = parameter.init
            if initial is None:     # a convolution, or BatchNorm in a SymbolBlock, whose variance would start at random
                ones = name.endswith(('gamma', 'var'))
                initial = mx.init.Xavier() if name.endswith('weight') else mx.init.One() if ones else mx.init.Zero()
            parameter.initialize(initial)
    if args.base_params:
        load_base(net, args.network, args.base_params)
    return net


def load_base(net, network, path):
    """Give the base network in `net` the parameters in `path`, saved from gluoncv's classifier `network`.

    What the detector has no use for, the classifier's last layer, is left out, so it may have any number of classes.
    """
    try:
        base, found = get_model(network), mx.nd.load(path)
    except (ValueError, mx.MXNetError) as error:
        raise SystemExit(f'--base-params {path}: {error}. Pass what save_parameters of gluoncv.model_zoo.get_model('
                         f'{network!r}) wrote.') from error
    names = {parameter.name[len(base.prefix):]: path for path, parameter in base._collect_params_with_prefix().items()}
    inside = net.features.collect_params()
    roots = [name[:-len(ending)] for name in inside for ending in names if name.endswith(ending)]
    if not roots:
        raise SystemExit(f'--base-params {path}: the detector has no part named as in {network}. Pass --float-params.')
    root = max(set(roots), key=roots.count)
    for name, parameter in inside.items():
        if not name.startswith(root):
            continue            # a layer of the detector's own
        key = names.get(name[len(root):])
        if key is None or key not in found or found[key].shape != parameter.shape and 0 not in parameter.shape:
            shape = found[key].shape if key in found else None
            raise SystemExit(f'--base-params {path}: {name} of shape {parameter.shape} is {shape or "not"} in it. '
                             f'Pass parameters of {network}.')
        parameter.set_data(found[key])


def complete(net, args):
    """Finish shapes and return the anchors, (1, n, 4): centres and sides in pixels.

    They are put together here from the layers' maps, because a detector returns them in training mode only.
    """
    data = mx.nd.zeros((1, 3, args.data_shape, args.data_shape))
    net(data)
    return mx.nd.concat(*[generator(layer) for layer, generator in zip(net.features(data), net.anchor_generators)],
                        dim=1)


def detect(net, batches, workers, mode, size):
    """Yield (boxes, labels, scores, true boxes) of every batch as NumPy arrays (n, detections, 4), (…, 1), (…, 1).

    A detector's graph is another one in training, so it is hybridized anew here, and has to be after the last batch.
    """
    hybridize(net, mode)
    full = None
    for data, truth in batches:
        count = len(data)
        full = full or max(count, len(workers.contexts))
        if count < full:        # static_shape plans memory for one batch size
            data = mx.nd.concat(data, data[:1].repeat(full - count, axis=0), dim=0)
        parts = [net(part) for part, in workers.share([data])]
        labels, scores, boxes = (np.concatenate([part[i].asnumpy() for part in parts])[:count] for i in range(3))
        yield boxes.clip(0, size), labels, scores, truth.asnumpy()


def validate(net, batches, metric, workers, args):
    """Average precisions of every class and their mean on all pictures, see detection_data.precisions."""
    metric.reset()
    objects = 0
    for boxes, labels, scores, truth in tqdm(detect(net, batches, workers, args.mode, args.data_shape),
                                             desc='validating', total=len(batches), disable=None, leave=False):
        metric.update(boxes, labels, scores, truth[..., :4], truth[..., 4:5], truth[..., 5:6])
        objects += int(((truth[..., 4] >= 0) & (truth[..., 5] <= 0)).sum())
    if not objects:
        raise SystemExit('no validation picture has an object that is not marked as difficult, so there is no average '
                         'precision. Pass other pictures, or more of them by --val-images.')
    return detection_data.precisions(metric)


def train_epoch(net, trainer, batches, workers, title, log_interval):
    """One pass over `batches`.

    Returns a dict: cross_entropy and smooth_l1 (of a batch: sums over its pictures, for each positive anchor; their
    mean), images_per_s, lr_first and lr_last (of the epoch's updates). A batch without any object has the losses 0.
    """
    loss_function, totals, images, rates, start = SSDMultiBoxLoss(), np.zeros(2), 0, [], time.time()
    with tqdm(total=len(batches), desc=title, unit='batch', disable=None, leave=False) as bar:
        for i, batch in enumerate(batches, 1):
            shared = workers.share(batch)
            with autograd.record():
                outputs = [net(data)[:2] for data, _, _ in shared]
                losses, *parts = loss_function(*zip(*outputs), *list(zip(*shared))[1:])
            autograd.backward(losses)
            workers.step(trainer, net, 1)           # losses are divided by the number of positive anchors already
            rates.append(trainer.learning_rate)
            totals += [sum(float(loss.sum().asscalar()) for loss in part) for part in parts]
            images += len(batch[0])
            bar.set_postfix(ce=f'{totals[0] / i:.3f}', l1=f'{totals[1] / i:.3f}', refresh=False)
            bar.update()
            if log_interval and i % log_interval == 0:
                logging.info('%s, batch %d: CE %.3f, SmoothL1 %.3f, %.1f images/s', title, i, *totals / i,
                             images / (time.time() - start))
    ce, l1 = (totals / len(rates)).tolist()
    return {'cross_entropy': ce, 'smooth_l1': l1, 'images_per_s': round(images / (time.time() - start), 1),
            'lr_first': rates[0], 'lr_last': rates[-1]}


def train_stage(stage, net, loaders, metric, workers, args, state, save):
    """Train from the epoch in `state` to the last one of `stage`; note and save each epoch."""
    name, epochs, lr = ('lr', args.epochs, args.lr) if stage == 'float' else (
        'fine_tune_lr', args.num_epochs, args.fine_tune_lr)
    if state['epoch'] >= epochs:
        return
    if stage == 'quantized' and args.freeze_bn:
        gq.freeze_batchnorm(net)
    schedule = make_schedule(args.lr_mode, lr, len(loaders.train), epochs, args.lr_decay, args.lr_decay_epoch,
                             args.warmup_epochs)
    trainer = workers.trainer(net, 'sgd', {'lr_scheduler': schedule, 'momentum': args.momentum, 'wd': args.wd})
    if state['epoch'] > 0:
        trainer.load_states(os.path.join(state['path'], 'trainer.states'))
    for epoch in range(state['epoch'], epochs):
        start = time.time()
        loaders.sampler.epoch = (STAGES.index(stage), epoch)
        seed_everything(args.seed, *loaders.sampler.epoch)
        hybridize(net, args.mode)           # after inference, which has another graph
        row = train_epoch(net, trainer, loaders.train, workers, f'{stage} {epoch + 1}/{epochs}', args.log_interval)
        if not math.isfinite(row['cross_entropy'] + row['smooth_l1']):
            raise SystemExit(f"{stage} epoch {epoch + 1}: the losses are {row['cross_entropy']} and {row['smooth_l1']}."
                             f' Pass a smaller {option(name)} than {lr}.')
        due = (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs
        found = validate(net, loaders.val, metric, workers, args) if due else {}
        row['mean_ap'], row['precisions'] = found.get('mAP'), found
        state['history'].append({'stage': stage, 'epoch': epoch + 1, **row})
        state['epoch'] = epoch + 1
        state['seconds'] += time.time() - start
        save(net, trainer)
        logging.info('%s epoch %d/%d: CE %.3f, SmoothL1 %.3f, mAP %s, lr %.5f, %.1f images/s', stage, epoch + 1, epochs,
                     row['cross_entropy'], row['smooth_l1'], f"{row['mean_ap']:.4f}" if due else '-', row['lr_last'],
                     row['images_per_s'])


def run(args):
    workers = Workers(contexts=contexts(args))
    folder = os.path.join(args.save_dir, 'checkpoints')
    state = checkpoint.start_or_resume(args, folder, FREE_OPTIONS, {'precisions': {}, 'shown': {}})
    seed_everything(args.seed)          # the float net starts from here
    try:
        data = detection_data.read(args)
        net = make_net(args, data.classes)
        anchors = complete(net, args)
        loaders = detection_data.make_loaders(data.train, data.val, len(data.classes), anchors, args.data_shape,
                                              args.batch_size, args.seed, args.calibration_batches, args.num_workers)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    metric = detection_data.make_metric(args.dataset, data.val, args.data_shape, os.path.join(args.save_dir, 'eval'))
    net.collect_params().reset_ctx(workers.contexts)
    logging.info('%d training and %d validation pictures, %d classes; %d anchors', len(data.train), len(data.val),
                 len(data.classes), anchors.shape[1])

    def save(net, trainer=None):
        state['step'] += 1
        state.pop('path', None)
        writers = {'net.params': partial(checkpoint.save_float if state['stage'] == 'float' else gq.save, net)}
        if trainer:
            writers['trainer.states'] = trainer.save_states
        checkpoint.write(folder, state['stage'], state['epoch'], state, writers)

    if state['stage'] == 'float':
        path = os.path.join(state['path'], 'net.params') if state['path'] else args.float_params
        if path:
            load_float(net, path, workers)
        train_stage('float', net, loaders, metric, workers, args, state, save)
        start = time.time()
        state['precisions']['float'] = validate(net, loaders.val, metric, workers, args)
        state['shown']['float'] = show(net, loaders, workers, args)
        checkpoint.save_float(net, os.path.join(args.save_dir, 'float.params'))
        net = quantize(net, loaders.calibration, args)
        state['precisions']['calibrated only'] = validate(net, loaders.val, metric, workers, args)
        logging.info('mAP: float %.4f, calibrated only %.4f', *(found['mAP'] for found in state['precisions'].values()))
        state.update(stage='quantized', epoch=0, seconds=state['seconds'] + time.time() - start)
        save(net)
    else:
        net = gq.load(os.path.join(state['path'], 'net.params'), net, ctx=workers.contexts)
    train_stage('quantized', net, loaders, metric, workers, args, state, save)
    if not state['finished']:
        if args.num_epochs:
            state['precisions']['fine-tuned'] = state['history'][-1]['precisions']
        state['shown']['quantized'] = show(net, loaders, workers, args)
        gq.save(net, os.path.join(args.save_dir, 'quantized.params'))
        state['finished'] = True
        save(net)
    finish(net, args, state, data)


def load_float(net, path, workers):
    try:
        net.load_parameters(path, ctx=workers.contexts)
    except (AssertionError, ValueError, mx.MXNetError) as error:
        raise SystemExit(f'{path} does not fit the detector: {error}. Pass the --network, --data-shape and data it was '
                         'trained with.') from error


def show(net, loaders, workers, args):
    """Detections on the first validation pictures: for each a list of [xmin, ymin, xmax, ymax, class, score]."""
    boxes, labels, scores, _ = next(detect(net, loaders.val, workers, args.mode, args.data_shape))
    found = np.concatenate([boxes, labels, scores], axis=2)[:SHOWN]
    return [rows[(rows[:, 4] >= 0) & (rows[:, 5] >= SHOWN_SCORE)].tolist() for rows in found]


def draw_detections(path, pictures, classes, size, shown):
    """`shown` of both nets on the detection set `pictures`: float left, quantized right; dashed what is there."""
    count = len(shown['float'])
    figure, axes = plt.subplots(count, 2, figsize=(7, 3.5 * count), squeeze=False, constrained_layout=True)

    def frame(place, box, **style):
        place.add_patch(plt.Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, **style))

    for i in range(count):
        picture, boxes = pictures[i]
        height, width = picture.shape[:2]
        scale = np.array([width, height, width, height]) / size
        boxes = detection_data.checked_boxes(boxes, width, height, len(classes), f'picture {i}', logging.debug)
        for place, stage in zip(axes[i], ('float', 'quantized')):
            place.imshow(picture.asnumpy(), extent=(0, width, height, 0))
            place.set(xticks=[], yticks=[], title=f'{stage}, scores from {SHOWN_SCORE}' if i == 0 else '')
            for box in boxes:
                frame(place, box, color='white', linestyle='--', linewidth=0.8)
            for *box, label, score in shown[stage][i]:
                box, colour = box * scale, plt.cm.tab10(int(label) % 10)
                frame(place, box, color=colour, linewidth=1.8)
                place.text(box[0], box[1], f'{classes[int(label)]} {score:.2f}', color='white', fontsize=7,
                           verticalalignment='bottom', clip_on=True,
                           bbox={'facecolor': colour, 'edgecolor': 'none', 'pad': 1})
    figure.savefig(path, dpi=110)
    plt.close(figure)


def finish(net, args, state, data):
    """Print the table; write results.json, curves.png and detections.png."""
    summary = gq.summary(net)
    sizes = {'float': summary.float_bytes, 'quantized': summary.quantized_bytes}
    title = f'ssd_{args.data_shape}_{args.network}_{args.dataset}, {widths(args)}'
    report.write_json(os.path.join(args.save_dir, 'results.json'), {
        'command': shlex.join(['python', *sys.argv]), 'versions': report.versions(), 'threads': state['threads'],
        'seed': args.seed, 'wall_seconds': round(state['seconds'], 1), 'epochs': args.num_epochs,
        'float_epochs': args.epochs, 'mean_ap': state['precisions'], 'bytes': sizes, 'options': state['options'],
        'history': state['history']})
    found = {stage: precisions['mAP'] for stage, precisions in state['precisions'].items()}
    report.plot(os.path.join(args.save_dir, 'curves.png'), state['history'], found, title,
                {'cross_entropy': 'cross-entropy', 'smooth_l1': 'smooth L1'}, {'mean_ap': 'validation'}, 'mAP')
    draw_detections(os.path.join(args.save_dir, 'detections.png'), data.val, data.classes, args.data_shape,
                    state['shown'])
    print(report.table(title, found, sizes, 'mAP'))
    print(f"{state['seconds']:.0f} s; results.json, curves.png, detections.png and quantized.params are in "
          f'{args.save_dir}')


def main():
    args = parse_args()
    os.makedirs(args.save_dir, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s', datefmt='%H:%M:%S', handlers=[
        logging.StreamHandler(), logging.FileHandler(os.path.join(args.save_dir, args.logging_file))])
    kept = [word for word in sys.argv if word not in ('--resume', '--overwrite')]
    try:
        run(args)
    except KeyboardInterrupt:
        print('\nStopped. Only the epoch under way is lost; continue with\n  '
              + shlex.join([sys.executable, *kept, '--resume']), file=sys.stderr)
        sys.exit(130)               # as shells report an interrupt


if __name__ == '__main__':
    main()
