"""Pictures with boxes for train_ssd.py: VOC and COCO by gluoncv, and a small set pasted together from real images.

Boxes are as gluoncv has them: float arrays (n, 6) of xmin, ymin, xmax, ymax in pixels, class number, difficult (0, 1).

gluoncv's random transforms draw from the global generators of Python and NumPy. Here each sample is drawn after seeding
them with a number of its own, from (seed, stage, epoch), so neither data workers nor an interruption change a pixel.
"""
import logging
import math
import os
import random
import signal
from contextlib import contextmanager
from typing import NamedTuple, Tuple

import mxnet as mx
import numpy as np
from gluoncv.data import COCODetection, VOCDetection
from gluoncv.data.batchify import Pad, Stack
from gluoncv.data.batchify import Tuple as Each
from gluoncv.data.transforms.presets.ssd import SSDDefaultTrainTransform, SSDDefaultValTransform
from gluoncv.utils.metrics.coco_detection import COCODetectionMetric
from gluoncv.utils.metrics.voc_detection import VOC07MApMetric
from mxnet import gluon
from PIL import Image
from tqdm import tqdm

import data as images

CIFAR10 = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
SMALLEST = 0.1          # pixels, side of a box


class PastedDetection(gluon.data.Dataset):
    """Images of objects pasted on pieces of other pictures, with boxes around them.

    A picture has one to four objects, and in 4 % of all none. Sides of objects are 20 to 70 % of the picture's, 10 %
    more or less for shapes that are not square; places are random. An object may cover up to 60 % of each earlier one:
    where it would hide more, another place is tried, and after ten it is left out. The outermost ring of pixels of an
    object is mixed half and half with what is below, so that no edge is as sharp as a cut.

    Every picture follows from (seed, part, index) alone.

    Parameters
    ----------
    objects, canvases : data.Images, or what has their `len` and `read`. Pieces of a canvas cover 30 to 100 % of its
        shorter side and may be mirrored.
    classes : tuple of str, names of the classes of the objects.
    size : int, side of the pictures in pixels.
    count : int, number of pictures.
    part : int, another number for training than for validation.
    mirror : bool, whether half of the objects are mirrored.

    Item `index`: picture, uint8 NDArray (size, size, 3), and boxes, float32 array (n, 6), whose sides are edges: the
    object covers the pixels from xmin to xmax - 1.
    """
    EMPTY = 0.04
    MOST = 4
    SIDES = (0.2, 0.7)
    HIDDEN = 0.6
    ATTEMPTS = 10

    def __init__(self, objects, canvases, classes, size, count, part=0, seed=0, mirror=True):
        self._objects, self._canvases, self._size, self._count = objects, canvases, size, count
        self._part, self._seed, self._mirror = part, seed, mirror
        self.classes = tuple(classes)
        self._cache = None

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        picture, boxes = self.read(index)
        return mx.nd.array(picture, dtype=np.uint8), boxes.copy()

    def read(self, index):
        """uint8 array (size, size, 3) and boxes of one picture."""
        return self._cache[index] if self._cache else self.compose(index)[:2]

    def cache(self, limit):
        """Make all pictures now and keep them, if that takes at most `limit` bytes."""
        if not self._cache and len(self) * self._size ** 2 * 3 <= limit:
            self._cache = [self.read(i) for i in tqdm(range(len(self)), desc='pasting', disable=None, leave=False)]
        return self

    def compose(self, index):
        """(picture, boxes, numbers of the objects on it, owner), all made anew.

        `owner`, int array (size, size), has for each pixel the row of the box whose object is seen there, or -1.
        """
        if not 0 <= index < self._count:
            raise IndexError(f'picture {index} of {self._count}')
        draw, size = np.random.RandomState([self._seed, self._part, index]), self._size
        picture = self._canvas(draw)
        owner, areas, boxes, chosen = np.full((size, size), -1), [], [], []
        for _ in range(0 if draw.uniform() < self.EMPTY else draw.randint(1, self.MOST + 1)):
            number = draw.randint(len(self._objects))
            side = size * math.exp(draw.uniform(*np.log(self.SIDES)))
            shape = math.exp(draw.uniform(-0.1, 0.1))
            width, height = (min(size, max(3, round(length))) for length in (side * shape, side / shape))
            mirrored = self._mirror and draw.randint(2)
            for _ in range(self.ATTEMPTS):
                left, top = draw.randint(size - width + 1), draw.randint(size - height + 1)
                where = np.s_[top:top + height, left:left + width]
                below = owner[where][owner[where] >= 0]
                seen = np.bincount(owner[owner >= 0], minlength=len(boxes)) - np.bincount(below, minlength=len(boxes))
                if all(seen >= (1 - self.HIDDEN) * np.array(areas)):
                    pixels, label = self._objects.read(number)
                    self._paste(picture[where], pixels[:, ::-1] if mirrored else pixels)
                    owner[where] = len(boxes)
                    areas.append(width * height)
                    boxes.append((left, top, left + width, top + height, label, 0))
                    chosen.append(int(number))
                    break
        return picture, np.array(boxes, np.float32).reshape(-1, 6), chosen, owner

    def _canvas(self, draw):
        """A piece of one of the canvases, uint8 (size, size, 3)."""
        pixels, _ = self._canvases.read(draw.randint(len(self._canvases)))
        height, width = pixels.shape[:2]
        side = draw.uniform(0.3, 1) * min(height, width)
        left, top = draw.uniform(0, width - side), draw.uniform(0, height - side)
        piece = Image.fromarray(pixels).resize((self._size,) * 2, Image.BILINEAR, (left, top, left + side, top + side))
        return np.array(piece)[:, ::-1 if draw.randint(2) else 1].copy()

    @staticmethod
    def _paste(place, pixels):
        """Write `pixels` into the array `place`, in its size."""
        height, width = place.shape[:2]
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.BILINEAR))
        edge = place.astype(np.uint16) + pixels
        place[:] = edge // 2
        place[1:-1, 1:-1] = pixels[1:-1, 1:-1]


