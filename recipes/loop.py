"""The training loop of the recipes: schedules, one epoch, one evaluation, one stage of a run."""
import logging
import math
import os
import time

import mxnet as mx
import numpy as np
from gluoncv.loss import DistillationSoftmaxCrossEntropyLoss
from mxnet import autograd, gluon
from tqdm import tqdm

import gluonquant as gq

STAGES = ('float', 'quantized')


class Warmup(mx.lr_scheduler.LRScheduler):
    """The learning rates of `schedule`, of which those of the first `updates` rise from 0 in equal steps."""

    def __init__(self, schedule, updates):
        super().__init__(schedule.base_lr)
        self._schedule, self._updates = schedule, updates

    def __call__(self, num_update):
        return self._schedule(num_update) * min(1, num_update / self._updates)


def make_schedule(mode, lr, updates_per_epoch, epochs, decay, decay_epochs, warmup_epochs=0):
    """Learning rate for every optimizer update 1, 2, ..., updates_per_epoch * epochs.

    Parameters
    ----------
    mode : 'step' (times `decay` after each of `decay_epochs`), 'poly' (power 2), 'cosine' or 'sine' (from
        0 up to `lr` and back to 0). All but 'step' end at 0.
    warmup_epochs : number, in which the rate rises from 0; part of `epochs`.
    """
    if warmup_epochs:
        schedule = make_schedule(mode, lr, updates_per_epoch, epochs, decay, decay_epochs)
        return Warmup(schedule, max(1, round(warmup_epochs * updates_per_epoch)))
    total = updates_per_epoch * epochs
    if mode == 'sine':
        return gq.training.SineSchedule(lr, total)
    if mode == 'cosine':
        return gq.training.CosineSchedule(lr, total)
    if mode == 'poly':
        return mx.lr_scheduler.PolyScheduler(total, base_lr=lr, pwr=2)
    steps = sorted(epoch * updates_per_epoch for epoch in decay_epochs if 0 < epoch < epochs)
    if not steps:
        return mx.lr_scheduler.PolyScheduler(total, base_lr=lr, final_lr=lr)     # constant
    return mx.lr_scheduler.MultiFactorScheduler(steps, factor=decay, base_lr=lr)


class Loss:
    """loss(data, output, label) of every image: cross-entropy with the label, with a teacher's answer, or both.

    Parameters
    ----------
    classes : int, needed for smoothing.
    smoothing : float, part of the label's weight that all classes share.
    teacher : Block or None, maps data to logits.
    temperature, hard_weight : as in gluoncv's DistillationSoftmaxCrossEntropyLoss.
    mixed : bool. Labels are shares of all classes, as `mix` makes them, not class numbers.
    """
    def __init__(self, classes=None, smoothing=0.0, teacher=None, temperature=1.0, hard_weight=0.5, mixed=False):
        self._classes, self._smoothing, self._teacher, self._temperature = classes, smoothing, teacher, temperature
        self._soft = bool(smoothing or mixed)
        if teacher:
            self._loss = DistillationSoftmaxCrossEntropyLoss(temperature, hard_weight, sparse_label=not self._soft)
        else:
            self._loss = gluon.loss.SoftmaxCrossEntropyLoss(sparse_label=not self._soft)

    def __call__(self, data, output, label):
        with autograd.pause():          # which is inference mode, too
            if self._soft:
                label = label if label.ndim == 2 else label.one_hot(self._classes)
                label = (1 - self._smoothing) * label + self._smoothing / self._classes
            if self._teacher:
                answer = mx.nd.softmax(self._teacher(data) / self._temperature)
        return self._loss(output, label, answer) if self._teacher else self._loss(output, label)


def mix(data, label, classes, alpha):
    """Each image with a part of its opposite in the batch, and the classes' shares in it: mixup, arXiv:1710.09412.

    data (n, ...) and label (n,) become float32 (n, ...) and (n, classes). An image keeps at least half of itself; the
    share of one batch is drawn by NumPy from Beta(alpha, alpha).
    """
    share = np.random.beta(alpha, alpha)
    share = max(share, 1 - share)
    label = label.one_hot(classes)
    return [share * array + (1 - share) * array[::-1] for array in (data, label)]


