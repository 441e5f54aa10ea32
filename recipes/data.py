"""Images for the recipes: read once, kept as uint8, augmented a batch at a time in NumPy.

Everything random in an epoch (order, crops, mirroring) is drawn by `ShuffledBatches` in the main process,
from (seed, stage, epoch) alone. Data workers only follow those draws, so neither their number nor an
interruption changes a pixel of what the network sees.
"""
import io
import math
import os
import signal
from typing import NamedTuple, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet import gluon
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp')


class Preset(NamedTuple):
    """How pixels become network input: (pixel - mean) / std for R, G and B, pixels in 0..255."""
    mean: Tuple[float, float, float]
    std: Tuple[float, float, float]
    pad: int            # zero pixels added on every side before a training crop
    mirror: bool        # mirror half of the training images
    input_size: int     # side of the square crop the network sees
    # Smallest part of an image that a training crop covers before it is resized; None: crops are not resized.
    area: Optional[float] = None


def _unit(*values):
    """Constants published for pixels in 0..1, as constants for pixels in 0..255."""
    return tuple(255 * value for value in values)


PRESETS = {
    # A mirrored digit is another shape, so digits are only shifted.
    'digits': Preset(_unit(0.305, 0.305, 0.305), _unit(0.376, 0.376, 0.376), 4, False, 32),
    'cifar': Preset(_unit(0.4914, 0.4822, 0.4465), _unit(0.2023, 0.1994, 0.2010), 4, True, 32),
    # As networks are trained on ImageNet: crops of 8 to 100 % of the area, sides as 3 to 4 at most, resized; validation
    # on the middle of images whose shorter side is 8/7 of the crop. Images may be of different sizes.
    'imagenet': Preset((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 0, True, 224, 0.08),
    # For images that have been brought to one size, little larger than the crop.
    'imagenette': Preset((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 0, True, 224),
}
ASPECT = 4 / 3
MARGIN = 8 / 7


class Images(gluon.data.Dataset):
    """Images of one size and their labels, decoded on demand or kept in memory after `cache`.

    Parameters
    ----------
    encoded : sequence of (image, label): uint8 array (H, W, 3), bytes of an image file, or its path.
    resize : int or None. Shorter side in pixels, the middle square of which is kept; None changes nothing.
    name : str for messages.
    classes : int or None. Labels must be below it.

    With `several_sizes`, images need not be of the size of the first; they are not cached then.
    """
    several_sizes = False

    def __init__(self, encoded, resize=None, name='images', classes=None):
        self._encoded = encoded
        self._resize = resize
        self._name = name
        self._classes = classes
        self._pixels = self._labels = None
        if not len(encoded):
            raise ValueError(f'{name} holds no images.')
        self.shape = self._decode(encoded[0][0], 0).shape

    def __len__(self):
        return len(self._encoded)

    def __getitem__(self, key):
        """(index, what was drawn for it) -> (pixels, label, what was drawn); `Batchify` crops."""
        index, *drawn = key
        return (*self.read(index), *drawn)

    def read(self, index):
        """uint8 array (H, W, 3) and integer label of one image."""
        if self._pixels is not None:
            return self._pixels[index], self._labels[index]
        image, label = self._encoded[index]
        pixels = self._decode(image, index)
        if self._classes and label >= self._classes:
            raise ValueError(f'image {index} of {self._name} has label {label}, but validation has only '
                             f'labels 0 to {self._classes - 1}. Add validation images of every class.')
        if pixels.shape != self.shape and not self.several_sizes:
            raise ValueError(f'image {index} of {self._name} has shape {pixels.shape}, the first one '
                             f'{self.shape}. Pass --resize {min(self.shape[:2])} to bring all to one size.')
        return pixels, label

    def split(self, count):
        """(all but `count` images, those): chosen at random, always the same ones."""
        order = np.random.RandomState(0).permutation(len(self))
        return tuple(Images(Chosen(self._encoded, np.sort(part)), self._resize, self._name, self._classes)
                     for part in (order[count:], order[:count]))

    @property
    def nbytes(self):
        """Memory that the decoded images take."""
        return len(self) * int(np.prod(self.shape))

    def cache(self, limit):
        """Decode every image into memory once, if that takes at most `limit` bytes and all are of one size."""
        if self.several_sizes or self.nbytes > limit:
            return self
        pixels, labels = np.empty((len(self),) + self.shape, np.uint8), np.empty(len(self), np.int32)
        for i in tqdm(range(len(self)), desc=f'reading {self._name}', unit='img', disable=None, leave=False):
            pixels[i], labels[i] = self.read(i)
        self._pixels, self._labels = pixels, labels
        return self

    def _decode(self, image, index):
        if not isinstance(image, np.ndarray):
            try:
                with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
                    image = np.asarray(self._resized(file.convert('RGB')))
            except UnidentifiedImageError as error:
                raise ValueError(f'image {index} of {self._name} cannot be decoded: {error}.') from error
        elif self._resize:
            image = np.asarray(self._resized(Image.fromarray(image)))
        return image

    def _resized(self, image):
        if not self._resize:
            return image
        width, height = image.size
        ratio = self._resize / min(width, height)
        width, height = max(self._resize, round(width * ratio)), max(self._resize, round(height * ratio))
        left, top = (width - self._resize) // 2, (height - self._resize) // 2
        image = image.resize((width, height), Image.BILINEAR)
        return image.crop((left, top, left + self._resize, top + self._resize))


class Chosen:
    """Some of the items of a sequence."""
    def __init__(self, items, indices):
        self._items, self._indices = items, indices

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, position):
        return self._items[self._indices[position]]


class Records:
    """(bytes, label) by position in a RecordIO file, as in `gluon.data.vision.ImageRecordDataset`.

    It stands in for that data set because its decoder is half as fast as Pillow; the pixels are the same.
    """
    def __init__(self, path):
        index = os.path.splitext(path)[0] + '.idx'
        if not os.path.exists(index):
            raise ValueError(f'{path} has no index file beside it ({os.path.basename(index)}). '
                             "Make one with MXNet's tools/rec2idx.py, or pack again with im2rec.py.")
        self._path = path
        self._file = mx.recordio.MXIndexedRecordIO(index, path, 'r')

    def __len__(self):
        return len(self._file.keys)

    def __getitem__(self, position):
        header, image = mx.recordio.unpack(self._file.read_idx(self._file.keys[position]))
        if np.size(header.label) != 1 or int(header.label) != header.label or header.label < 0:
            raise ValueError(f'record {position} of {self._path} has label {header.label}; it needs one '
                             'class number, 0, 1, 2, ...')
        return image, int(header.label)


def read_digits(size):
    """scikit-learn's 1,797 scanned digits: 1,437 to train, 360 to validate, always the same ones.

    Returns (train, validation, classes); the 8x8 images are enlarged to (size, size, 3).
    """
    from sklearn.datasets import load_digits
    digits = load_digits()
    pictures = [Image.fromarray(image) for image in np.round(digits.images * (255 / 16)).astype(np.uint8)]
    pixels = [np.asarray(picture.resize((size, size), Image.BILINEAR).convert('RGB')) for picture in pictures]
    items = list(zip(pixels, digits.target.tolist()))
    order = np.random.RandomState(0).permutation(len(items))
    parts = [[items[i] for i in order[:1437]], [items[i] for i in order[1437:]]]
    return (*[Images(part, name=f'digits {name}') for part, name in zip(parts, ('train', 'val'))], 10)


def read_cifar10(root, resize):
    """CIFAR-10 by Gluon's own loader, downloaded to `root` if need be. Returns as `read_directory`."""
    parts = []
    for train in (True, False):
        try:
            images, labels = gluon.data.vision.CIFAR10(root, train=train)[:]
        except Exception as error:          # whatever the network or the file system brings up
            raise ValueError(f'CIFAR-10 is not in {root} and cannot be downloaded ({error}). '
                             'Pass --data-dir with RecordIO files or image folders instead.') from error
        items = list(zip(images.asnumpy(), labels.tolist()))
        parts.append(Images(items, resize, f"cifar10 {'train' if train else 'val'}"))
    return (*parts, 10)


def read_directory(directory, resize):
    """RecordIO files train.rec, val.rec or image folders train/<class>/*, val/<class>/*.

    Returns (train, validation, classes).
    """
    if os.path.isfile(os.path.join(directory, 'train.rec')):
        paths = [os.path.join(directory, name) for name in ('train.rec', 'val.rec')]
        if not os.path.isfile(paths[1]):
            raise ValueError(f'{directory} has train.rec but no val.rec. Add it: accuracy is measured on it.')
        parts = [Records(path) for path in paths]
        classes = 1 + max(label for _, label in (parts[1][i] for i in range(len(parts[1]))))
    elif os.path.isdir(os.path.join(directory, 'train')):
        paths = [os.path.join(directory, name) for name in ('train', 'val')]
        names = [_class_names(path) for path in paths]
        if names[0] != names[1]:
            raise ValueError(f'{paths[0]} and {paths[1]} must have the same classes; only one of them has '
                             f'{sorted(set(names[0]) ^ set(names[1]))}.')
        parts, classes = [_folder(path, names[0]) for path in paths], len(names[0])
    else:
        raise ValueError(f'{directory} has neither train.rec nor train/. Point --data-dir at RecordIO files '
                         '(train.rec, train.idx, val.rec, val.idx) or at image folders (train/<class>/*.jpg, '
                         'val/<class>/*.jpg).')
    return (*[Images(part, resize, path, classes) for part, path in zip(parts, paths)], classes)


def _class_names(path):
    if not os.path.isdir(path):
        raise ValueError(f'{path} does not exist. Add it: accuracy is measured on the images in it.')
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


def _folder(path, names):
    items = []
    for label, name in enumerate(names):
        for file in sorted(os.listdir(os.path.join(path, name))):
            if file.lower().endswith(IMAGE_SUFFIXES):
                items.append((os.path.join(path, name, file), label))
    return items


class ShuffledBatches(gluon.data.Sampler):
    """Batches of keys for one training epoch; an incomplete last batch is dropped.

    A key is (index, top, left, mirror), or for crops that are resized (index, area, aspect, top, left, mirror) with
    four numbers in 0..1.

    Of several workers, number `rank` of `workers` gets its part of every batch of all of them.

    Parameters
    ----------
    images : Images.  batch_size : int.  seed : int.
    preset : Preset.  size : int, side of the crop in pixels.

    `epoch`, a pair of integers (stage, epoch), is to be set before each pass.
    """
    def __init__(self, images, batch_size, seed, preset, size, rank=0, workers=1):
        self._count, self._batch_size, self._seed, self._preset = len(images), batch_size, seed, preset
        self._rank, self._workers = rank, workers
        self._room = [side + 2 * preset.pad - size for side in images.shape[:2]]
        self.epoch = (0, 0)

    def __len__(self):
        return self._count // (self._batch_size * self._workers)

    def __iter__(self):
        random = np.random.RandomState([self._seed, *self.epoch])
        order = random.permutation(self._count)
        if self._preset.area:
            drawn = list(random.uniform(size=(4, self._count)))
        else:
            drawn = [random.randint(0, room + 1, self._count) for room in self._room]
        mirror = random.randint(0, 2, self._count) * self._preset.mirror
        keys = list(zip(*(column.tolist() for column in (order, *drawn, mirror))))
        for i in range(self._rank, len(self) * self._workers, self._workers):
            yield keys[i * self._batch_size:(i + 1) * self._batch_size]


class CentreBatches(gluon.data.Sampler):
    """Batches of keys of the centre crops of the images `indices`, in order; the last one may be smaller."""
    def __init__(self, images, batch_size, preset, size, indices):
        centre = () if preset.area else (*((side + 2 * preset.pad - size) // 2 for side in images.shape[:2]), 0)
        self._keys = [(int(i), *centre) for i in indices]
        self._batch_size = batch_size

    def __len__(self):
        return -(-len(self._keys) // self._batch_size)

    def __iter__(self):
        for i in range(len(self)):
            yield self._keys[i * self._batch_size:(i + 1) * self._batch_size]


class Batchify:
    """Samples of `Images` -> data float32 (n, 3, size, size), label float32 (n,); cropped and normalized."""
    def __init__(self, preset, size):
        self._pad, self._size = preset.pad, size
        self._mean, self._std = (np.float32(c).reshape(1, 3, 1, 1) for c in (preset.mean, preset.std))

    def __call__(self, samples):
        pixels, label, *drawn = zip(*samples)
        pixels = self.crop(pixels, *drawn)
        data = pixels.transpose(0, 3, 1, 2).astype(np.float32, order='C')
        data -= self._mean
        data /= self._std
        return mx.nd.array(data), mx.nd.array(label, dtype=np.float32)

    def crop(self, pixels, top, left, mirror):
        """uint8 (n, size, size, 3) of n images of one size."""
        pixels = np.pad(np.stack(pixels), ((0, 0), (self._pad,) * 2, (self._pad,) * 2, (0, 0)))
        span = np.arange(self._size)
        rows = np.array(top)[:, None] + span
        columns = np.array(left)[:, None] + np.where(np.array(mirror)[:, None], span[::-1], span)
        return pixels[np.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]


class BatchifyResized(Batchify):
    """As `Batchify`, for images of any sizes: crops of a part of the area, brought to the size the network sees."""
    def __init__(self, preset, size):
        super().__init__(preset, size)
        self._area = preset.area

    def crop(self, pixels, *drawn):
        """uint8 (n, size, size, 3); without draws, the middle of images of which a margin is left out."""
        boxes = [self._box(image.shape[:2], *numbers) for image, *numbers in zip(pixels, *drawn)]
        cut = [np.asarray(Image.fromarray(image).resize((self._size, self._size), Image.BILINEAR, box))
               for image, box in zip(pixels, boxes)]
        mirror = drawn[-1] if drawn else [False] * len(cut)
        return np.stack([image[:, ::-1] if mirrored else image for image, mirrored in zip(cut, mirror)])

    def _box(self, shape, *numbers):
        """(left, top, right, bottom) of what is kept."""
        height, width = shape
        if not numbers:
            side = min(shape) / MARGIN
            return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2
        area, aspect, top, left, _ = numbers
        area = (self._area + (1 - self._area) * area) * height * width
        aspect = ASPECT ** (2 * aspect - 1)
        tall, wide = min(height, math.sqrt(area / aspect)), min(width, math.sqrt(area * aspect))
        left, top = left * (width - wide), top * (height - tall)
        return left, top, left + wide, top + tall


class Loaders(NamedTuple):
    """Loaders of (data, label) batches; the `epoch` of `sampler` selects the next pass over `train`."""
    train: gluon.data.DataLoader
    val: gluon.data.DataLoader
    calibration: gluon.data.DataLoader
    sampler: ShuffledBatches
    train_count: int        # images per training epoch
    val_count: int


def make_loaders(train, val, preset, size, batch_size, seed, calibration_batches, processes=0, rank=0, workers=1):
    """Loaders for training, validation (every image) and calibration (training images, not augmented).

    Worker `rank` of `workers` gets its share of the training and validation images, and all the calibration images.
    """
    for images, name in ((train, 'training'), (val, 'validation')):
        if min(images.shape[:2]) + 2 * preset.pad < size and not preset.area:
            height, width = images.shape[:2]
            raise ValueError(f'--input-size {size} does not fit into the {name} images of {height}x{width} '
                             f'pixels. Pass --input-size {min(height, width)}, or --resize {size}.')
        images.several_sizes = preset.area is not None
    if len(train) < batch_size * workers:
        raise ValueError(f'--batch-size {batch_size} is larger than the {len(train)} training images'
                         + (f' divided by {workers} workers' if workers > 1 else '')
                         + f'. Pass --batch-size {len(train) // workers} or less.')
    sampler = ShuffledBatches(train, batch_size, seed, preset, size, rank, workers)
    chosen = np.random.RandomState(seed).permutation(len(train))[:calibration_batches * batch_size]
    batchify = (BatchifyResized if preset.area else Batchify)(preset, size)

    def loader(images, batches, num_workers):
        # Workers inherit this: Ctrl-C is answered once, by the main process.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return gluon.data.DataLoader(images, batch_sampler=batches, batchify_fn=batchify,
                                         num_workers=num_workers)
        finally:
            signal.signal(signal.SIGINT, interrupt)

    return Loaders(loader(train, sampler, processes),
                   loader(val, CentreBatches(val, batch_size, preset, size, range(rank, len(val), workers)), processes),
                   loader(train, CentreBatches(train, batch_size, preset, size, chosen), 0),
                   sampler, len(sampler) * batch_size * workers, len(val))