class Arrays:
    """uint8 arrays (H, W, 3) in place of data.Images."""
    def __init__(self, arrays):
        self._arrays = arrays

    def __len__(self):
        return len(self._arrays)

    def read(self, index):
        return self._arrays[index], 0


def sample_canvases():
    """The left 55 % of scikit-learn's two sample pictures, to train on, and the rest of them, to validate on."""
    from sklearn.datasets import load_sample_images
    pictures = load_sample_images().images
    middles = [round(0.55 * picture.shape[1]) for picture in pictures]
    return (Arrays([picture[:, :middle] for picture, middle in zip(pictures, middles)]),
            Arrays([picture[:, middle:] for picture, middle in zip(pictures, middles)]))


def read_pasted(size, counts, root=None, canvas_dir=None, seed=0):
    """(training, validation) sets of `counts` pictures of `size` pixels.

    Objects are the images in `root`, as data.read_directory reads them, or scikit-learn's digits; canvases those in
    `canvas_dir`, or scikit-learn's sample pictures. Training takes train.rec, validation val.rec. Digits are not
    mirrored here, but by gluoncv's transform for training.
    """
    if root:
        *objects, number = _directory(root, '--dataset-root')
        classes = _class_names(root, number)
    else:
        *objects, number = images.read_digits(32)
        classes = [str(digit) for digit in range(number)]
    if canvas_dir:
        *canvases, _ = _directory(canvas_dir, '--canvas-dir')
        for part in canvases:
            part.several_sizes = True
    else:
        canvases = sample_canvases()
    return [PastedDetection(*sources, classes, size, count, part, seed, mirror=bool(root))
            for part, (*sources, count) in enumerate(zip(objects, canvases, counts))]


def _directory(path, option):
    try:
        return images.read_directory(path, None)
    except ValueError as error:
        raise ValueError(f'{option} {path}: {error}'.replace('--data-dir', option)) from error


def _class_names(root, number):
    path = os.path.join(root, 'classes.txt')
    if os.path.isfile(path):
        with open(path) as file:
            names = file.read().split('\n')
        names = [name.strip() for name in names if name.strip()]
        if len(names) != number:
            raise ValueError(f'{path} has {len(names)} names, but there are images of {number} classes.')
        return names
    folder = os.path.join(root, 'train')
    if os.path.isdir(folder):
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return CIFAR10 if number == len(CIFAR10) else [f'class {label}' for label in range(number)]


def read_voc(root=None):
    """(training, validation) sets of VOC 2007 and 2012: both trainval parts; test of 2007. gluoncv's default folder."""
    splits = ((2007, 'trainval'), (2012, 'trainval')), ((2007, 'test'),)
    return [_gluoncv(VOCDetection, 'voc', root, splits=split) for split in splits]


def read_coco(root=None):
    """(training, validation) sets of COCO 2017, of pictures with objects and of all. Needs pycocotools."""
    return [_gluoncv(COCODetection, 'coco', root, splits=f'instances_{part}2017', skip_empty=part == 'train')
            for part in ('train', 'val')]


