"""Pasted pictures, their boxes, what becomes of bad ones, and gluoncv's transforms and metric on them."""
import random

import mxnet as mx
import numpy as np
import pytest
from gluoncv.loss import SSDMultiBoxLoss
from mxnet import autograd
from PIL import Image

import detection_data
from detection_data import (
    PastedDetection,
    ShuffledBatches,
    TrainTransform,
    ValTransform,
    checked_boxes,
    make_loaders,
    make_metric,
    precisions,
    read_pasted,
)
from tiny import CLASSES, write_folder

SIZE = 48
# 64 anchors of one eighth of the side on a grid, as (1, n, 4) centres and sides.
GRID = (np.stack(np.meshgrid(*[np.arange(8) + 0.5] * 2), axis=-1).reshape(-1, 2) * SIZE / 8).astype(np.float32)
ANCHORS = mx.nd.array(np.concatenate([GRID, np.full((64, 2), SIZE / 4, np.float32)], axis=1)[None])


@pytest.fixture(scope='module')
def pasted():
    """Training and validation pictures of digits."""
    return read_pasted(SIZE, (60, 30))


class Given:
    """Pictures of one colour with the boxes given."""
    classes = CLASSES

    def __init__(self, *boxes):
        self._boxes = boxes

    def __len__(self):
        return len(self._boxes)

    def __getitem__(self, index):
        return mx.nd.full((SIZE, SIZE, 3), 99, dtype=np.uint8), np.array(self._boxes[index], np.float32)


def loaders(train, val=None, batch_size=4, **options):
    return make_loaders(train, val or train, len(train.classes), ANCHORS, SIZE, batch_size, 0, 1, **options)


def test_pictures_follow_from_seed_part_and_index(pasted):
    again = read_pasted(SIZE, (60, 30))
    cached = read_pasted(SIZE, (60, 30))[0].cache(1e9)
    for part, other in zip(pasted, again):
        for i in (29, 3, 0):
            assert all(np.array_equal(a, b) for a, b in zip(part.read(i), other.read(i)))
            assert np.array_equal(part[i][0].asnumpy(), part.read(i)[0])
    assert all(np.array_equal(a, b) for a, b in zip(cached.read(7), pasted[0].read(7)))
    longer, otherwise = read_pasted(SIZE, (61, 1))[0], read_pasted(SIZE, (60, 1), seed=1)[0]
    assert np.array_equal(longer.read(7)[0], pasted[0].read(7)[0])
    assert not np.array_equal(otherwise.read(7)[0], pasted[0].read(7)[0])
    with pytest.raises(IndexError, match='60'):
        pasted[0].read(60)


def test_a_cache_too_large_is_not_made(pasted):
    part = read_pasted(SIZE, (2, 1))[0]
    assert part.cache(1000)._cache is None


def test_boxes_lie_inside_and_cover_what_was_pasted(pasted):
    for part in pasted:
        for i in range(len(part)):
            picture, boxes, chosen, owner = part.compose(i)
            assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
            assert boxes.shape == (len(chosen), 6) and boxes.dtype == np.float32 and len(boxes) <= part.MOST
            assert set(np.unique(owner)) <= {-1, *range(len(boxes))}
            for k, (xmin, ymin, xmax, ymax, label, difficult) in enumerate(boxes):
                assert 0 <= xmin < xmax <= SIZE and 0 <= ymin < ymax <= SIZE
                assert label == part._objects.read(chosen[k])[1] and difficult == 0
                assert 0.17 * SIZE < np.sqrt((xmax - xmin) * (ymax - ymin)) < 0.73 * SIZE
                rows, columns = np.nonzero(owner == k)
                assert ymin <= rows.min() and rows.max() < ymax and xmin <= columns.min() and columns.max() < xmax
                assert len(rows) >= (1 - part.HIDDEN) * (xmax - xmin) * (ymax - ymin)
            if len(boxes) == 1:         # nothing hides it: inside of its ring, the object as it was resized
                left, top, right, bottom = boxes[0, :4].astype(int)
                pixels, _ = part._objects.read(chosen[0])
                pixels = Image.fromarray(pixels).resize((right - left, bottom - top), Image.BILINEAR)
                assert np.array_equal(picture[top + 1:bottom - 1, left + 1:right - 1],
                                      np.asarray(pixels)[1:-1, 1:-1])


