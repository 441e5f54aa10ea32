"""gluoncv's detectors, quantized by `convert` and by `attach`: train with targets, infer with NMS, save, hybridize.

The fast run takes the smallest net of each family; the slow one those that people use.
"""
import mxnet as mx
import numpy as np
import pytest
from gluoncv.data.transforms.presets.ssd import SSDDefaultTrainTransform
from gluoncv.data.transforms.presets.yolo import YOLO3DefaultTrainTransform
from gluoncv.loss import SSDMultiBoxLoss
from gluoncv.model_zoo import get_model, resnet18_v1b
from gluoncv.model_zoo.rcnn.faster_rcnn.faster_rcnn import get_faster_rcnn
from mxnet import autograd, gluon, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.layers import quantizers

CLASSES = ('circle', 'square', 'star')
OBJECTS = np.array([[10, 12, 50, 58, 1], [30, 6, 60, 40, 2]], 'float32')
NOTHING = np.full((1, 5), -1, 'float32')         # how gluoncv says that there is no object
slow = pytest.mark.slow


def images(size, seed=0):
    return nd.array(np.random.default_rng(seed).normal(size=(1, 3, size, size)))


class Family:
    """How to make and train detectors of one kind.

    Parameters
    ----------
    training_inputs : tuple of str or None, what they take in training if not the image alone
    """
    training_inputs = None

    def __init__(self, name, size, **options):
        self.name, self.size, self.options = name, size, options

    def make(self):
        return get_model(self.name, pretrained=False, **self.options)

    def targets(self, net, objects):
        """What the net takes in training beside the image."""
        return []

    def loss(self, outputs, net, objects):
        return sum((part ** 2).mean() for part in flat(outputs))

    def labels(self, transform, objects):
        """gluoncv's transform on a picture of noise; its random choices are those of a seed."""
        np.random.seed(0)
        picture = nd.array(np.random.default_rng(1).integers(0, 255, (self.size, self.size, 3)), dtype='uint8')
        return [part.expand_dims(0) for part in transform(picture, objects)]


class SSD(Family):
    def loss(self, outputs, net, objects):
        scores, boxes, anchors = outputs
        if objects is NOTHING:
            _, classes, places = None, nd.zeros(scores.shape[:2]), nd.zeros(boxes.shape)
        else:
            _, classes, places = self.labels(SSDDefaultTrainTransform(self.size, self.size, anchors), objects)
        sums, _, _ = SSDMultiBoxLoss()(scores, boxes, classes, places)
        return sum(part.mean() for part in sums)


class YOLO(Family):
    training_inputs = ('data', 'gt_boxes', 'objectness', 'centers', 'scales', 'weights', 'classes')

    def targets(self, net, objects):
        if objects is NOTHING:      # the transform wants an object; none is how it fills up
            targets = [nd.zeros_like(part) for part in self.targets(net, OBJECTS)]
            return [targets[0][:, :1] - 1, targets[1], *targets[2:4], targets[4], targets[5] - 1]
        _, *targets, boxes = self.labels(YOLO3DefaultTrainTransform(self.size, self.size, self.make_ready()), objects)
        return [boxes, *targets]

    def make_ready(self):
        return ready(self)

    def loss(self, outputs, net, objects):
        return sum(part.mean() for part in outputs)


class RCNN(Family):
    training_inputs = ('data', 'gt_box', 'gt_label')

    def make(self):
        net = super().make()
        _ = net.target_generator    # gluoncv makes it, with Parameters of its own, where it is first asked for
        return net

    def targets(self, net, objects):
        return [nd.array(objects[None, :, :4]), nd.array(objects[None, :, 4:])]

    def loss(self, outputs, net, objects):
        return sum((outputs[i] ** 2).mean() for i in (0, 1, 5, 6))      # classes, boxes; those of proposals


class SmallRCNN(RCNN):
    """Few proposals, on a ResNet-18: gluoncv's own are for large pictures."""

    def make(self):
        base = resnet18_v1b(pretrained=False, use_global_stats=True)
        features, top = nn.HybridSequential(), nn.HybridSequential()
        for layer in (base.conv1, base.bn1, base.relu, base.maxpool, base.layer1, base.layer2, base.layer3):
            features.add(layer)
        top.add(base.layer4)
        net = get_faster_rcnn(
            'resnet18_v1b', 'custom', features=features, top_features=top, classes=CLASSES, roi_mode='align',
            roi_size=(4, 4), strides=16, rpn_channel=16, base_size=16, scales=(1, 2, 4), ratios=(0.5, 1, 2),
            train_patterns='.*', rpn_train_pre_nms=60, rpn_train_post_nms=30, rpn_test_pre_nms=40,
            rpn_test_post_nms=10, rpn_min_size=2, num_sample=8, max_num_gt=4)
        _ = net.target_generator
        return net