def _gluoncv(kind, name, root, **options):
    try:
        return kind(**({'root': root} if root else {}), **options)
    except (OSError, ImportError) as error:
        where = root or f'~/.mxnet/datasets/{name}'
        raise ValueError(f'--dataset {name} cannot be read from {where}: {error}. Pass the folder as --dataset-root; '
                         f"gluoncv's scripts/datasets show how to fill it.") from error


def checked_boxes(boxes, width, height, classes, name, warn=logging.warning):
    """The usable boxes of a picture, float32 (n, 6); n may be 0.

    Rows of -1 are padding, by which gluoncv's COCO says that there is no object. Boxes are cut at the picture's edges.
    Those with NaN or infinite numbers, or with a side of less than 0.1 pixels in the picture, are dropped with one
    warning that names the picture and them.

    Parameters
    ----------
    boxes : array (n, 5), (n, 6), or empty of any shape; without a sixth column, no box is difficult.
    classes : int, number of classes.
    name : str, of the picture, for messages.

    Raises ValueError for labels that are no class number.
    """
    boxes = np.asarray(boxes, np.float32)
    if not boxes.size:
        return np.zeros((0, 6), np.float32)
    if boxes.ndim != 2 or boxes.shape[1] < 5:
        raise ValueError(f'{name}: boxes have shape {boxes.shape}. Pass rows of xmin, ymin, xmax, ymax, class number.')
    boxes = np.concatenate([boxes[:, :6], np.zeros((len(boxes), 6 - min(6, boxes.shape[1])), np.float32)], axis=1)
    boxes = boxes[(boxes[:, :5] != -1).any(axis=1)]
    wrong = [row for row in boxes if not (0 <= row[4] < classes and row[4] == int(row[4]))]
    if wrong:
        raise ValueError(f'{name}: label {wrong[0][4]:g} is no class number, 0 to {classes - 1}, in the box '
                         f'{wrong[0].tolist()}. Correct the annotation.')
    given, boxes = boxes, boxes.copy()
    boxes[:, :4] = np.clip(boxes[:, :4], 0, [width, height, width, height])       # NaN stays
    good = np.isfinite(given).all(axis=1) & (boxes[:, 2:4] - boxes[:, :2] >= SMALLEST).all(axis=1)
    if not good.all():
        warn('%s, %dx%d pixels: leaving out boxes without area in it: %s', name, width, height, given[~good].tolist())
    return boxes[good]


