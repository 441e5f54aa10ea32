"""What the network sees depends on the seed and the epoch alone, and readers give every image as it is."""
import mxnet as mx
import numpy as np
import pytest
from PIL import Image

import data
from tiny import pictures, write_folder, write_records

CIFAR = data.PRESETS['cifar']


def loaders(train, val, workers=0, seed=0, batch_size=8, size=16):
    return data.make_loaders(train, val, CIFAR, size, batch_size, seed, 2, workers)


def epoch_of(found, epoch):
    found.sampler.epoch = (0, epoch)
    batches = [(images.asnumpy(), labels.asnumpy()) for images, labels in found.train]
    return [np.concatenate(parts) for parts in zip(*batches)]


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_do_not_change_a_pixel(folder, workers):
    train, val, _ = data.read_directory(str(folder), None)
    expected = epoch_of(loaders(train, val), epoch=3)
    for mine, theirs in zip(epoch_of(loaders(train, val, workers), epoch=3), expected):
        np.testing.assert_array_equal(mine, theirs)


def test_an_epoch_does_not_depend_on_those_before_it(folder):
    train, val, _ = data.read_directory(str(folder), None)
    straight, jump = loaders(train, val), loaders(train, val)
    epoch_of(straight, 0)
    np.random.seed(5)
    mx.random.seed(5)
    np.testing.assert_array_equal(epoch_of(straight, 1)[0], epoch_of(jump, 1)[0])


def test_epochs_and_seeds_differ(folder):
    train, val, _ = data.read_directory(str(folder), None)
    first = epoch_of(loaders(train, val), 0)[0]
    assert not np.array_equal(first, epoch_of(loaders(train, val), 1)[0])
    assert not np.array_equal(first, epoch_of(loaders(train, val, seed=1), 0)[0])


def test_keeping_images_in_memory_changes_nothing(records):
    train, val, _ = data.read_directory(str(records), None)
    before = epoch_of(loaders(train, val), 0)[0]
    np.testing.assert_array_equal(before, epoch_of(loaders(train.cache(1e9), val), 0)[0])


def test_a_training_epoch_takes_each_image_at_most_once(folder):
    train, val, _ = data.read_directory(str(folder), None)
    found = loaders(train, val, batch_size=7)
    chosen = [index for batch in found.sampler for index, *_ in batch]
    assert len(chosen) == len(set(chosen)) == found.train_count == 21


@pytest.mark.parametrize('write', [write_folder, write_records])
def test_validation_takes_every_image_as_it_is(tmp_path, write):
    train, val, classes = data.read_directory(str(write(tmp_path / 'images')), None)
    batches = list(loaders(train, val).val)
    assert classes == 3 and [len(labels) for _, labels in batches] == [8, 2]
    seen = np.concatenate([images.asnumpy() for images, _ in batches])
    labels = np.concatenate([labels.asnumpy() for _, labels in batches])
    images, expected_labels = pictures(10, seed=1)
    order = np.argsort(expected_labels, kind='stable') if write is write_folder else np.arange(10)
    np.testing.assert_array_equal(labels, expected_labels[order])
    pixels = seen.transpose(0, 2, 3, 1) * np.array(CIFAR.std) + np.array(CIFAR.mean)
    np.testing.assert_allclose(pixels, images[order], atol=1e-3)     # float32 rounding of values up to 255


def test_records_decode_as_gluon_decodes_them(records):
    train, _, _ = data.read_directory(str(records), None)
    reference = mx.gluon.data.vision.ImageRecordDataset(str(records / 'train.rec'))
    for i in (0, 7):
        image, label = reference[i]
        np.testing.assert_array_equal(train.read(i)[0], image.asnumpy())
        assert train.read(i)[1] == label


def test_crops_shift_and_mirror_the_image():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)[:, :2]
    preset = data.Preset((0, 0, 0), (1, 1, 1), 1, True, 2)
    out, _ = data.Batchify(preset, 2)([(image, 0, 0, 1, 0), (image, 0, 1, 1, 1)])
    down, mirrored = out.asnumpy().transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(down, np.stack([np.zeros((2, 3)), image[0]]))
    np.testing.assert_array_equal(mirrored, image[:, ::-1])


def test_resize_keeps_the_middle_square():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    pixels, _ = data.Images([(image, 0)], resize=20).read(0)
    assert pixels.shape == (20, 20, 3) and (pixels[:, 2:-2] == 200).all()


def test_digits_are_split_the_same_way_every_time():
    train, val, classes = data.read_digits(32)
    assert (len(train), len(val), classes, train.shape) == (1437, 360, 10, (32, 32, 3))
    repeat, _, _ = data.read_digits(32)
    np.testing.assert_array_equal(train.read(5)[0], repeat.read(5)[0])
    assert train.read(0)[0].max() > 240         # full ink, up to interpolation


def test_a_directory_without_images_says_what_belongs_there(tmp_path):
    with pytest.raises(ValueError, match=r'neither train.rec nor train/. Point --data-dir at'):
        data.read_directory(str(tmp_path), None)


