"""What the traced graph tells: order, shared inputs, signs."""
import mxnet as mx
import pytest
from mxnet import gluon
from mxnet.gluon import nn
from mxnet.gluon.model_zoo import vision

from gluonquant.trace import Reading, trace


class Between(nn.HybridBlock):
    """A function between two Dense layers."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function
        with self.name_scope():
            self.first, self.last = nn.Dense(4, flatten=False), nn.Dense(4, flatten=False)

    def hybrid_forward(self, F, x):
        return self.last(self.function(F, self.first(x)))


def nonnegative(function):
    net = Between(function)
    return trace(net)[net.last.weight.name].nonnegative


NEVER_NEGATIVE = {
    'relu': lambda F, x: F.relu(x),
    'Activation relu': lambda F, x: F.Activation(x, act_type='relu'),
    'sigmoid': lambda F, x: F.sigmoid(x),
    'softrelu': lambda F, x: F.Activation(x, act_type='softrelu'),
    'hard sigmoid': lambda F, x: F.hard_sigmoid(x),
    'softmax': lambda F, x: F.softmax(x),
    'relu6': lambda F, x: F.clip(x, 0, 6),
    'abs': lambda F, x: F.abs(x),
    'square': lambda F, x: F.square(x),
    'exp': lambda F, x: F.exp(x),
    'maximum with 0': lambda F, x: F.maximum(x, 0),
    'relu, then max pooling': lambda F, x: F.Pooling(F.relu(x), kernel=(2, 2), pool_type='max'),
    'relu, then global pooling': lambda F, x: F.Pooling(F.relu(x), global_pool=True, pool_type='avg', kernel=(1, 1)),
    'relu + relu': lambda F, x: F.relu(x) + F.relu(x),
    'relu * sigmoid': lambda F, x: F.broadcast_mul(F.relu(x), F.sigmoid(x)),
    'concat of relus': lambda F, x: F.concat(F.relu(x), F.relu(x), dim=1),
    'sum of relus': lambda F, x: F.add_n(F.relu(x), F.relu(x)),
    'relu + 1': lambda F, x: F.relu(x) + 1,
    'relu * 2': lambda F, x: F.relu(x) * 2,
    'relu / 2': lambda F, x: F.relu(x) / 2,
    'padded relu': lambda F, x: F.pad(F.relu(x), mode='constant', pad_width=(0,) * 4 + (1,) * 4, constant_value=0),
    'dropout of relu': lambda F, x: F.Dropout(F.relu(x)),
    'flat relu': lambda F, x: F.flatten(F.relu(x)),
    'reshaped relu': lambda F, x: F.reshape(F.relu(x), shape=(0, -1)),
    'transposed relu': lambda F, x: F.transpose(F.relu(x)),
    'slice of relu': lambda F, x: F.slice_axis(F.relu(x), axis=1, begin=0, end=2),
    'split relu': lambda F, x: F.split(F.relu(x), num_outputs=2, axis=1)[1],
    'mean of relu': lambda F, x: F.mean(F.relu(x), axis=1, keepdims=True),
    'upsampled relu': lambda F, x: F.UpSampling(F.relu(x), scale=2, sample_type='nearest'),
    'relu behind a stopped gradient': lambda F, x: F.BlockGrad(F.relu(x)),
    'cast relu': lambda F, x: F.cast(F.relu(x), 'float16'),
}
MAYBE_NEGATIVE = {
    'nothing': lambda F, x: x,
    'tanh': lambda F, x: F.tanh(x),
    'softsign': lambda F, x: F.Activation(x, act_type='softsign'),
    'leaky relu': lambda F, x: F.LeakyReLU(x, slope=0.1),
    'elu': lambda F, x: F.LeakyReLU(x, act_type='elu'),
    'gelu': lambda F, x: F.LeakyReLU(x, act_type='gelu'),
    'swish': lambda F, x: x * F.sigmoid(x),
    'hard swish': lambda F, x: x * F.clip(x + 3, 0, 6) / 6,
    'clip below 0': lambda F, x: F.clip(x, -1, 1),
    'maximum with -1': lambda F, x: F.maximum(x, -1),
    'minimum of relu and -1': lambda F, x: F.minimum(F.relu(x), -1),
    'relu + linear': lambda F, x: F.relu(x) + x,
    'relu - relu': lambda F, x: F.relu(x) - F.relu(x),
    'relu - 1': lambda F, x: F.relu(x) - 1,
    '1 - sigmoid': lambda F, x: 1 - F.sigmoid(x),
    '-relu': lambda F, x: -F.relu(x),
    'relu * -2': lambda F, x: F.relu(x) * -2,
    'relu / -2': lambda F, x: F.relu(x) / -2,
    'concat of relu and linear': lambda F, x: F.concat(F.relu(x), x, dim=1),
    'log of relu': lambda F, x: F.log(F.relu(x)),
    'log softmax': lambda F, x: F.log_softmax(x),
    'padded with -1': lambda F, x: F.pad(F.relu(x), mode='constant', pad_width=(0,) * 4 + (1,) * 4, constant_value=-1),
    'max pooling': lambda F, x: F.Pooling(x, kernel=(2, 2), pool_type='max'),
}


@pytest.mark.parametrize('name', NEVER_NEGATIVE)
def test_these_are_proved_never_negative(name):
    assert nonnegative(NEVER_NEGATIVE[name])


@pytest.mark.parametrize('name', MAYBE_NEGATIVE)
def test_these_are_taken_to_be_negative_too(name):
    assert not nonnegative(MAYBE_NEGATIVE[name])


def test_the_input_of_the_net_may_be_negative():
    net = nn.Dense(3)
    reading = trace(net)[net.weight.name]
    assert reading == Reading(0, reading.tensor, False, 1, last=True) and reading.tensor.node.name == 'data'


def test_batch_norm_behind_a_relu_may_be_negative():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(3, 3, activation='relu'), nn.BatchNorm(), nn.Conv2D(3, 3))
    assert not trace(net)[net[2].weight.name].nonnegative


def test_a_fused_relu_counts():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(3, 3, activation='relu'), nn.Conv2DTranspose(3, 3, activation='relu'), nn.Dense(3))
    readings = trace(net)
    assert [readings[layer.weight.name].nonnegative for layer in net] == [False, True, True]


class Unordered(nn.HybridBlock):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.last, self.left, self.right, self.first = (nn.Dense(4, flatten=False) for _ in range(4))

    def hybrid_forward(self, F, x):
        x = F.relu(self.first(x))
        return self.last(self.left(x) + self.right(x))


def test_order_is_that_of_use():
    net = Unordered()
    readings = trace(net)
    assert sorted(readings, key=lambda name: readings[name].order) == [
        getattr(net, name).weight.name for name in ('first', 'left', 'right', 'last')]


def test_layers_that_read_one_tensor_say_so():
    net = Unordered()
    readings = trace(net)
    first, left, right, last = (readings[getattr(net, name).weight.name].tensor
                                for name in ('first', 'left', 'right', 'last'))
    assert left == right and len({first, left, last}) == 3


def test_the_outputs_of_a_split_are_different_tensors():
    class Split(Unordered):
        def hybrid_forward(self, F, x):
            a, b = F.split(self.first(x), num_outputs=2, axis=1)
            return self.last(self.left(a) + self.right(b))

    net = Split()
    assert trace(net)[net.left.weight.name].tensor != trace(net)[net.right.weight.name].tensor


class Twice(nn.HybridBlock):
    def __init__(self, again, **kwargs):
        super().__init__(**kwargs)
        self.again = again
        with self.name_scope():
            self.dense = nn.Dense(4, in_units=4)

    def hybrid_forward(self, F, x):
        return self.again(F, self.dense, F.relu(x))


def test_a_layer_used_on_two_tensors_has_no_single_one():
    net = Twice(lambda F, dense, x: dense(F.relu(dense(x))))
    assert trace(net)[net.dense.weight.name] == Reading(0, None, True, 2, last=True)


def test_a_layer_that_reads_something_negative_once_is_not_nonnegative():
    net = Twice(lambda F, dense, x: dense(dense(x)))
    assert not trace(net)[net.dense.weight.name].nonnegative


def test_a_layer_used_twice_on_one_tensor_reads_that_tensor():
    net = Twice(lambda F, dense, x: dense(x) + dense(x))
    assert trace(net)[net.dense.weight.name].tensor is not None


def test_several_outputs_are_traced():
    class Two(Unordered):
        def hybrid_forward(self, F, x):
            return self.first(x), [self.left(x), self.right(x)]

    assert len(trace(Two())) == 3


def test_a_net_of_imperative_containers_is_traced():
    net = nn.Sequential()
    net.add(nn.Dense(3, activation='relu'), nn.Dense(3))
    assert trace(net)[net[1].weight.name].nonnegative


@pytest.mark.parametrize('fail', [lambda x: x.shape[0], lambda x: 1 / 0, lambda x: x.asnumpy()])
def test_a_net_that_cannot_be_traced_gives_nothing(fail):
    class Failing(gluon.Block):
        def forward(self, x):
            return fail(x)

    assert trace(Failing()) == {}


def test_a_net_with_two_inputs_gives_nothing():
    class Two(nn.HybridBlock):
        def hybrid_forward(self, F, x, y):
            return x + y

    assert trace(Two()) == {}


def test_tracing_leaves_no_graph_and_no_shapes_behind():
    net = vision.resnet18_v1()
    trace(net)
    assert net._cached_graph == () and net.features[0].weight.shape == (64, 0, 7, 7)


def test_tracing_does_not_touch_a_graph_that_exists():
    net = nn.HybridSequential()
    net.add(nn.Dense(3))
    net.initialize()
    net.hybridize()
    net(mx.nd.ones((1, 2)))
    graph = net._cached_op
    trace(net)
    assert net._cached_op is graph


def test_every_layer_of_a_real_net_is_found():
    net = vision.mobilenet_v2_0_25()
    weights = {name for name in net.collect_params() if name.endswith('weight')}
    assert set(trace(net)) == weights


def last(function, **layers):
    """Names of the last layers of a net of ``layers`` whose forward is ``function(net, F, x)``."""
    net = Several(function, **layers)
    return [name for name in layers if trace(net)[getattr(net, name).weight.name].last]


class Several(nn.HybridSequential):
    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def hybrid_forward(self, F, x):
        return self.function(self, F, x)


def test_all_heads_are_last_layers():
    assert last(lambda net, F, x: F.concat(net.boxes(F.relu(net.body(x))), net.scores(net.body(x))),
                body=nn.Conv2D(4, 1), boxes=nn.Conv2D(4, 1), scores=nn.Conv2D(2, 1)) == ['boxes', 'scores']


def test_a_gate_is_no_last_layer():
    assert last(lambda net, F, x: net.head(F.broadcast_mul(x, F.sigmoid(net.gate(x)))),
                gate=nn.Conv2D(3, 1), head=nn.Dense(2)) == ['head']


@pytest.mark.parametrize('look', [
    lambda F, x, places: F.contrib.ROIAlign(x, F.reshape(places, shape=(-1, 5)), (2, 2), 1.0),
    lambda F, x, places: F.ROIPooling(x, F.reshape(places, shape=(-1, 5)), (2, 2), 1.0),
    lambda F, x, places: F.slice_like(x, places),
    lambda F, x, places: x + F.zeros_like(places)], ids=['align', 'pool', 'slice', 'zeros'])
def test_what_says_where_to_look_is_a_last_layer(look):
    assert last(lambda net, F, x: net.head(look(F, net.body(x), net.places(net.body(x)))),
                body=nn.Conv2D(4, 1), places=nn.Conv2D(5, 1), head=nn.Dense(2)) == ['places', 'head']


def test_a_layer_that_is_the_last_in_one_of_its_places_is_last():
    assert last(lambda net, F, x: net.head(net.head(net.body(x))), body=nn.Conv2D(3, 1), head=nn.Conv2D(3, 1)
                ) == ['head']