@contextmanager
def seeded(seed):
    """Python's and NumPy's generators start from `seed` inside, and go on as before behind."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class TrainTransform:
    """gluoncv's SSDDefaultTrainTransform, also for pictures without objects: these are all background.

    (picture, boxes) -> data float32 (3, size, size), class targets (anchors,), box targets (anchors, 4).
    """
    def __init__(self, size, anchors):
        anchors = anchors.as_in_context(mx.cpu())
        self._whole = SSDDefaultTrainTransform(size, size, anchors)
        self._picture = SSDDefaultTrainTransform(size, size)
        self._anchors = anchors.shape[1]

    def __call__(self, picture, boxes):
        if len(boxes):
            return self._whole(picture, boxes)
        data, _ = self._picture(picture, boxes)         # MXNet has no arrays without elements to find targets in
        return data, mx.nd.zeros((self._anchors,)), mx.nd.zeros((self._anchors, 4))


class ValTransform:
    """gluoncv's SSDDefaultValTransform; pictures without objects get one box of -1, which is what padding looks like.

    (picture, boxes) -> data float32 (3, size, size), boxes float32 (n, 6) in pixels of `data`.
    """
    def __init__(self, size):
        self._transform = SSDDefaultValTransform(size, size)

    def __call__(self, picture, boxes):
        data, boxes = self._transform(picture, boxes)
        return data, boxes if len(boxes) else np.full((1, 6), -1, np.float32)


class Samples(gluon.data.Dataset):
    """Transformed pictures of a detection set. A key is an index, or (index, seed) for random transforms.

    Each picture with bad boxes is warned of once.
    """
    def __init__(self, pictures, classes, transform, name):
        self._pictures, self._classes, self._transform, self._name = pictures, classes, transform, name
        self._warned = set()

    def __len__(self):
        return len(self._pictures)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        picture, boxes = self._pictures[index]

        def warn(*message):
            if index not in self._warned:
                logging.warning(*message)
                self._warned.add(index)

        height, width = picture.shape[:2]
        boxes = checked_boxes(boxes, width, height, self._classes, f'picture {index} of {self._name}', warn)
        if seed is None:
            return self._transform(picture, boxes)
        with seeded(seed):
            return self._transform(picture, boxes)


class ShuffledBatches(gluon.data.Sampler):
    """Batches of keys (index, seed) for one training epoch; an incomplete last batch is dropped.

    `epoch`, a pair of integers (stage, epoch), is to be set before each pass.
    """
    def __init__(self, count, batch_size, seed):
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self.epoch = (0, 0)

    def __len__(self):
        return self._count // self._batch_size

    def __iter__(self):
        draw = np.random.RandomState([self._seed, *self.epoch])
        keys = list(zip(draw.permutation(self._count).tolist(), draw.randint(2 ** 31 - 1, size=self._count).tolist()))
        for i in range(len(self)):
            yield keys[i * self._batch_size:(i + 1) * self._batch_size]


class Loaders(NamedTuple):
    """Loaders of batches; the `epoch` of `sampler` selects the next pass over `train`.

    train: data float32 (n, 3, size, size), class targets (n, anchors), box targets (n, anchors, 4).
    val, calibration: data, boxes (n, most boxes of a picture, 6), filled up with -1. Calibration takes training
    pictures that are not augmented.
    """
    train: gluon.data.DataLoader
    val: gluon.data.DataLoader
    calibration: gluon.data.DataLoader
    sampler: ShuffledBatches


def make_loaders(train, val, classes, anchors, size, batch_size, seed, calibration_batches, processes=0):
    """Loaders of the detection sets `train` and `val`, whose labels are 0 to `classes` - 1.

    Parameters
    ----------
    anchors : NDArray (1, n, 4), centres and sides in pixels, as an SSD returns them in training mode.
    """
    if len(train) < batch_size:
        raise ValueError(f'--batch-size {batch_size} is larger than the {len(train)} training pictures. '
                         f'Pass --batch-size {len(train)} or less.')
    sampler = ShuffledBatches(len(train), batch_size, seed)
    chosen = np.random.RandomState(seed).permutation(len(train))[:calibration_batches * batch_size].tolist()

    def loader(samples, batchify, keys, num_workers):
        # Workers inherit this: Ctrl-C is answered once, by the main process.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return gluon.data.DataLoader(samples, batch_sampler=keys, batchify_fn=batchify, num_workers=num_workers)
        finally:
            signal.signal(signal.SIGINT, interrupt)

    def in_order(indices):
        return [indices[i:i + batch_size] for i in range(0, len(indices), batch_size)]

    plain, boxes = ValTransform(size), Each(Stack(), Pad(pad_val=-1))
    return Loaders(
        loader(Samples(train, classes, TrainTransform(size, anchors), 'the training set'),
               Each(Stack(), Stack(), Stack()), sampler, processes),
        loader(Samples(val, classes, plain, 'the validation set'), boxes, in_order(list(range(len(val)))), processes),
        loader(Samples(train, classes, plain, 'the training set'), boxes, in_order(chosen), 0), sampler)


def make_metric(dataset, val, size, prefix):
    """What gluoncv measures on `dataset`: COCO's mAP at 0.5 to 0.95, or VOC 2007's (11 points) at an IoU of 0.5."""
    if dataset == 'coco':
        return COCODetectionMetric(val, prefix, cleanup=True, data_shape=(size, size))
    return VOC07MApMetric(iou_thresh=0.5, class_names=list(val.classes))


def precisions(metric):
    """{class: average precision in 0..1, or None where no picture has an object of it; 'mAP': their mean}."""
    names, values = metric.get()
    if isinstance(metric, COCODetectionMetric):         # percents as text; of several, the first is a summary
        names, values = [*names[1:-1], 'mAP'], [float(value) / 100 for value in (values[1:] or values)]
    return {name: float(value) if math.isfinite(value) else None for name, value in zip(names, values)}


class Set(NamedTuple):
    """A detection set, in two parts, and the names of its classes."""
    train: gluon.data.Dataset
    val: gluon.data.Dataset
    classes: Tuple[str, ...]


def read(args):
    """The Set that the command line asks for."""
    if args.dataset == 'pasted':
        train, val = read_pasted(args.data_shape, (args.train_images, args.val_images), args.dataset_root,
                                 args.canvas_dir)
        for part in (train, val):
            part.cache(args.cache_mb * 1e6)
    else:
        train, val = {'voc': read_voc, 'coco': read_coco}[args.dataset](args.dataset_root)
    return Set(train, val, tuple(val.classes))