def test_a_missing_index_is_named(records):
    (records / 'val.idx').unlink()
    with pytest.raises(ValueError, match=r'val.rec has no index file beside it \(val.idx\)'):
        data.read_directory(str(records), None)


def test_missing_validation_records_are_named(records):
    (records / 'val.rec').unlink()
    with pytest.raises(ValueError, match='has train.rec but no val.rec'):
        data.read_directory(str(records), None)


def test_classes_of_both_folders_must_agree(folder):
    (folder / 'val' / 'cat').rename(folder / 'val' / 'cow')
    with pytest.raises(ValueError, match=r"only one of them has \['cat', 'cow'\]"):
        data.read_directory(str(folder), None)


def test_images_of_two_sizes_ask_for_resize():
    items = [(np.zeros((16, 16, 3), np.uint8), 0), (np.zeros((20, 18, 3), np.uint8), 1)]
    with pytest.raises(ValueError, match=r'image 1 of mine has shape \(20, 18, 3\).*Pass --resize 16'):
        data.Images(items, name='mine').cache(1e9)
    assert data.Images(items, resize=16).cache(1e9).shape == (16, 16, 3)


def test_a_file_that_is_no_image_is_named(folder):
    broken = folder / 'train' / 'bird' / '000.png'
    broken.write_bytes(b'not an image')
    with pytest.raises(ValueError, match=r'image 0 of .*train cannot be decoded'):
        data.read_directory(str(folder), None)


def test_a_batch_larger_than_the_data_is_refused(folder):
    train, val, _ = data.read_directory(str(folder), None)
    with pytest.raises(ValueError, match='--batch-size 64 is larger than the 24 training images'):
        loaders(train, val, batch_size=64)


def test_a_crop_larger_than_the_images_is_refused(folder):
    train, val, _ = data.read_directory(str(folder), None)
    with pytest.raises(ValueError, match='--input-size 32 does not fit into the training images of 16x16'):
        loaders(train, val, size=32)


@pytest.mark.slow
def test_the_preprocessing_gives_the_known_accuracy_of_cifar10(shared):
    from gluoncv.model_zoo import get_model

    from loop import evaluate
    _, val, classes = data.read_directory(str(shared / 'data' / 'cifar10'), None)
    net = get_model('cifar_resnet20_v1', classes=classes)
    net.load_parameters(str(shared / 'weights' / 'cifar_resnet20_v1.params'))
    net.hybridize(static_alloc=True, static_shape=True)
    assert evaluate(net, loaders(val, val, batch_size=100, size=32).val) == 0.8676


def test_held_out_images_are_others_and_always_the_same():
    images = data.Images([(np.full((4, 4, 3), i, np.uint8), i % 3) for i in range(10)])
    rest, held = images.split(3)
    numbers = [[int(part.read(i)[0][0, 0, 0]) for i in range(len(part))] for part in (rest, held)]
    assert [len(part) for part in numbers] == [7, 3] and sorted(sum(numbers, [])) == list(range(10))
    again = images.split(3)[1]
    assert [int(again.read(i)[0][0, 0, 0]) for i in range(3)] == numbers[1]


IMAGENET = data.PRESETS['imagenet']


def test_resized_crops_cover_the_part_of_the_area_that_was_drawn_and_stay_inside():
    made = data.BatchifyResized(IMAGENET, 8)
    random = np.random.default_rng(0)
    for shape in [(20, 30), (50, 10), (8, 8)]:
        for numbers in random.uniform(size=(200, 4)):
            left, top, right, bottom = made._box(shape, *numbers, 0)
            assert 0 <= left < right <= shape[1] + 1e-9 and 0 <= top < bottom <= shape[0] + 1e-9
            part = (right - left) * (bottom - top) / (shape[0] * shape[1])
            assert part <= 0.08 + 0.92 * numbers[0] + 1e-9
            if left > 0 and top > 0 and right < shape[1] - 1e-9 and bottom < shape[0] - 1e-9:
                assert part == pytest.approx(0.08 + 0.92 * numbers[0])
                assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9


def test_images_of_several_sizes_are_cropped_mirrored_and_validated_on_their_middle():
    random = np.random.default_rng(0)
    items = [(random.integers(0, 255, (size, size + 4, 3)).astype(np.uint8), 0) for size in (40, 64, 48, 32)]
    found = data.make_loaders(data.Images(items), data.Images(items), IMAGENET, 16, 2, 0, 1)
    first, second = epoch_of(found, 0), epoch_of(found, 1)
    assert first[0].shape == (4, 3, 16, 16) and not np.array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[0], epoch_of(found, 0)[0])
    batch = next(iter(found.val))[0].asnumpy()
    expected = Image.fromarray(items[0][0]).resize((16, 16), Image.BILINEAR, (4.5, 2.5, 39.5, 37.5))
    expected = (np.asarray(expected, np.float32) - IMAGENET.mean) / IMAGENET.std
    np.testing.assert_allclose(batch[0].transpose(1, 2, 0), expected, atol=1e-5)
    assert data.Images(items[:1]).cache(10)._pixels is None
