"""Tiny images on disk in both layouts that the recipes read."""
import io

import mxnet as mx
import numpy as np
from PIL import Image

CLASSES = ('bird', 'cat', 'dog')


def pictures(count, seed, size=16):
    """uint8 images (count, size, size, 3) and labels; the class shows in the brightest channel."""
    random = np.random.RandomState(seed)
    labels = np.arange(count) % len(CLASSES)
    images = random.randint(0, 120, (count, size, size, 3))
    images[np.arange(count), :, :, labels] += 100
    return images.astype(np.uint8), labels


def write_folder(directory, train=24, val=10):
    """`train` and `val` images as <directory>/<split>/<class>/<number>.png."""
    for seed, (split, count) in enumerate((('train', train), ('val', val))):
        for number, (image, label) in enumerate(zip(*pictures(count, seed))):
            folder = directory / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f'{number:03d}.png')
    return directory


def write_records(directory, train=24, val=10):
    """`train` and `val` images as <directory>/<split>.rec with its index."""
    directory.mkdir(exist_ok=True)
    for seed, (split, count) in enumerate((('train', train), ('val', val))):
        paths = [str(directory / f'{split}.{end}') for end in ('idx', 'rec')]
        file = mx.recordio.MXIndexedRecordIO(*paths, 'w')
        for number, (image, label) in enumerate(zip(*pictures(count, seed))):
            header = mx.recordio.IRHeader(0, float(label), number, 0)
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, 'PNG')
            file.write_idx(number, mx.recordio.pack(header, encoded.getvalue()))
        file.close()
    return directory