def flat(outputs):
    if isinstance(outputs, (list, tuple)):
        return [part for output in outputs for part in flat(output)]
    return [outputs]


VOC = {'pretrained_base': False}
CUSTOM = {'classes': CLASSES, 'pretrained_base': False}
FAMILIES = {
    'ssd': SSD('ssd_300_mobilenet0.25_custom', 96, **CUSTOM),
    'yolo3': YOLO('yolo3_mobilenet0.25_custom', 64, **CUSTOM),
    'center_net': Family('center_net_resnet18_v1b_voc', 64, **VOC),
    'faster_rcnn': SmallRCNN('', 64),
}
LISTED = {
    'ssd vgg16_atrous': SSD('ssd_300_vgg16_atrous_voc', 300, **VOC),
    'ssd mobilenet1.0': SSD('ssd_512_mobilenet1.0_voc', 256, **VOC),
    'ssd resnet18': SSD('ssd_512_resnet18_v1_voc', 256, **VOC),
    'ssd resnet50': SSD('ssd_512_resnet50_v1_voc', 256, **VOC),
    'yolo3 darknet53': YOLO('yolo3_darknet53_voc', 96, **VOC),
    'yolo3 mobilenet1.0': YOLO('yolo3_mobilenet1.0_voc', 96, **VOC),
    'faster_rcnn resnet50': RCNN('faster_rcnn_resnet50_v1b_voc', 192, per_device_batch_size=1, **VOC),
}
each = pytest.mark.parametrize('family', [
    *(pytest.param(family, id=name) for name, family in FAMILIES.items()),
    *(pytest.param(family, id=name, marks=slow) for name, family in LISTED.items())])
HOW = {'fqn 4': {'bits': 4, 'method': 'fqn', 'first_last_bits': 4}, 'int8 8': {'bits': 8, 'method': 'int8'},
       'lsq 4, heads 8': {'bits': 4}}
how = pytest.mark.parametrize('how', HOW)


def ready(family):
    """A float net with the same values each time; gluoncv leaves BatchNorm of SymbolBlocks at random."""
    net = family.make()
    mx.random.seed(0)
    net.initialize(mx.init.Normal(0.05))
    net(images(family.size))
    for name, parameter in net.collect_params('.*(gamma|var|beta|mean|bias|weight)$').items():
        if name.endswith('weight'):
            parameter.initialize(mx.init.Xavier(), force_reinit=True)
        else:
            parameter.set_data(nd.ones_like(parameter.data()) * name.endswith(('gamma', 'var')))
    return net


def quantized(family, way, how):
    net = ready(family)
    if way == 'attach':
        return gq.attach(net, training_inputs=family.training_inputs, **HOW[how])
    return gq.convert(net, **HOW[how])


def calibrated(family, way, how):
    net = gq.freeze_batchnorm(quantized(family, way, how))      # there is but one image
    gq.calibrate(net, [images(family.size)])
    return net


def step(net, family, objects, lr=1e-3):
    """The loss of one training step."""
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': lr})
    mx.random.seed(1)       # Faster R-CNN samples
    targets = family.targets(net, objects)
    with autograd.record():
        loss = family.loss(net(images(family.size, 1), *targets), net, objects)
    loss.backward()
    trainer.step(1)
    return float(loss.asscalar())


def inferred(net, family):
    return [part.asnumpy() for part in flat(net(images(family.size, 1)))]


def assert_finite(net):
    for path, parameter in net._collect_params_with_prefix().items():
        assert np.isfinite(parameter.data().asnumpy()).all(), path


@each
@how
@pytest.mark.parametrize('way', ['convert', 'attach'])
def test_trains_and_infers(family, way, how, tmp_path):
    if any(family is listed for listed in LISTED.values()) and how == 'int8 8':
        pytest.skip('the fast nets show it')
    net = calibrated(family, way, how)
    before = inferred(net, family)
    net.hybridize()
    for one, other in zip(inferred(net, family), before):
        np.testing.assert_array_equal(one, other)
    if way == 'convert':
        net.hybridize()         # gluoncv's forward depends on the mode: each mode needs a trace of its own
    assert np.isfinite(step(net, family, OBJECTS))
    assert_finite(net)
    if way == 'convert':
        net.hybridize()
    after = inferred(net, family)
    assert not all(np.array_equal(one, other) for one, other in zip(before, after))
    gq.save(net, tmp_path / 'net.npz')
    again = gq.load(tmp_path / 'net.npz', *([family.make()] if way == 'convert' else []))
    for one, other in zip(inferred(again, family), after):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('family', [pytest.param(family, id=name) for name, family in FAMILIES.items()])