def test_a_few_pictures_have_no_object_and_every_number_to_four_occurs():
    part = read_pasted(32, (150, 1))[0]
    numbers = [len(part.read(i)[1]) for i in range(150)]
    counts = np.bincount(numbers, minlength=5)
    assert 1 <= counts[0] <= 15 and len(counts) == 5 and (counts[1:] > 10).all()


def test_training_and_validation_share_no_pixels(pasted):
    train, val = pasted
    objects = [{part._objects.read(i)[0].tobytes() for i in range(len(part._objects))} for part in pasted]
    assert len(train._objects) == 1437 and len(val._objects) == 360 and not objects[0] & objects[1]
    for i in range(2):
        left, right = (part._canvases.read(i)[0] for part in pasted)
        assert left.shape[1] + right.shape[1] == 640 and not np.shares_memory(left, right)


def test_objects_and_canvases_come_from_folders(tmp_path):
    images = write_folder(tmp_path)
    train, val = read_pasted(SIZE, (4, 3), str(images), str(images))
    assert train.classes == CLASSES and len(train) == 4 and len(val) == 3
    assert all(label in range(3) for part in (train, val) for i in range(3) for label in part.read(i)[1][:, 4])
    (images / 'classes.txt').write_text('a\nb\n')
    with pytest.raises(ValueError, match='2 names, but there are images of 3'):
        read_pasted(SIZE, (4, 3), str(images))
    with pytest.raises(ValueError, match='Point --canvas-dir at'):
        read_pasted(SIZE, (4, 3), canvas_dir=str(tmp_path / 'val'))


def test_objects_of_cifar10(shared):
    train, val = read_pasted(SIZE, (3, 3), str(shared / 'data' / 'cifar10'))
    assert train.classes == detection_data.CIFAR10 and train.read(0)[0].shape == (SIZE, SIZE, 3)
    assert len(train._objects) == 50000 and len(val._objects) == 10000


def test_bad_boxes_are_dropped_with_one_warning():
    told = []
    good = [[1, 2, 10, 12, 0, 0], [-5, 40, 60, 60, 2, 1]]
    bad = [[9, 9, 9, 20, 1, 0], [20, 9, 10, 20, 1, 0], [float('nan'), 1, 9, 9, 1, 0], [60, 60, 70, 70, 1, 0],
           [0, 0, float('inf'), 9, 1, 0]]
    found = checked_boxes(good + bad, 48, 48, 3, 'picture 7', lambda *message: told.append(message[0] % message[1:]))
    assert found.tolist() == [good[0], [0, 40, 48, 48, 2, 1]] and found.dtype == np.float32
    assert len(told) == 1 and 'picture 7' in told[0] and '[60.0, 60.0, 70.0, 70.0, 1.0, 0.0]' in told[0]
    assert 'nan' in told[0] and '[1.0, 2.0' not in told[0]


@pytest.mark.parametrize('boxes', [[], np.zeros((0, 5)), np.zeros((0, 6))])
def test_no_boxes_are_six_columns(boxes):
    assert checked_boxes(boxes, 48, 48, 3, 'it').shape == (0, 6)


@pytest.mark.parametrize('columns', [5, 6])
def test_rows_of_minus_one_are_padding(columns):
    assert checked_boxes([[-1] * columns], 48, 48, 3, 'it').shape == (0, 6)
    assert checked_boxes([[-1] * 5, [1, 2, 3, 4, 1]], 48, 48, 3, 'it').tolist() == [[1, 2, 3, 4, 1, 0]]


def test_boxes_without_a_sixth_column_are_not_difficult():
    assert checked_boxes([[1, 2, 3, 4, 1]], 48, 48, 3, 'it').tolist() == [[1, 2, 3, 4, 1, 0]]


