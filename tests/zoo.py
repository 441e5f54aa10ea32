"""Catalogue of the image classification nets used by the tests.

Lists every classification net of ``mxnet.gluon.model_zoo.vision`` and every ImageNet or CIFAR classification
net of ``gluoncv.model_zoo`` (int8 variants excluded), each with the smallest square input, among the
multiples of 16 from 32 up, at which the hybridized net runs forward and backward in float32 (299 for
Inception v3).

``ZOO`` holds all entries, ``FAST`` the structurally different cheap ones for everyday runs, and ``UNUSABLE``
maps ``(source, name)`` to the reason why a net cannot be run hybridized at all.  All nets are built without
pretrained weights and, unless noted below, with 10 classes.  Remarks on particular families:

* Fixed input size: the ImageNet residual attention nets upsample to hard-coded sizes (224), and densenet,
  squeezenet, googlenet and inceptionv3 end in a fixed-size pooling window.
* resnest26 and deeper contain DropBlock layers that draw masks of a shape derived from ``input_size``; it is
  passed to the constructor so that it agrees with ``size``.  Being a Python branch on the autograd mode,
  DropBlock is absent from a net whose first hybridized call was made in inference mode.
* The pruned resnets (``_0.11`` and so on) always have 1000 classes: their layer shapes come from a file.
* At 32 pixels, running statistics of xception71's 1x1 maps make its residual sums overflow; it takes 64.
* The nasnet nets return ``(output, auxiliary output)``.  Three of them have concatenation inputs whose
  channel number is not a multiple of 16, for which the oneDNN concat backward of MXNet 1.9 can raise "could
  not construct a sub-memory"; they are marked ``train=False``.  They do train with
  ``MXNET_MKLDNN_ENABLED=0``.
* At 32 pixels most ImageNet nets end in 1x1 feature maps: in training mode, use more than one sample so that
  BatchNorm has a variance to work with.
"""
from collections import namedtuple

__all__ = ['Entry', 'FAST', 'UNUSABLE', 'ZOO', 'build', 'entry_id']

Entry = namedtuple('Entry', ['source', 'name', 'size', 'fast', 'kwargs', 'classes', 'outputs', 'train'])
Entry.__doc__ = """One net of a model zoo.

source : 'gluon' (``mxnet.gluon.model_zoo.vision``) or 'gluoncv' (``gluoncv.model_zoo``).
name : name accepted by ``get_model`` of the source.
size : height and width of the input.
fast : whether the net belongs to the quick selection.
kwargs : further arguments of ``get_model``.
classes : number of output classes.
outputs : number of arrays the net returns; it returns a tuple or list if there is more than one.
train : whether the backward pass works with the oneDNN operators enabled.
"""

_FAST = {
    'gluon': {'alexnet', 'mobilenet0.25', 'mobilenetv2_0.25', 'resnet18_v1', 'resnet18_v2',
              'squeezenet1.0', 'vgg11'},
    'gluoncv': {'cifar_resnet20_v1', 'googlenet', 'mobilenetv3_small', 'resnest14', 'se_resnet18_v1',
                'shufflenet_v1'},
}


def _entries(source, size, names, class_arg='classes', classes=10, outputs=1, train=True, **kwargs):
    """Return the entries of the nets in the blank-separated string `names`."""
    if class_arg is not None:
        kwargs[class_arg] = classes
    return tuple(Entry(source, name, size, name in _FAST[source], kwargs, classes, outputs, train)
                 for name in names.split())


_GLUON = (
    _entries('gluon', 32, """
        mobilenet0.25 mobilenet0.5 mobilenet0.75 mobilenet1.0
        mobilenetv2_0.25 mobilenetv2_0.5 mobilenetv2_0.75 mobilenetv2_1.0
        resnet18_v1 resnet34_v1 resnet50_v1 resnet101_v1 resnet152_v1
        resnet18_v2 resnet34_v2 resnet50_v2 resnet101_v2 resnet152_v2
        vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn""")
    + _entries('gluon', 64, 'alexnet')
    + _entries('gluon', 224, 'densenet121 densenet161 densenet169 densenet201 squeezenet1.0 squeezenet1.1')
    + _entries('gluon', 299, 'inceptionv3')
)

