"""The pre-activation ResNet-18 of MXNet's image classification example, built from symbols alone."""
import mxnet as mx

STAGES, UNITS = 4, 2


def preact_resnet18(classes=10, filters=(64, 64, 128, 256, 512), small=False):
    """Its symbol, from the variable 'data' to the outputs of the last layer, as He et al. (arXiv:1603.05027).

    Every stage begins with a convolution in the shortcut, the first one too. Names are those of the example:
    'stage1_unit2_conv1', 'stage3_unit1_sc', and '_plus0' to '_plus7' for the sums.

    Parameters
    ----------
    filters : tuple of int, of the first convolution and of each stage
    small : bool
        A first convolution of 3x3 for images of 32 pixels; else 7x7 with stride 2.
    """
    with mx.name.NameManager():         # counts the sums anew
        geometry = {'kernel': (3, 3), 'pad': (1, 1)} if small else {'kernel': (7, 7), 'stride': (2, 2), 'pad': (3, 3)}
        x = _norm(mx.sym.var('data'), 'bn_data', fix_gamma=True)
        x = mx.sym.Convolution(x, num_filter=filters[0], no_bias=True, name='conv0', **geometry)
        x = _relu(_norm(x, 'bn0'), 'relu0')
        x = mx.sym.Pooling(x, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type='max', name='pool0')
        for stage in range(1, STAGES + 1):
            for unit in range(1, UNITS + 1):
                stride = 2 if stage > 1 and unit == 1 else 1
                x = _unit(x, filters[stage], stride, unit == 1, f'stage{stage}_unit{unit}')
        x = _relu(_norm(x, 'bn1'), 'relu1')
        x = mx.sym.Pooling(x, global_pool=True, kernel=(7, 7), pool_type='avg', name='pool1')
        return mx.sym.FullyConnected(mx.sym.Flatten(x, name='flatten'), num_hidden=classes, name='fc1')


def _unit(x, filters, stride, shortcut, name):
    y = first = _relu(_norm(x, f'{name}_bn1'), f'{name}_relu1')
    y = _convolution(y, filters, 3, stride, f'{name}_conv1')
    y = _relu(_norm(y, f'{name}_bn2'), f'{name}_relu2')
    y = _convolution(y, filters, 3, 1, f'{name}_conv2')
    return y + (_convolution(first, filters, 1, stride, f'{name}_sc') if shortcut else x)


def _convolution(x, filters, kernel, stride, name):
    return mx.sym.Convolution(x, num_filter=filters, kernel=(kernel,) * 2, stride=(stride,) * 2,
                              pad=(kernel // 2,) * 2, no_bias=True, name=name)


def _norm(x, name, fix_gamma=False):
    return mx.sym.BatchNorm(x, fix_gamma=fix_gamma, eps=2e-5, momentum=0.9, name=name)


def _relu(x, name):
    return mx.sym.Activation(x, act_type='relu', name=name)