@pytest.mark.parametrize('label', [3, -1, 0.5, float('nan')])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match='picture 7: label .* is no class number, 0 to 2'):
        checked_boxes([[1, 1, 9, 9, label]], 48, 48, 3, 'picture 7')
    with pytest.raises(ValueError, match='picture 1 of the training set: label'):
        list(loaders(Given([[1, 1, 9, 9, 1]], [[1, 1, 9, 9, label]]), batch_size=2).train)


def test_each_bad_picture_is_warned_of_once(caplog):
    given = loaders(Given([[1, 1, 9, 9, 1, 0], [5, 5, 5, 9, 1, 0]], []), batch_size=2)
    for _ in range(2):
        for batch in given.train:
            assert all(np.isfinite(array.asnumpy()).all() for array in batch)
    assert [record.getMessage() for record in caplog.records] == [
        'picture 0 of the training set, 48x48 pixels: leaving out boxes without area in it: '
        '[[5.0, 5.0, 5.0, 9.0, 1.0, 0.0]]']


def test_transforms_take_pictures_without_objects():
    picture, none = mx.nd.zeros((SIZE, SIZE, 3), dtype=np.uint8), np.zeros((0, 6), np.float32)
    for _ in range(8):
        data, classes, boxes = TrainTransform(SIZE, ANCHORS)(picture, none)
        assert data.shape == (3, SIZE, SIZE) and classes.shape == (64,) and boxes.shape == (64, 4)
        assert not classes.asnumpy().any() and not boxes.asnumpy().any()
    _, boxes = ValTransform(SIZE)(picture, none)
    assert boxes.tolist() == [[-1] * 6]


def test_targets_are_those_of_gluoncv():
    box = [12, 12, 24, 24, 2, 0]        # an anchor's place
    with detection_data.seeded(0):
        data, classes, boxes = TrainTransform(SIZE, ANCHORS)(mx.nd.zeros((SIZE, SIZE, 3), dtype=np.uint8),
                                                             np.array([box], np.float32))
    assert set(classes.asnumpy()) == {0, 3} and data.dtype == np.float32
    assert not boxes.asnumpy()[classes.asnumpy() == 0].any()


def test_a_batch_without_any_object_has_finite_losses_and_gradients():
    batch = next(iter(loaders(Given([], [], [], [])).train))
    assert not batch[1].asnumpy().any()
    scores, boxes = mx.nd.random.normal(shape=(4, 64, 4)), mx.nd.random.normal(shape=(4, 64, 4))
    for array in (scores, boxes):
        array.attach_grad()
    with autograd.record():
        losses, ce, l1 = SSDMultiBoxLoss()([scores], [boxes], [batch[1]], [batch[2]])
    autograd.backward(losses)
    for array in (*losses, *ce, *l1, scores.grad, boxes.grad):
        assert not array.asnumpy().any()


def test_random_transforms_follow_from_the_epoch_alone():
    train, val = read_pasted(SIZE, (8, 4))
    one, other = loaders(train, val), loaders(train, val)
    random.seed(5)
    np.random.seed(5)
    for given in (one, other):
        given.sampler.epoch = (0, 3)
    first = [[array.asnumpy() for array in batch] for batch in one.train]
    state = random.getstate(), np.random.get_state()[1].tolist()
    random.seed(6)
    np.random.seed(6)
    second = [[array.asnumpy() for array in batch] for batch in other.train]
    assert len(first) == len(train) // 4
    for mine, theirs in zip(first, second):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs))
    random.seed(5)
    np.random.seed(5)
    assert state == (random.getstate(), np.random.get_state()[1].tolist())      # left as they were
    other.sampler.epoch = (1, 3)
    assert not np.array_equal(next(iter(other.train))[0].asnumpy(), first[0][0])


def test_data_workers_change_nothing():
    train, val = read_pasted(SIZE, (4, 5))
    for part in ('train', 'val'):
        one, other = (getattr(loaders(train, val, processes=processes), part) for processes in (0, 1))
        for mine, theirs in zip(one, other):
            assert all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in zip(mine, theirs))


def test_each_picture_is_seen_once_an_epoch_and_batches_are_whole():
    sampler = ShuffledBatches(10, 3, seed=0)
    sampler.epoch = (0, 1)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 3 and all(len(batch) == 3 for batch in batches)
    assert len({index for batch in batches for index, _ in batch}) == 9
    with pytest.raises(ValueError, match='--batch-size 5 is larger than the 4'):
        loaders(Given([], [], [], []), batch_size=5)