@pytest.mark.parametrize('way', ['convert', 'attach'])
def test_every_layer_is_quantized_and_heads_have_the_bits_of_last_layers(family, way):
    net = quantized(family, way, 'lsq 4, heads 8')
    weights = quantizers(net, 'weight')
    layers = [row for row in gq.summary(net).rows if row.shape is not None]
    assert all(row.weight != 'float' for row in layers) and len(layers) == len(weights)
    at_eight = {path for path, quantizer in weights.items() if quantizer.grid.bits == 8}
    heads = {'ssd': 'predictors', 'yolo3': 'yolo_outputs', 'center_net': 'heads', 'faster_rcnn': 'predictor'}
    expected = {'ssd': 12, 'yolo3': 3, 'center_net': 3, 'faster_rcnn': 2}
    name = next(name for name, other in FAMILIES.items() if other is family)
    found = [path for path in at_eight if heads[name] in path]
    # Beside them the first convolution, and what proposes regions.
    assert len(found) == expected[name] and len(at_eight) == expected[name] + 1 + 2 * (name == 'faster_rcnn')


@pytest.mark.parametrize('family', [pytest.param(family, id=name) for name, family in FAMILIES.items()])
def test_switched_off_it_is_gluoncvs_net(family):
    expected = inferred(ready(family), family)
    for way in ('convert', 'attach'):
        net = quantized(family, way, 'fqn 4')
        gq.set_mode(net, 'off')
        for one, other in zip(inferred(net, family), expected):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('family', [pytest.param(FAMILIES[name], id=name) for name in ('ssd', 'yolo3', 'faster_rcnn')])
@pytest.mark.parametrize('how', ['fqn 4', 'lsq 4, heads 8', 'int8 8'])
@pytest.mark.parametrize('way', ['convert', 'attach'])
def test_an_image_without_objects_poisons_nothing(family, way, how):
    net = calibrated(family, way, how)
    assert np.isfinite(step(net, family, NOTHING))
    assert_finite(net)
    assert all(np.isfinite(part).all() for part in inferred(net, family))


@pytest.mark.parametrize('family', [pytest.param(FAMILIES[name], id=name) for name in ('ssd', 'yolo3', 'center_net')])
@pytest.mark.parametrize('way', ['convert', 'attach'])
def test_the_fqn_recipe(family, way):
    """Frozen BatchNorm folded into the weights, affine weights per channel, percentiles calibrated first."""
    net = quantized(family, way, 'fqn 4')
    gq.fold(net, 'frozen')
    gq.calibrate(net, [images(family.size)])
    kinds = [row.type for row in gq.summary(net).rows if row.shape is not None]
    folded = sum('BatchNorm' in kind for kind in kinds) if way == 'attach' else sum(
        getattr(block, '_norm', None) is not None for _, block in gq.layers.named_blocks(net)) + sum(
        'BatchNorm' in kind for kind in kinds)
    assert folded >= 10
    assert all(quantizer.method == 'fqn' for quantizer in quantizers(net).values())
    assert np.isfinite(step(net, family, OBJECTS))
    assert_finite(net)
    concats = {'yolo3': 4}.get(next(name for name, other in FAMILIES.items() if other is family), 0)
    if way == 'attach':
        rows = gq.explain(net, 'Concat').rows
        assert len([row for row in rows if row.quantizer]) == concats


@pytest.mark.parametrize('way', ['convert', 'attach'])
def test_deployed_are_the_heads(way, tmp_path):
    """What decodes boxes is no part of ONNX: the file ends at the predictions, and holds what the net computes."""
    pytest.importorskip('onnxruntime')
    family, path = FAMILIES['ssd'], str(tmp_path / 'ssd.onnx')
    net = ready(family)
    net = gq.convert(net, 8, method='int8') if way == 'convert' else gq.attach(net, 8, method='int8',
                                                                               target='onnxruntime')
    gq.calibrate(net, [images(family.size)])
    heads = [row.name for row in gq.summary(net).rows if 'predictors' in row.name]
    assert len(heads) == 12
    with pytest.raises(ValueError, match='cannot be exported.*outputs='):
        gq.export_onnx(net, path, (1, 3, family.size, family.size))
    final = gq.export_onnx(net, path, (1, 3, family.size, family.size), outputs=heads)
    report = gq.verify(final, path, images(family.size), runtimes=['onnxruntime'])
    assert report.passed and len(report.outputs['final']) == 12
    assert min(rung.equal for rung in report.rungs) > 0.999