_GLUONCV = (
    _entries('gluoncv', 32, """
        cifar_residualattentionnet56 cifar_residualattentionnet92 cifar_residualattentionnet452
        cifar_resnet20_v1 cifar_resnet56_v1 cifar_resnet110_v1
        cifar_resnet20_v2 cifar_resnet56_v2 cifar_resnet110_v2
        cifar_resnext29_16x64d cifar_resnext29_32x4d
        cifar_wideresnet16_10 cifar_wideresnet28_10 cifar_wideresnet40_8
        darknet53 dla34
        mobilenet0.25 mobilenet0.5 mobilenet0.75 mobilenet1.0
        mobilenetv2_0.25 mobilenetv2_0.5 mobilenetv2_0.75 mobilenetv2_1.0
        mobilenetv3_large mobilenetv3_small
        resnest14
        resnet18_v1 resnet34_v1 resnet50_v1 resnet101_v1 resnet152_v1
        resnet18_v1b resnet34_v1b resnet50_v1b resnet101_v1b resnet152_v1b
        resnet50_v1c resnet101_v1c resnet152_v1c
        resnet50_v1d resnet101_v1d resnet152_v1d
        resnet50_v1e resnet101_v1e resnet152_v1e
        resnet50_v1s resnet101_v1s resnet152_v1s
        resnet18_v2 resnet34_v2 resnet50_v2 resnet101_v2 resnet152_v2
        resnext50_32x4d resnext101_32x4d resnext101_64x4d resnext101e_64x4d
        se_resnet18_v1 se_resnet34_v1 se_resnet50_v1 se_resnet101_v1 se_resnet152_v1
        se_resnet18_v2 se_resnet34_v2 se_resnet50_v2 se_resnet101_v2 se_resnet152_v2
        se_resnext50_32x4d se_resnext101_32x4d se_resnext101_64x4d se_resnext101e_64x4d
        senet_154 senet_154e shufflenet_v1 shufflenet_v2
        vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn
        xception""")
    + _entries('gluoncv', 32, """
        hrnet_w18_small_v1_c hrnet_w18_small_v2_c hrnet_w18_c hrnet_w30_c hrnet_w32_c hrnet_w40_c hrnet_w44_c
        hrnet_w48_c hrnet_w64_c""", class_arg='num_classes')
    + _entries('gluoncv', 32, """
        resnet18_v1b_0.89 resnet50_v1d_0.11 resnet50_v1d_0.37 resnet50_v1d_0.48 resnet50_v1d_0.86
        resnet101_v1d_0.73 resnet101_v1d_0.76""", class_arg=None, classes=1000)
    + _entries('gluoncv', 32, 'nasnet_5_1538', outputs=2)
    + _entries('gluoncv', 32, 'nasnet_4_1056 nasnet_7_1920 nasnet_6_4032', outputs=2, train=False)
    + _entries('gluoncv', 64, 'alexnet xception71')
    + _entries('gluoncv', 80, 'resnest26 resnest50 resnest101 resnest200 resnest269', input_size=80)
    + _entries('gluoncv', 224, """
        densenet121 densenet161 densenet169 densenet201 googlenet squeezenet1.0 squeezenet1.1
        residualattentionnet56 residualattentionnet92 residualattentionnet128 residualattentionnet164
        residualattentionnet200 residualattentionnet236 residualattentionnet452""")
    + _entries('gluoncv', 299, 'inceptionv3')
)

ZOO = _GLUON + _GLUONCV
FAST = tuple(entry for entry in ZOO if entry.fast)

_GROUP_NORM = (
    'gluoncv.nn.GroupNorm reads the shape of its input, so the net runs imperatively but cannot be '
    'hybridized or traced: MXNetError: Invalid Parameter format for keep_highest expect boolean but '
    'value=\'-1\', in operator Reshape'
)
UNUSABLE = {('gluoncv', 'resnet50_v1b_gn'): _GROUP_NORM, ('gluoncv', 'resnet101_v1b_gn'): _GROUP_NORM}


def entry_id(entry):
    """Return a short text that identifies `entry`, for instance as the id of a parametrized test."""
    return f'{entry.source}-{entry.name}'


def build(entry):
    """Return the net of `entry`, uninitialised and not hybridized."""
    if entry.source == 'gluon':
        from mxnet.gluon.model_zoo.vision import get_model
    else:
        from gluoncv.model_zoo import get_model
    return get_model(entry.name, pretrained=False, **entry.kwargs)