def test_perfect_detections_have_a_map_of_one(pasted):
    _, val = pasted
    metric = make_metric('pasted', val, SIZE, 'unused')
    for _, truth in loaders(val).val:
        truth = truth.asnumpy()
        metric.update(truth[..., :4], truth[..., 4:5], np.where(truth[..., 4:5] < 0, -1, 0.9), truth[..., :4],
                      truth[..., 4:5], truth[..., 5:6])
    found = precisions(metric)
    assert list(found) == [*val.classes, 'mAP']
    assert found['mAP'] == pytest.approx(1) and all(value in (None, pytest.approx(1)) for value in found.values())


def test_wrong_detections_have_less_and_absent_classes_none():
    metric = make_metric('pasted', Given(), SIZE, 'unused')
    truth = np.array([[[10, 10, 30, 30, 0, 0], [5, 5, 20, 20, 1, 0]]], np.float32)
    found = truth.copy()
    found[0, 1, :4] = [25, 25, 40, 40]
    metric.update(found[..., :4], found[..., 4:5], np.full((1, 2, 1), 0.9), truth[..., :4], truth[..., 4:5],
                  truth[..., 5:6])
    assert precisions(metric) == {'bird': pytest.approx(1), 'cat': 0, 'dog': None, 'mAP': pytest.approx(0.5)}


def test_cocos_metric_reads_as_the_other(monkeypatch):
    class Metric(detection_data.COCODetectionMetric):
        def __init__(self, *answer):
            self._answer, self._cleanup = answer, False

        def get(self):
            return self._answer

    assert precisions(Metric(['~~ Summary', 'cat', 'dog', '~~ MeanAP'], ['AP ...', '50.0', 'nan', '50.0'])) == {
        'cat': 0.5, 'dog': None, 'mAP': 0.5}
    assert precisions(Metric(['mAP'], ['0.0'])) == {'mAP': 0}


def test_voc_is_read_by_gluoncv(tmp_path):
    box = ('<object><name>{}</name><difficult>0</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax>'
           '<ymax>30</ymax></bndbox></object>')
    for year, part, objects in ((2007, 'trainval', 'dog'), (2012, 'trainval', ''), (2007, 'test', 'cat')):
        root = tmp_path / f'VOC{year}'
        for folder in ('ImageSets/Main', 'Annotations', 'JPEGImages'):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / 'ImageSets' / 'Main' / f'{part}.txt').write_text(part + '\n')
        (root / 'Annotations' / f'{part}.xml').write_text(
            '<annotation><size><width>40</width><height>50</height></size>'
            + (box.format(objects) if objects else '') + '</annotation>')
        Image.new('RGB', (40, 50)).save(root / 'JPEGImages' / f'{part}.jpg')
    train, val = detection_data.read_voc(str(tmp_path))
    assert len(train) == 2 and len(val) == 1
    given = make_loaders(train, val, len(val.classes), ANCHORS, SIZE, 2, 0, 1)
    assert next(iter(given.train))[0].shape == (2, 3, SIZE, SIZE)
    (_, boxes), = given.val
    assert boxes.asnumpy()[0, 0, 4] == val.classes.index('cat')


def test_absent_data_sets_are_said_to_be_absent(tmp_path):
    for read in (detection_data.read_voc, detection_data.read_coco):
        with pytest.raises(ValueError, match='--dataset (voc|coco) cannot be read from'):
            read(str(tmp_path / 'nowhere'))


def test_pictures_may_be_made_of_anything_that_reads():
    white = detection_data.Arrays([np.full((9, 9, 3), 255, np.uint8)])
    black = detection_data.Arrays([np.zeros((20, 30, 3), np.uint8)])
    part = PastedDetection(white, black, ['square'], SIZE, 20)
    for i in range(20):
        picture, boxes, _, owner = part.compose(i)
        assert np.array_equal(picture[..., 0] > 0, owner >= 0)
        assert (boxes[:, 4] == 0).all()