def train_epoch(net, trainer, batches, count, loss_function, workers, title, mixing=None):
    """One pass over `batches`, `count` images in all; with several workers, each brings its own batches.

    `mixing`, if given, makes another [data, label] of these two of each batch: see `mix`.

    Returns a dict: loss (mean), accuracy (0..1), images_per_s, lr_first and lr_last (of the epoch's updates).
    Losses are read one step late: MXNet computes in the background, and the next batch is prepared meanwhile.
    """
    totals, images, rates, pending, start = [0.0, 0.0], 0, [], None, time.time()

    def collect(sums, size):
        nonlocal images
        for part in sums:
            for i, value in enumerate(part.asnumpy()):
                totals[i] += float(value)
        images += size
        bar.set_postfix(loss=f'{totals[0] / images:.3f}', acc=f'{totals[1] / images:.3f}', refresh=False)
        bar.update(size)

    with tqdm(total=count // workers.count, desc=title, unit='img', disable=None if workers.first else True,
              leave=False) as bar:
        for batch in batches:
            sums, losses = [], []
            if mixing:
                batch = mixing(*batch)
            with autograd.record():
                for data, label in workers.share(batch):
                    output = net(data)
                    losses.append(loss_function(data, output, label))
                    answer = label.argmax(axis=1) if mixing else label
                    sums.append(mx.nd.concat(losses[-1].sum(), (output.argmax(axis=1) == answer).sum(), dim=0))
            autograd.backward(losses)
            workers.step(trainer, net, len(batch[0]))
            rates.append(trainer.learning_rate)
            if pending:
                collect(*pending)
            pending = (sums, len(batch[0]))
        collect(*pending)
    *totals, images = workers.total(*totals, images)
    speed = images / (time.time() - start)
    return {'loss': totals[0] / images, 'accuracy': totals[1] / images, 'images_per_s': round(speed, 1),
            'lr_first': rates[0], 'lr_last': rates[-1]}


def evaluate(net, batches, workers, title='validating'):
    """Top-1 accuracy over every image of `batches`, of all workers, in 0..1."""
    right = count = 0
    size = None
    for data, label in tqdm(batches, desc=title, unit='batch', disable=None if workers.first else True, leave=False):
        count += len(label)
        size = size or max(len(data), len(workers.contexts))
        missing = size - len(data)
        if missing:     # static_shape plans memory for one batch size: fill up with images of no class
            data = mx.nd.concat(data, data[:1].repeat(missing, axis=0), dim=0)
            label = mx.nd.concat(label, -mx.nd.ones((missing,), ctx=label.context), dim=0)
        found = [(net(part).argmax(axis=1) == answer).sum() for part, answer in workers.share([data, label])]
        right += sum(int(part.asscalar()) for part in found)
    right, count = workers.total(right, count)
    return right / count


def hybridize(net, mode):
    if mode == 'hybrid':
        net.hybridize(static_alloc=True, static_shape=True)


def seed_everything(seed, *position):
    """Seed MXNet and NumPy from the seed and a position in the run, so that it can be entered there."""
    state = np.random.RandomState([seed, *position])
    mx.random.seed(int(state.randint(2 ** 31 - 1)))
    np.random.seed(int(state.randint(2 ** 31 - 1)))


def train_stage(stage, net, loaders, loss_function, workers, args, state, save, mixing=None):
    """Train from the epoch in `state` to the last one of `stage`; note and save each epoch.

    Float training takes a cosine schedule with --float-lr; fine-tuning takes the options of the command line.
    """
    if stage == 'float':
        epochs, schedule = args.float_epochs, ('cosine', args.float_lr)
    else:
        epochs, schedule = args.num_epochs, (args.lr_mode, args.lr)
    if state['epoch'] >= epochs:
        return
    lr_scheduler = make_schedule(*schedule, len(loaders.train), epochs, args.lr_decay, args.lr_decay_epoch,
                                 args.warmup_epochs)
    options = {'lr_scheduler': lr_scheduler, 'momentum': args.momentum, 'wd': args.wd}
    trainer = workers.trainer(net, 'sgd', options)
    if state['epoch'] > 0:
        trainer.load_states(os.path.join(state['path'], 'trainer.states'))
    frozen = False
    for epoch in range(state['epoch'], epochs):
        start = time.time()
        if stage == 'quantized' and not frozen and epoch >= args.freeze_bn_after * epochs:
            gq.freeze_batchnorm(net)
            hybridize(net, args.mode)
            frozen = True
        loaders.sampler.epoch = (STAGES.index(stage), epoch)
        seed_everything(args.seed, *loaders.sampler.epoch)
        row = train_epoch(net, trainer, loaders.train, loaders.train_count, loss_function, workers,
                          f'{stage} {epoch + 1}/{epochs}', mixing)
        if not math.isfinite(row['loss']):
            raise SystemExit(f"{stage} epoch {epoch + 1}: the loss is {row['loss']}. Pass a smaller "
                             f"{'--float-lr' if stage == 'float' else '--lr'} than {schedule[1]}.")
        row['val_accuracy'] = evaluate(net, loaders.val, workers)
        state['history'].append({'stage': stage, 'epoch': epoch + 1, **row})
        state['epoch'] = epoch + 1
        state['seconds'] += time.time() - start
        save(net, trainer)
        logging.info('%s epoch %d/%d: loss %.4f, accuracy %.4f, validation %.4f, lr %.5f, %.0f images/s',
                     stage, epoch + 1, epochs, row['loss'], row['accuracy'], row['val_accuracy'],
                     row['lr_last'], row['images_per_s'])
