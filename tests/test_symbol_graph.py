"""The typed view of a symbol: what goes in comes out, what is broken is refused by name, and it computes the same."""
import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet import nd
from mxnet._ctypes.ndarray import CachedOp
from mxnet.gluon import SymbolBlock

import gluonquant as gq
from gluonquant.fuse import fused
from gluonquant.graph import GraphNet, as_graph
from gluonquant.symbol_graph import OURS, Entry, Graph, Node, ancestors, canonical, evaluate, invoke, operator, same
from test_zoo import outputs, run, settle_statistics
from zoo import ZOO, build, entry_id

REPOSITORY = Path(gq.__file__).parents[1]
GOLDEN = Path(__file__).parent / 'golden' / 'symbols'
cannot_decide_type = pytest.mark.filterwarnings('ignore:Cannot decide type')    # Gluon says so of any input


# ---------------------------------------------------------------- symbols with everything that JSON can hold


def var(name, **notes):
    return mx.sym.var(name, **notes)


def relu(x, name='relu'):
    return mx.sym.relu(x, name=name)


def convolution(x, name='conv', **options):
    return mx.sym.Convolution(x, kernel=(3, 3), pad=(1, 1), num_filter=4, name=name, **options)


def norm(x, name='norm', **options):
    return mx.sym.BatchNorm(x, name=name, fix_gamma=False, **options)


def parts(x, count, name='parts'):
    return mx.sym.SliceChannel(x, num_outputs=count, name=name)


def notes():
    weight = var('w', shape=(4, 4, 3, 3), lr_mult=2.0, wd_mult=0.0, init=mx.init.Normal(0.1), attr={'__mine__': 'w'})
    with mx.AttrScope(ctx_group='left', __note__='all'):
        return relu(convolution(var('data'), weight=weight, no_bias=True))


def scripts():
    return relu(var('data', attr={'__note__': 'a "quoted" \\ line\nand é, 量'}), 'relu é')


def unread_outputs():
    quarters = parts(var('data'), 4)
    return mx.sym.elemwise_sub(quarters[3], quarters[1], name='difference')


def heads_in_order():
    halves = parts(var('data'), 2)
    return mx.sym.Group([halves[1], relu(halves[0]), halves[0], halves[1]])


def shared():
    parameters = {'weight': var('w'), 'bias': var('b')}
    return convolution(relu(convolution(var('data'), 'first', **parameters)), 'second', **parameters)


def shared_states():
    states = {name: var(name) for name in ('gamma', 'beta', 'moving_mean', 'moving_var')}
    return norm(norm(var('data'), 'first', **states), 'second', **states)


def any_number_of_inputs():
    x = var('data')
    return mx.sym.Concat(x, mx.sym.add_n(x, x, x, name='sum'), dim=1, name='both')


def foreach():
    factor = var('w', shape=(1, 1, 1))
    out, last = mx.sym.contrib.foreach(lambda x, state: (mx.sym.broadcast_mul(x, factor) + state,) * 2, var('data'),
                                       var('state', shape=(4, 6, 6)), name='each')
    return mx.sym.Group([last, out])


def while_loop():
    w = var('w')
    # As many steps as it may take: MXNet leaves the rest of its outputs uninitialised.
    out, last = mx.sym.contrib.while_loop(lambda i, x: i < 30, lambda i, x: ([x + i], [i + 1, x * w]),
                                          (var('data'), var('x')), max_iterations=3, name='loop')
    return mx.sym.Group([out[0], *last])


def cond():
    x, w = var('data'), var('w', shape=(1, 1, 1, 1))
    return mx.sym.contrib.cond(mx.sym.sum(x) > 3, lambda: mx.sym.broadcast_mul(x, w),
                               lambda: mx.sym.broadcast_sub(x, w), name='either')


SYMBOLS = {
    'notes': notes,
    'any script': scripts,
    'unread outputs': unread_outputs,
    'heads in order': heads_in_order,
    'states': lambda: norm(convolution(var('data')), momentum=0.5),
    'all outputs of BatchNorm': lambda: mx.sym.Group(list(norm(var('data'), output_mean_var=True))),
    'shared': shared,
    'shared states': shared_states,
    'several inputs': lambda: mx.sym.elemwise_sub(var('second'), mx.sym.elemwise_add(var('data'), var('first'))),
    'any number of inputs': any_number_of_inputs,
    'no inputs': lambda: mx.sym.broadcast_add(var('data'), mx.sym.ones((1, 4, 1, 1), name='one'), name='sum'),
    'a variable': lambda: var('data'),
    'mixed precision': lambda: mx.sym.amp_cast(mx.sym.amp_cast(var('data'), dtype='float16'), dtype='float32'),
    'foreach': foreach,
    'while_loop': while_loop,
    'cond': cond,
}
SHAPES = {'while_loop': {'data': (1,), 'x': (1,), 'w': (1,)}}
LOOPS = ('foreach', 'while_loop', 'cond')
every_symbol = pytest.mark.parametrize('kind', SYMBOLS)


def text_of(symbol):
    return symbol.tojson(remove_amp_cast=False)


def described(text):
    """What JSON says, whatever the order of its keys."""
    return json.loads(text) if isinstance(text, str) else text


def arrays(symbol, **shapes):
    """A value for every variable, by name."""
    arguments, _, states = symbol.infer_shape_partial(**(shapes or {'data': (2, 4, 6, 6)}))
    rng = np.random.default_rng(0)
    return {name: nd.array(rng.uniform(0.5, 1.5, shape)) for name, shape in
            [*zip(symbol.list_arguments(), arguments), *zip(symbol.list_auxiliary_states(), states)]}


def values_of(kind, symbol):
    return arrays(symbol, **SHAPES.get(kind, {}))


def computed(symbol, values):
    out = CachedOp(symbol)(*(values[name] for name in symbol.list_inputs()))
    return [array.asnumpy() for array in outputs(out)]


def evaluated(F, graph, values):
    """The outputs of a graph, node by node."""
    def run_node(F, node, inputs):
        return inputs if node is graph.heads else invoke(F, node, inputs)
    return evaluate(F, [*graph.nodes(), graph.heads], values, run_node)[graph.heads]


def assert_equal_bits(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- in and out again


@every_symbol
def test_a_symbol_that_was_a_graph_is_the_same_to_the_letter(kind):
    text = text_of(SYMBOLS[kind]())
    assert text_of(Graph.load(Graph.load(text).dump()).symbol()) == text


@every_symbol
def test_a_symbol_reads_as_it_loads(kind):
    text = text_of(SYMBOLS[kind]())
    assert Graph.read(text).dump() == Graph.load(text).dump()


@every_symbol
def test_a_copy_says_the_same(kind):
    graph = Graph.of(SYMBOLS[kind]())
    assert graph.copy().dump() == graph.dump()


@every_symbol
def test_nodes_stand_in_the_order_in_which_mxnet_visits_them(kind):
    symbol = SYMBOLS[kind]()
    assert [node.name for node in Graph.of(symbol).nodes()] == [node['name'] for node in
                                                                described(text_of(symbol))['nodes']]


@every_symbol
def test_variables_come_in_the_order_of_mxnets_inputs(kind):
    symbol = SYMBOLS[kind]()
    assert list(Graph.of(symbol).variables()) == symbol.list_inputs()


@every_symbol
def test_a_symbol_that_was_a_graph_computes_the_same_to_the_last_bit(kind):
    symbol = SYMBOLS[kind]()
    values = values_of(kind, symbol)
    assert_equal_bits(computed(Graph.of(symbol).symbol(), values), computed(symbol, values))


@every_symbol
def test_nodes_run_one_by_one_on_arrays_compute_what_the_symbol_does(kind):
    symbol = SYMBOLS[kind]()
    values = values_of(kind, symbol)
    out = evaluated(mx.nd, Graph.of(symbol), values)
    assert_equal_bits([array.asnumpy() for array in out], computed(symbol, values))


@every_symbol
def test_nodes_run_one_by_one_on_symbols_make_the_symbol_again(kind):
    symbol = SYMBOLS[kind]()
    graph = Graph.of(symbol)
    made = mx.sym.Group(evaluated(mx.sym, graph, {name: var(name) for name in graph.variables()}))

    def operators(symbol):
        content = described(text_of(symbol))
        return [node for node in content['nodes'] if node['op'] != 'null'], content['heads']
    assert operators(made) == operators(symbol)


@pytest.mark.parametrize('kind', LOOPS)
def test_a_net_with_a_loop_computes_what_the_symbol_does(kind):
    symbol = SYMBOLS[kind]()
    values = values_of(kind, symbol)
    data = values.pop('data')
    net = as_graph(symbol, params=values)
    expected = computed(symbol, {**values, 'data': data})
    for hybridized in (False, True):
        net.hybridize(hybridized)
        assert_equal_bits([array.asnumpy() for array in outputs(net(data))], expected)


def test_one_node_that_outputs_several_heads_stays_one_node():
    graph = Graph.of(heads_in_order())
    first, _, third, fourth = graph.heads.inputs
    assert first.node is third.node is fourth.node and [first.index, third.index, fourth.index] == [1, 0, 1]


def test_a_shared_parameter_stays_one_node():
    graph = Graph.of(shared())
    assert [reader.name for reader in graph.readers(graph.variables()['w'])] == ['first', 'second']


def test_attributes_are_told_apart_from_what_was_noted():
    node = next(node for node in Graph.of(notes()).nodes() if node.op == 'Convolution')
    assert node.parameters == {'kernel': '(3, 3)', 'no_bias': 'True', 'num_filter': '4', 'pad': '(1, 1)'}
    assert node.hidden == {'__ctx_group__': 'left', '__note__': 'all'}


def test_notes_on_a_variable_are_kept():
    assert Graph.of(notes()).variables()['w'].attrs == {
        '__shape__': '(4, 4, 3, 3)', '__lr_mult__': '2.0', '__wd_mult__': '0.0', '__mine__': 'w',
        '__init__': '["normal", {"sigma": 0.1}]'}


@pytest.mark.parametrize('value, says', [('True', True), ('true', True), ('1', True), ('False', False), ('0', False),
                                         (None, False)])
def test_a_boolean_attribute_in_any_spelling_is_understood(value, says):
    assert Node('relu', 'relu', {} if value is None else {'flag': value}, [], []).says('flag') is says


@pytest.mark.parametrize('kind', LOOPS)
def test_the_body_of_a_loop_stays_as_it_was(kind):
    symbol = SYMBOLS[kind]()
    kept = [node.subgraphs for node in Graph.load(Graph.of(symbol).dump()).nodes() if node.subgraphs]
    assert kept == [node['subgraphs'] for node in described(text_of(symbol))['nodes'] if 'subgraphs' in node]


def test_nodes_in_a_file_may_stand_in_any_order():
    content = described(text_of(shared()))
    count = len(content['nodes'])
    content['nodes'].reverse()
    for node in content['nodes']:
        node['inputs'] = [[count - 1 - number, *rest] for number, *rest in node['inputs']]
    content['heads'] = [[count - 1 - number, *rest] for number, *rest in content['heads']]
    content['arg_nodes'] = [count - 1 - number for number in content['arg_nodes']]
    assert text_of(Graph.read(json.dumps(content)).symbol()) == text_of(shared())


def test_a_graph_with_a_quantizer_in_it_is_no_symbol():
    graph = Graph.of(relu(var('data')))
    graph.connect(graph.heads, [Entry(graph.add('gluonquant', 'q', graph.heads.inputs))])
    with pytest.raises(ValueError, match=r"'q' \(gluonquant\) is no operator of MXNet: trace the net instead"):
        graph.symbol()


def test_a_graph_with_a_quantizer_in_it_comes_back_from_its_json():
    graph = gq.attach(relu(convolution(var('data')))).graph
    assert Graph.read(graph.dump()).dump() == graph.dump()


# ---------------------------------------------------------------- the nets of the model zoos


def zoo_entries():
    return [pytest.param(entry, id=entry_id(entry), marks=[] if entry.fast else pytest.mark.slow) for entry in ZOO]


class ZooNet:
    """A net of a model zoo with values, its symbol and an input."""

    def __init__(self, entry):
        self.x = nd.array(np.random.RandomState(1).uniform(-1, 1, (2, 3, entry.size, entry.size)))
        self.net = build(entry)
        self.net.initialize(mx.init.Xavier())
        if entry.train or os.environ.get('MXNET_MKLDNN_ENABLED') == '0':     # see zoo.py
            settle_statistics(self.net, self.x)
        self.net(self.x)
        self.symbol = mx.sym.Group(outputs(self.net(var('data'))))

    def computed_by(self, symbol):
        """What a hybridized block of ``symbol`` makes of the net's Parameters."""
        block = SymbolBlock(symbol, var('data'), params=self.net.collect_params())
        block.hybridize()
        return run(block, self.x)


@pytest.fixture(scope='module', params=zoo_entries())
def zoo_net(request):
    # Searching a graph for common subexpressions takes time quadratic in its size: minutes for the deepest nets.
    before = os.environ.get('MXNET_ELIMINATE_COMMON_EXPR')
    os.environ['MXNET_ELIMINATE_COMMON_EXPR'] = '0'
    mx.random.seed(0)
    np.random.seed(0)
    yield ZooNet(request.param)
    gc.collect()
    if before is None:
        del os.environ['MXNET_ELIMINATE_COMMON_EXPR']
    else:
        os.environ['MXNET_ELIMINATE_COMMON_EXPR'] = before


def test_a_net_that_was_a_graph_is_the_same_to_the_letter(zoo_net):
    text = text_of(zoo_net.symbol)
    assert text_of(Graph.load(Graph.load(text).dump()).symbol()) == text


def test_the_file_of_a_net_reads_as_it_loads(zoo_net):
    text = text_of(zoo_net.symbol)
    assert Graph.read(text).dump() == Graph.load(text).dump()


@cannot_decide_type
def test_a_net_that_was_a_graph_computes_the_same_to_the_last_bit(zoo_net):
    expected = zoo_net.computed_by(zoo_net.symbol)
    assert all(np.isfinite(out).all() for out in expected)
    assert_equal_bits(zoo_net.computed_by(Graph.of(zoo_net.symbol).symbol()), expected)


def test_a_graph_net_computes_what_the_net_does_to_the_last_bit(zoo_net):
    assert_equal_bits(run(as_graph(zoo_net.net), zoo_net.x), run(zoo_net.net, zoo_net.x))


@cannot_decide_type
def test_a_hybridized_graph_net_computes_what_the_fused_net_does_to_the_last_bit(zoo_net):
    made = as_graph(zoo_net.net)
    made.hybridize()
    assert_equal_bits(run(made, zoo_net.x), zoo_net.computed_by(fused(zoo_net.symbol)))


def test_the_shapes_of_a_net_are_those_that_mxnet_infers(zoo_net):
    assert_shapes_are_inferred_ones(zoo_net.symbol, data=zoo_net.x.shape)


# ---------------------------------------------------------------- shapes


def assert_shapes_are_inferred_ones(symbol, **known):
    graph, internals = Graph.of(symbol), symbol.get_internals()
    _, expected, _ = internals.infer_shape_partial(**known)
    shapes = graph.shapes(**known)
    entries = [(node, index) for node in graph.nodes() for index in range(produced(internals, node))]
    assert [shapes.get(entry, ()) for entry in entries] == expected     # (): nothing is known


def produced(internals, node):
    """How many outputs a node has, by the names that MXNet gives them."""
    names = set(internals.list_outputs()) - set(internals.list_inputs())
    return 1 if node.op == 'null' else sum(name.rpartition('_')[0] == node.name for name in names)


@every_symbol
def test_shapes_are_those_that_mxnet_infers(kind):
    symbol = SYMBOLS[kind]()
    values = values_of(kind, symbol)
    assert_shapes_are_inferred_ones(symbol, **{name: values[name].shape for name in symbol.list_arguments()})


def test_a_shape_that_is_not_known_is_left_out():
    graph = Graph.of(mx.sym.Group([relu(var('data')), relu(var('other'), 'second')]))
    assert [node.name for node, _ in graph.shapes(data=(2, 3))] == ['data', 'relu']


def test_a_size_that_is_not_known_is_0():
    graph = Graph.of(mx.sym.FullyConnected(var('data'), num_hidden=3, name='fc'))
    assert {node.name: shape for (node, _), shape in graph.shapes(data=(0, 4)).items()} == {
        'data': (0, 4), 'fc_weight': (3, 4), 'fc_bias': (3,), 'fc': (0, 3)}


def test_shapes_that_variables_note_need_not_be_given():
    graph = Graph.of(relu(var('data', shape=(2, 3))))
    assert set(graph.shapes().values()) == {(2, 3)}


def test_a_quantizer_has_the_shape_of_what_it_reads():
    net = gq.attach(convolution(var('data')))
    found = {node.attrs.get('quantizer'): shape for (node, _), shape in net.graph.shapes(data=(1, 2, 5, 5)).items()}
    assert found['data.output_quantizer'] == (1, 2, 5, 5) and found['conv_weight_quantizer'] == (4, 2, 3, 3)


def test_asking_for_shapes_changes_nothing():
    graph = gq.attach(relu(convolution(var('data')))).graph
    before = graph.dump()
    graph.shapes(data=(1, 2, 5, 5))
    assert graph.dump() == before


# ---------------------------------------------------------------- running nodes


def chain(length):
    x = var('data')
    for number in range(length):
        x = mx.sym.negative(x, name=f'negative{number}')
    return Graph.of(x)


class Tensor:
    """Something that can be watched; MXNet's arrays cannot."""


def test_what_nothing_reads_any_more_is_freed():
    alive, most = weakref.WeakSet(), 0

    def run_node(F, node, inputs):
        nonlocal most
        most = max(most, len(alive))
        made = Tensor()
        alive.add(made)
        return made
    nodes = chain(20).nodes()
    evaluate(None, nodes, {'data': Tensor()}, run_node)
    assert most == 1        # what the running node reads


def test_what_a_later_node_reads_is_kept():
    x = relu(var('data'))
    graph = Graph.of(mx.sym.elemwise_add(mx.sym.negative(mx.sym.negative(x)), x, name='sum'))
    sum_node = graph.heads.inputs[0].node
    out = evaluate(mx.nd, graph.nodes(), {'data': nd.array([-1.0, 2.0])})[sum_node]
    np.testing.assert_array_equal(out[0].asnumpy(), [0, 4])


def test_only_the_outputs_of_nodes_that_no_other_reads_come_back():
    halves = parts(var('data'), 2)
    graph = Graph.of(mx.sym.Group([relu(halves[0], 'a'), mx.sym.negative(halves[1], name='b')]))
    found = evaluate(mx.nd, graph.nodes(), {'data': nd.array([[-1.0, 2.0]])})
    assert {node.name: [array.asscalar() for array in out] for node, out in found.items()} == {'a': [0.0], 'b': [-2.0]}


def test_every_output_of_a_node_that_nothing_reads_comes_back():
    graph = Graph.of(parts(var('data'), 2))
    (out,) = evaluate(mx.nd, graph.nodes(), {'data': nd.array([[-1.0, 2.0]])}).values()
    assert [array.asscalar() for array in out] == [-1.0, 2.0]


def test_nodes_run_as_they_are_told_to():
    graph = Graph.of(relu(mx.sym.negative(var('data'), name='minus')))
    seen = []

    def run_node(F, node, inputs):
        seen.append((F, node.name, inputs))
        return f'{node.name} {inputs[0]}'
    out = evaluate('F', graph.nodes(), {'data': 'x'}, run_node)
    assert seen == [('F', 'minus', ['x']), ('F', 'relu', ['minus x'])]
    assert list(out.values()) == [['relu minus x']]


def test_a_symbol_is_named_after_the_node_that_makes_it():
    graph = Graph.of(notes())
    made, = evaluated(mx.sym, graph, {name: var(name) for name in graph.variables()})
    assert made.list_outputs() == ['relu_output'] and made.attr('__note__') == 'all'


def test_gradients_flow_through_nodes_that_run_one_by_one():
    graph = Graph.of(mx.sym.square(var('data')))
    x = nd.array([1.0, -3.0])
    x.attach_grad()
    with mx.autograd.record():
        out, = evaluated(mx.nd, graph, {'data': x})
    out.backward()
    np.testing.assert_array_equal(x.grad.asnumpy(), [2, -6])


# ---------------------------------------------------------------- operators


@pytest.mark.parametrize('name, known_as', [('_plus', 'elemwise_add'), ('elemwise_add', 'elemwise_add'),
                                            ('flatten', 'Flatten'), ('split', 'SliceChannel'), ('concat', 'Concat'),
                                            ('identity', '_copy'), ('ElementWiseSum', 'add_n')])
def test_an_operator_is_called_as_json_calls_it(name, known_as):
    assert canonical(name) == known_as


def test_an_unknown_operator_is_refused_with_the_nearest_name():
    message = r"^'Convolutio' is no operator of MXNet 1\.9\.1\. Did you mean 'Convolution'\?$"
    with pytest.raises(ValueError, match=message):
        operator('Convolutio')
    with pytest.raises(ValueError, match=message):
        canonical('Convolutio')


class Identity(mx.operator.CustomOp):
    def forward(self, is_train, req, in_data, out_data, aux):
        self.assign(out_data[0], req[0], in_data[0])


@mx.operator.register('gluonquant_test_custom')
class IdentityProp(mx.operator.CustomOpProp):
    def list_arguments(self):
        return ['data', 'unused']

    def create_operator(self, ctx, shapes, dtypes):
        return Identity()


# Operators whose attributes say how many inputs they read.
COUNTED = {
    'prelu': lambda: mx.sym.LeakyReLU(var('data'), act_type='prelu', name='node'),
    'elu': lambda: mx.sym.LeakyReLU(var('data'), act_type='elu', name='node'),
    'no bias': lambda: convolution(var('data'), 'node', no_bias=True),
    'no bias by default': lambda: mx.sym.Deconvolution(var('data'), kernel=(2, 2), num_filter=2, name='node'),
    'lstm': lambda: mx.sym.RNN(var('data'), mode='lstm', state_size=4, num_layers=1, name='node'),
    'gru': lambda: mx.sym.RNN(var('data'), mode='gru', state_size=4, num_layers=1, name='node'),
    'lengths': lambda: mx.sym.SequenceMask(var('data'), var('lengths'), use_sequence_length=True, name='node'),
    'no lengths': lambda: mx.sym.SequenceMask(var('data'), name='node'),
    'bilinear': lambda: mx.sym.UpSampling(var('data'), var('w'), scale=2, num_filter=3, sample_type='bilinear',
                                          num_args=2, name='node'),
    'nearest': lambda: mx.sym.UpSampling(var('data'), var('b'), scale=2, sample_type='nearest', num_args=2,
                                         name='node'),
    'add_n': lambda: mx.sym.add_n(*(var(name) for name in 'abcd'), name='node'),
    'concat': lambda: mx.sym.Concat(*(var(name) for name in 'abc'), name='node'),
    'custom': lambda: mx.sym.Custom(var('data'), var('other'), op_type='gluonquant_test_custom', name='node'),
}
every_count = pytest.mark.parametrize('kind', COUNTED)


@every_count
def test_optional_inputs_are_counted_as_mxnet_counts_them(kind):
    text = text_of(COUNTED[kind]())
    assert text_of(Graph.read(text).symbol()) == text


@every_count
def test_an_optional_input_too_many_is_refused(kind):
    content = described(text_of(COUNTED[kind]()))
    node = content['nodes'][-1]
    node['inputs'].append([0, 0, 0])
    count = len(node['inputs'])
    with pytest.raises(ValueError, match=f"^node 'node': {node['op']} reads {count - 1} inputs, but has {count}$"):
        Graph.read(json.dumps(content))


# ---------------------------------------------------------------- rewiring


def edges(graph):
    """{node or 'heads': what it reads}, variables left out; 'q:1' is output 1 of q."""
    return {node.name or 'heads': ' '.join(entry.node.name + (f':{entry.index}' if entry.index else '')
                                           for entry in node.inputs)
            for node in [*graph.nodes(), graph.heads] if node.op != 'null'}


def named(graph, name):
    return next(node for node in graph.nodes() if node.name == name)


def fan():
    """Two readers of both halves of x, one of the whole; one half is an output."""
    halves = parts(relu(var('x'), 'x1'), 2, 'half')
    a = mx.sym.elemwise_add(halves[0], halves[1], name='a')
    b = mx.sym.elemwise_mul(halves[0], halves[0], name='b')
    return Graph.of(mx.sym.Group([a, b, halves[0]]))


def test_readers_come_once_for_every_input():
    graph = fan()
    assert [node.name or 'heads' for node in graph.readers(named(graph, 'half'))] == ['a', 'a', 'b', 'b', 'heads']


def test_readers_of_one_output_come_once_for_every_input():
    graph = fan()
    half = named(graph, 'half')
    assert [node.name or 'heads' for node in graph.entry_readers(Entry(half, 0))] == ['a', 'b', 'b', 'heads']
    assert [node.name for node in graph.entry_readers(Entry(half, 1))] == ['a']


def test_a_changed_list_of_readers_changes_nothing_in_the_graph():
    graph = fan()
    graph.readers(named(graph, 'half')).clear()
    assert len(graph.readers(named(graph, 'half'))) == 5


def test_redirecting_moves_every_reader_at_every_place_and_no_other_output():
    graph = fan()
    half, x = named(graph, 'half'), named(graph, 'x')
    graph.redirect(Entry(half, 0), Entry(x))
    assert edges(graph) == {'x1': 'x', 'half': 'x1', 'a': 'x half:1', 'b': 'x x', 'heads': 'a b x'}


def test_redirecting_some_readers_leaves_the_others():
    graph = fan()
    graph.redirect(Entry(named(graph, 'half')), Entry(named(graph, 'x')), [named(graph, 'b')])
    assert edges(graph) == {'x1': 'x', 'half': 'x1', 'a': 'half half:1', 'b': 'x x', 'heads': 'a b half'}


def test_redirecting_readers_of_something_else_changes_nothing():
    graph = fan()
    before = edges(graph)
    graph.redirect(Entry(named(graph, 'half'), 1), Entry(named(graph, 'x')), [named(graph, 'b')])
    assert edges(graph) == before


def test_a_node_put_behind_a_tensor_goes_on_reading_it():
    graph = fan()
    half = named(graph, 'half')
    graph.redirect(Entry(half), Entry(graph.add('tanh', 'tanh', [Entry(half)])))
    assert edges(graph) == {'x1': 'x', 'half': 'x1', 'tanh': 'half', 'a': 'tanh half:1', 'b': 'tanh tanh',
                            'heads': 'a b tanh'}


def test_redirecting_does_not_mind_how_often_a_variable_was_written():
    graph = Graph.of(shared_states())
    mean = next(entry for entry in named(graph, 'second').inputs if entry.node.name == 'moving_mean')
    other = graph.add('null', 'other', [])
    graph.redirect(Entry(mean.node), Entry(other))
    assert 'moving_mean' not in graph.variables() and len(graph.readers(other)) == 2


def test_readers_are_known_after_rewiring():
    graph = fan()
    half, x = named(graph, 'half'), named(graph, 'x')
    graph.redirect(Entry(half, 0), Entry(x))
    assert [node.name for node in graph.readers(half)] == ['a']
    assert sorted(node.name or 'heads' for node in graph.readers(x)) == ['a', 'b', 'b', 'heads', 'x1']


def test_a_rewired_graph_knows_its_readers_as_one_that_is_read_anew():
    graph = fan()
    graph.redirect(Entry(named(graph, 'half'), 1), Entry(named(graph, 'x')))
    again = graph.copy()
    for node, other in zip(graph.nodes(), again.nodes()):
        assert sorted(reader.name for reader in graph.readers(node)) == \
            sorted(reader.name for reader in again.readers(other))


def test_a_node_that_is_connected_anew_reads_that_only():
    graph = fan()
    graph.connect(named(graph, 'b'), [Entry(named(graph, 'x')), Entry(named(graph, 'half'), 1)])
    assert edges(graph)['b'] == 'x half:1'


def test_a_node_that_nothing_reads_any_more_leaves_with_all_that_it_alone_read():
    graph = fan()
    graph.connect(graph.heads, [Entry(named(graph, 'x'))])
    assert edges(graph) == {'heads': 'x'}


def test_what_leaves_is_no_reader_any_more():
    graph = fan()
    x = named(graph, 'x')
    graph.connect(graph.heads, [Entry(x)])
    assert graph.readers(x) == [graph.heads]


def test_what_leaves_and_is_read_again_by_its_own_reader_stays():
    graph = fan()
    half = named(graph, 'half')
    graph.connect(named(graph, 'a'), [Entry(half, 1), Entry(half, 0)])
    assert edges(graph)['half'] == 'x1' and edges(graph)['a'] == 'half:1 half'


def test_a_long_chain_leaves_without_a_deep_stack():
    graph = chain(5000)
    graph.connect(graph.heads, [Entry(graph.variables()['data'])])
    assert [node.name for node in graph.nodes()] == ['data']


def test_a_new_node_is_read_by_nothing_and_stands_in_no_graph_yet():
    graph = fan()
    node = graph.add('tanh', 'new', [Entry(named(graph, 'x'))])
    assert graph.readers(node) == [] and node not in graph.nodes()


def test_attributes_of_a_new_node_become_text():
    node = fan().add('clip', 'new', [], a_min=0, a_max=6.5, flag=True)
    assert node.attrs == {'a_min': '0', 'a_max': '6.5', 'flag': 'True'}


def test_a_new_node_has_a_name_of_its_own():
    graph = fan()
    assert [graph.add('tanh', name, []).name for name in ('a', 'a', 'new', 'new')] == ['a_2', 'a_3', 'new', 'new_2']


def test_a_free_name_is_given_once():
    graph = fan()
    assert [graph.free_name(name) for name in ('fresh', 'fresh', 'x', 'half', 'half')] == \
        ['fresh', 'fresh_2', 'x_2', 'half_2', 'half_3']


def test_a_name_that_looks_numbered_is_not_given_twice():
    graph = fan()
    assert [graph.free_name(name) for name in ('a_2', 'a', 'a_2')] == ['a_2', 'a_3', 'a_2_2']


def test_a_rewired_graph_computes_what_it_says():
    graph = Graph.of(mx.sym.elemwise_add(relu(var('data')), mx.sym.negative(var('data_')), name='sum'))
    graph.redirect(Entry(graph.variables()['data_']), Entry(named(graph, 'relu')))
    x = nd.array([1.0, -2.0])
    assert_equal_bits(computed(graph.symbol(), {'data': x}), [np.zeros(2, 'float32')])


@pytest.mark.parametrize('target', [None, 'tensorrt', 'onnxruntime', 'openvino', 'onednn'])
def test_stripping_takes_all_quantizers_out_again(target):
    x = relu(norm(convolution(var('data'), 'first')))
    symbol = mx.sym.Concat(mx.sym.elemwise_add(convolution(x, 'second'), x, name='sum'), x, name='both')
    graph = gq.attach(symbol, target=target).graph
    assert any(node.op == 'gluonquant' for node in graph.nodes())
    graph.strip()
    assert text_of(graph.symbol()) == text_of(symbol)


def test_stripping_unfolds_what_is_folded():
    symbol = relu(norm(convolution(var('data'))))
    values = arrays(symbol)
    net = gq.attach(symbol, params={name: value for name, value in values.items() if name != 'data'})
    graph = gq.fold(net, 'batch').graph
    assert any(node.op == 'gluonquant_folded' for node in graph.nodes())
    graph.strip()
    assert edges(graph) == edges(Graph.of(symbol))


def test_entries_are_the_same_tensor_whatever_their_version():
    node = Node('null', 'x', {}, [], [])
    assert same(Entry(node, 0, 0), Entry(node, 0, 3)) and not same(Entry(node, 0), Entry(node, 1))
    assert not same(Entry(node), Entry(Node('null', 'x', {}, [], [])))


def test_ancestors_are_only_what_is_needed():
    graph = fan()
    assert [node.name for node in ancestors([Entry(named(graph, 'x1'))])] == ['x', 'x1']


def test_ancestors_of_several_come_once():
    graph = fan()
    found = [node.name for node in ancestors([Entry(named(graph, 'b')), Entry(named(graph, 'a'))])]
    assert found == ['x', 'x1', 'half', 'b', 'a']


def test_a_cycle_is_named():
    graph = Graph.of(relu(mx.sym.negative(var('x'), name='minus')))
    graph.connect(named(graph, 'minus'), [Entry(named(graph, 'relu'))])
    with pytest.raises(ValueError, match=r"^node 'minus' \(negative\) reads 'relu', which depends on it: the graph "
                                         "has a cycle$"):
        graph.nodes()


# ---------------------------------------------------------------- files of old versions

# 0.8: 'param' and 'attr' beside each other, 'backward_source_id', edges of two numbers, states of BatchNorm not told,
#      multipliers without underscores, that of a bias at the layer; no version. 0.9: 'attr', edges of three numbers.
# 0.12: written by Python 2, sizes are long integers. 1.0: 'attrs'.
FILES = {'mxnet_0_8': ['data', 'softmax_label'], 'mxnet_0_9': ['data'], 'mxnet_0_12': ['data'], 'mxnet_1_0': ['data']}
every_file = pytest.mark.parametrize('name', FILES)


def golden(name):
    return (GOLDEN / f'{name}.json').read_text(encoding='utf8')


def old_parameters(name):
    values = arrays(mx.sym.load_json(golden(name)), data=(2, 3, 8, 8))
    return {key: value for key, value in values.items() if key not in FILES[name]}


def old_inputs(name):
    return [nd.array(np.random.default_rng(2).normal(size=(2, 3, 8, 8))), nd.array([0, 2])][:len(FILES[name])]


@every_file
def test_an_old_file_reads_as_mxnet_reads_it(name):
    assert text_of(Graph.read(golden(name)).symbol()) == text_of(mx.sym.load_json(golden(name)))


@every_file
def test_an_old_file_computes_what_mxnet_computes(name):
    values = {**old_parameters(name), **dict(zip(FILES[name], old_inputs(name)))}
    assert_equal_bits(computed(Graph.read(golden(name)).symbol(), values),
                      computed(mx.sym.load_json(golden(name)), values))


@every_file
def test_quantizers_attach_to_an_old_file(name):
    net = gq.attach(str(GOLDEN / f'{name}.json'), params=old_parameters(name), inputs=FILES[name])
    gq.calibrate(net, [old_inputs(name)], forward=lambda net, batch: net(*batch))
    quantized = [out.asnumpy() for out in outputs(net(*old_inputs(name)))]
    gq.set_mode(net, 'off')
    expected = computed(mx.sym.load_json(golden(name)),
                        {**old_parameters(name), **dict(zip(FILES[name], old_inputs(name)))})
    assert_equal_bits([out.asnumpy() for out in outputs(net(*old_inputs(name)))], expected)
    assert not np.array_equal(quantized[0], expected[0]) and np.isfinite(quantized[0]).all()


@pytest.mark.parametrize('name, parameter, multipliers', [
    ('mxnet_0_8', 'conv_weight', (1.0, 0.5)), ('mxnet_0_8', 'conv_bias', (2.0, 1.0)),
    ('mxnet_0_9', 'conv_weight', (0.1, 0.5)), ('mxnet_1_0', 'conv_weight', (2.0, 1.0))])
def test_the_multipliers_of_an_old_file_arrive(name, parameter, multipliers):
    net = gq.attach(str(GOLDEN / f'{name}.json'), inputs=FILES[name])
    found = net.collect_params()[parameter]
    assert (found.lr_mult, found.wd_mult) == multipliers


def test_states_that_an_old_file_does_not_tell_are_states():
    net = gq.attach(str(GOLDEN / 'mxnet_0_8.json'), inputs=FILES['mxnet_0_8'])
    kinds = {name: parameter.grad_req for name, parameter in net.collect_params('norm_').items()}
    assert kinds == {'norm_gamma': 'write', 'norm_beta': 'write', 'norm_moving_mean': 'null', 'norm_moving_var': 'null'}


def test_the_shape_in_a_file_of_python_2_arrives():
    net = as_graph(str(GOLDEN / 'mxnet_0_12.json'))
    assert net.collect_params()['first_weight'].shape == (4, 3, 3, 3)


# ---------------------------------------------------------------- broken files


def net_symbol():
    halves = parts(norm(convolution(var('data'))), 2)
    total = mx.sym.elemwise_add(halves[0], halves[1], name='sum')
    return mx.sym.FullyConnected(total, num_hidden=3, name='fc')


def broken(change):
    """The JSON of `net_symbol` after ``change(content, nodes by name)``."""
    content = described(text_of(net_symbol()))
    change(content, {node['name']: node for node in content['nodes']})
    return json.dumps(content, ensure_ascii=False)


def read_broken(change):
    return Graph.read(broken(change))


@pytest.mark.parametrize('text', ['', '{', 'hello', '{"nodes": [', broken(lambda *_: None)[:-200], '\ufeff{}'])
def test_what_is_not_json_is_refused(text):
    with pytest.raises(ValueError, match='^not the JSON of a symbol: '):
        Graph.read(text)


@pytest.mark.parametrize('text', ['[]', 'null', '3', '"nodes"', 'NaN', '{}', '{"nodes": []}', '{"heads": []}',
                                  '{"nodes": {}, "heads": []}', '{"nodes": [], "heads": null}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ValueError, match="^not the JSON of a symbol: it has no lists 'nodes' and 'heads'$"):
        Graph.read(text)


def test_json_too_deep_for_python_is_refused():
    with pytest.raises(ValueError, match='^not the JSON of a symbol'):
        Graph.read('[' * 100000)


# name -> (what happens to the file, what is said of it)
BROKEN = {
    'no list of variables': (lambda c, n: c.pop('arg_nodes'), "'arg_nodes'"),
    'a node that is a number': (lambda c, n: c['nodes'].__setitem__(3, 7), '^node number 3 has no '),
    'no name': (lambda c, n: n['conv'].pop('name'), "^node number 3 has no 'name' or no 'op'$"),
    'no operator': (lambda c, n: n['conv'].pop('op'), "^node number 3 has no 'name' or no 'op'$"),
    'a number as name': (lambda c, n: n['conv'].update(name=5), "^node number 3 has no 'name' or no 'op'$"),
    'a number as operator': (lambda c, n: n['conv'].update(op=5), "^node number 3 has no 'name' or no 'op'$"),
    'no inputs': (lambda c, n: n['conv'].pop('inputs'), "^node 'conv' has no list 'inputs'$"),
    'inputs by name': (lambda c, n: n['conv'].update(inputs={}), "^node 'conv' has no list 'inputs'$"),
    'edge a number': (lambda c, n: n['sum'].update(inputs=[9, 9]), "^node 'sum' reads 9: an edge is "),
    'edge too short': (lambda c, n: n['sum'].update(inputs=[[9], [9]]), r"^node 'sum' reads \[9\]: an edge is "),
    'edge too long': (lambda c, n: n['sum'].update(inputs=[[9, 0, 0, 0]] * 2), r"node 'sum' reads \[9, 0, 0, 0\]"),
    'edge of text': (lambda c, n: n['sum'].update(inputs=[['9', 0, 0]] * 2), r"^node 'sum' reads \['9', 0, 0\]: an"),
    'edge of fractions': (lambda c, n: n['sum'].update(inputs=[[9.0, 0, 0]] * 2), r"^node 'sum' reads \[9\.0, 0, 0\]"),
    'edge of booleans': (lambda c, n: n['sum'].update(inputs=[[True, 0, 0]] * 2), r"^node 'sum' reads \[True, 0, 0\]"),
    'no such node': (lambda c, n: n['sum']['inputs'].__setitem__(0, [99, 0, 0]),
                     "^node 'sum' reads node number 99, but there are 14$"),
    'a node before the first': (lambda c, n: n['sum']['inputs'].__setitem__(0, [-1, 0, 0]),
                                "^node 'sum' reads node number -1, but there are 14$"),
    'no such head': (lambda c, n: c.update(heads=[[99, 0, 0]]), '^the graph reads node number 99, but there are 14$'),
    'no such output': (lambda c, n: n['sum']['inputs'].__setitem__(0, [9, 2, 0]),
                       r"^node 'sum' reads output 2 of 'parts' \(SliceChannel\), which has 2$"),
    'no such output of a variable': (lambda c, n: n['conv']['inputs'].__setitem__(0, [0, 1, 0]),
                                     r"^node 'conv' reads output 1 of 'data' \(null\), which has 1$"),
    'an output before the first': (lambda c, n: n['sum']['inputs'].__setitem__(0, [9, -1, 0]),
                                   "^node 'sum' reads output -1 of 'parts'"),
    'no such output of a head': (lambda c, n: c.update(heads=[[13, 1, 0]]),
                                 r"^the graph returns output 1 of 'fc' \(FullyConnected\), which has 1$"),
    'a number too large': (lambda c, n: n['sum']['inputs'].__setitem__(0, [9, 10 ** 30, 0]), "node 'sum'"),
    'a cycle': (lambda c, n: n['conv']['inputs'].__setitem__(0, [10, 0, 0]), 'the graph has a cycle$'),
    'a node that reads itself': (lambda c, n: n['conv']['inputs'].__setitem__(0, [3, 0, 0]),
                                 r"^node 'conv' \(Convolution\) reads 'conv', .*the graph has a cycle$"),
    'an unknown operator': (lambda c, n: n['conv'].update(op='Convolutio'),
                            r"^node 'conv': 'Convolutio' is no operator of MXNet 1\.9\.1\. "
                            r"Did you mean 'Convolution'\?$"),
    'no operator\'s name': (lambda c, n: n['conv'].update(op=''), r"^node 'conv': '' is no operator of MXNet"),
    'an unknown attribute': (lambda c, n: n['conv']['attrs'].update(kernal='(3, 3)'),
                             r"^node 'conv' \(Convolution\): .*kernal"),
    'a missing attribute': (lambda c, n: n['conv']['attrs'].pop('kernel'),
                            r"^node 'conv' \(Convolution\): .*kernel .* is not presented"),
    'a bad value': (lambda c, n: n['conv']['attrs'].update(num_filter='many'),
                    r"^node 'conv' \(Convolution\): .*num_filter .*value='many'"),
    'a value below the least': (lambda c, n: n['parts']['attrs'].update(num_outputs='0'),
                                r"^node 'parts' \(SliceChannel\): .*num_outputs"),
    'a value that is a number': (lambda c, n: n['conv']['attrs'].update(num_filter=4), "node 'conv'"),
    'attributes in a list': (lambda c, n: n['conv'].update(attrs=[1]), "node 'conv'"),
    'attributes null': (lambda c, n: n['conv'].update(attrs=None), "node 'conv'"),
    'attributes of a variable in a list': (lambda c, n: n['data'].update(attrs=['x']), "node 'data'"),
    'a note that is a number': (lambda c, n: n['data'].update(attrs={'__shape__': 3}), "node 'data'"),
    'attributes as text': (lambda c, n: n['conv'].update(attrs='(3, 3)'), "node 'conv'"),
    'too few inputs': (lambda c, n: n['conv']['inputs'].pop(), "^node 'conv': Convolution reads 3 inputs, but has 2$"),
    'too many inputs': (lambda c, n: n['conv']['inputs'].append([0, 0, 0]),
                        "^node 'conv': Convolution reads 3 inputs, but has 4$"),
    'a variable that reads': (lambda c, n: n['conv_weight'].update(inputs=[[0, 0, 0]]), "node 'conv_weight'"),
    'an operator that became a variable': (lambda c, n: n['norm'].update(op='null'), "node 'norm'"),
    'two variables of one name': (lambda c, n: n['data'].update(name='conv_weight'),
                                  "^two variables are called 'conv_weight'$"),
    'an unknown key': (lambda c, n: n['conv'].update(comment='mine'), "node 'conv'"),
}


@pytest.mark.parametrize('kind', BROKEN)
def test_a_broken_file_is_refused_and_the_node_is_named(kind):
    change, message = BROKEN[kind]
    with pytest.raises(ValueError, match=message):
        read_broken(change)


def test_the_file_of_a_broken_symbol_is_named(tmp_path):
    path = tmp_path / 'net-symbol.json'
    path.write_text(broken(BROKEN['no such output'][0]), encoding='utf8')
    with pytest.raises(ValueError, match=rf"^{path}: node 'sum' reads output 2 of 'parts'"):
        gq.attach(str(path))


def test_a_broken_symbol_says_nothing_about_nodes_that_are_sound():
    with pytest.raises(ValueError) as error:
        read_broken(BROKEN['a bad value'][0])
    assert 'norm' not in str(error.value)


def test_text_that_python_escaped_is_read():
    text = json.dumps(described(text_of(scripts())), ensure_ascii=True)
    assert '\\u' in text and text_of(Graph.read(text).symbol()) == text_of(scripts())


def test_nodes_that_nothing_reads_are_left_out():
    graph = read_broken(lambda content, nodes: content['nodes'].append({'op': 'relu', 'name': 'x',
                                                                        'inputs': [[0, 0, 0]]}))
    assert 'x' not in [node.name for node in graph.nodes()]


# The body of a loop, as it is in the file.
BODIES = {
    'a cycle': lambda body: body['nodes'][-1]['inputs'].__setitem__(0, [len(body['nodes']) - 1, 0, 0]),
    'no such node': lambda body: body['nodes'][-1]['inputs'].__setitem__(0, [99, 0, 0]),
    'no such output': lambda body: body['nodes'][-1]['inputs'].__setitem__(0, [0, 9, 0]),
    'no such output of a head': lambda body: body['heads'].__setitem__(0, [len(body['nodes']) - 1, 9, 0]),
    'an input too many': lambda body: body['nodes'][-1]['inputs'].append([0, 0, 0]),
    'no heads': lambda body: body.update(heads=[]),
    'an unknown operator': lambda body: body['nodes'][-1].update(op='nope'),
}


@pytest.mark.parametrize('kind', BODIES)
def test_a_broken_body_of_a_loop_is_refused_and_the_loop_is_named(kind):
    content = described(text_of(foreach()))
    BODIES[kind](content['nodes'][-1]['subgraphs'][0])
    with pytest.raises(ValueError, match="node '_foreach"):
        Graph.read(json.dumps(content))


def test_a_loop_without_a_body_is_refused():
    content = described(text_of(foreach()))
    del content['nodes'][-1]['subgraphs']
    with pytest.raises(ValueError, match=r"^node '_foreach\d*' \(_foreach\)"):
        Graph.read(json.dumps(content))


def assert_refused_by_a_process(tmp_path, text, node, then=''):
    """A process of its own reads a symbol, and ``then`` does something with the graph: ValueError names the node."""
    path = tmp_path / 'net-symbol.json'
    path.write_text(text, encoding='utf8')
    program = f"""
from gluonquant.symbol_graph import Graph
try:
    graph = Graph.read(open({str(path)!r}, encoding='utf8').read())
    {then}
except ValueError as error:
    assert {node!r} in str(error), error
else:
    raise AssertionError('not refused')
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
    assert done.returncode == 0, done.stderr[-2000:]


# MXNet crashes on these.
def test_the_multiplier_of_an_input_that_is_not_there_is_refused(tmp_path):
    content = described(golden('mxnet_0_8'))
    node = next(node for node in content['nodes'] if 'bias_lr_mult' in node.get('attr', {}))
    node['inputs'].pop()
    assert_refused_by_a_process(tmp_path, json.dumps(content), 'conv')


@pytest.mark.slow
@pytest.mark.parametrize('op', ['Convolution', 'Deconvolution'])
def test_a_layer_in_no_groups_is_refused(tmp_path, op):
    symbol = getattr(mx.sym, op)(var('data'), kernel=(3, 3), num_filter=4, num_group=0, name='conv')
    assert_refused_by_a_process(tmp_path, text_of(symbol), 'conv', 'graph.shapes(data=(1, 2, 6, 6))')


@pytest.mark.slow
def test_a_loop_over_an_input_that_it_does_not_have_is_refused(tmp_path):
    content = described(text_of(foreach()))
    content['nodes'][-1]['attrs']['in_data_locs'] = '[99]'
    assert_refused_by_a_process(tmp_path, json.dumps(content), '_foreach', 'graph.shapes(data=(1, 2, 6, 6))')


# ---------------------------------------------------------------- any change of a file


def quantized_text():
    return gq.attach(net_symbol()).graph.dump()


FUZZED = {'net': lambda: text_of(net_symbol()), 'loop': lambda: text_of(foreach()), 'old': lambda: golden('mxnet_0_8'),
          'heads': lambda: text_of(heads_in_order()), 'quantized': quantized_text}
# Small numbers only: MXNet makes as many outputs as an attribute says.
scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 40), st.sampled_from([
    0.5, -1.0, 10 ** 12, '', 'null', '0', '-1', '7', 'x', '(1,)', '(0, 0)', '()', 'True', 'relu', 'Convolution',
    'add_n', '_foreach', 'gluonquant', 'gluonquant_folded', 'Custom', 'data', 'conv', 'é\n"', '\ud800', '\0']))
replacements = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
    st.sampled_from(['op', 'name', 'inputs', 'attrs', 'x']), inner, max_size=2)), max_leaves=4)


def places(value, path=()):
    """Every place in nested lists and dicts, as the keys that lead to it."""
    found = []
    if isinstance(value, (dict, list)):
        for key in (value if isinstance(value, dict) else range(len(value))):
            found += [(*path, key), *places(value[key], (*path, key))]
    return found


@st.composite
def mutations(draw):
    """JSON of a symbol with a few things dropped, doubled, replaced, exchanged, or cut off."""
    content = json.loads(draw(st.sampled_from(sorted(TEXTS.values()))))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(content)))
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(['drop', 'replace', 'replace', 'double', 'exchange', 'shift']))
        key = path[-1]
        if kind == 'drop':
            del parent[key]
        elif kind == 'double' and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 'exchange':
            other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
            parent[key], parent[other] = parent[other], parent[key]
        elif kind == 'shift' and type(parent[key]) is int:
            parent[key] += draw(st.integers(-3, 3))
        else:
            parent[key] = draw(replacements)
        if not places(content):
            break
    text = json.dumps(content, ensure_ascii=draw(st.booleans()))
    return text[:draw(st.integers(0, len(text)))] if draw(st.integers(0, 19)) == 0 else text


TEXTS = {kind: make() for kind, make in FUZZED.items()}


def check_mutation(text):
    try:
        graph = Graph.read(text)
    except ValueError as error:
        assert str(error)
    else:
        assert Graph.load(graph.dump()).dump() == graph.dump()
        if not any(node.op in OURS for node in graph.nodes()):
            graph.symbol()


@settings(max_examples=300, deadline=None)
@given(mutations())
def test_any_change_of_a_file_is_read_or_refused(text):
    check_mutation(text)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(mutations())
def test_any_of_many_changes_of_a_file_is_read_or_refused(text):
    check_mutation(text)


# ---------------------------------------------------------------- Parameters


def parameters():
    return {name: value for name, value in arrays(net_symbol(), data=(2, 3, 6, 6)).items() if name != 'data'}


def with_parameter(name, value):
    return {**parameters(), name: value}


def test_names_with_their_kind_are_understood():
    states = set(net_symbol().list_auxiliary_states())
    marked = {('aux:' if name in states else 'arg:') + name: value for name, value in parameters().items()}
    net = gq.attach(net_symbol(), params=marked)
    np.testing.assert_array_equal(net.collect_params()['norm_moving_var'].data().asnumpy(),
                                  parameters()['norm_moving_var'].asnumpy())


def test_arrays_of_numpy_are_understood():
    net = gq.attach(net_symbol(), params={name: value.asnumpy() for name, value in parameters().items()})
    np.testing.assert_array_equal(net.collect_params()['conv_weight'].data().asnumpy(),
                                  parameters()['conv_weight'].asnumpy())


def test_parameters_that_nothing_reads_are_left_out():
    assert 'other' not in gq.attach(net_symbol(), params=with_parameter('other', nd.ones(3))).collect_params()


@pytest.mark.parametrize('name, node', [
    ('conv_weight', r'conv. \(Convolution\)'), ('norm_gamma', r'norm. \(BatchNorm\)'),
    ('norm_moving_var', r'norm. \(BatchNorm\)'), ('fc_bias', r'fc. \(FullyConnected\)')])
def test_a_missing_parameter_is_named_with_the_node_that_reads_it(name, node):
    values = parameters()
    del values[name]
    with pytest.raises(ValueError, match=f"^node '{node} reads '{name}', for which there is no Parameter"):
        gq.attach(net_symbol(), params=values)


def test_a_parameter_of_nearly_the_right_name_is_suggested():
    values = parameters()
    values['conv_weigth'] = values.pop('conv_weight')
    with pytest.raises(ValueError, match=r"reads 'conv_weight', .*Did you mean 'conv_weigth'\?"):
        gq.attach(net_symbol(), params=values)


@pytest.mark.parametrize('name, shape, message', [
    ('conv_weight', (4, 3, 3), r"'conv' \(Convolution\) reads 'conv_weight' of shape \(4, 3, 3\), but takes "
                               r'\(4, \?, 3, 3\)'),
    ('conv_weight', (4, 3, 3, 5), r"'conv' .* of shape \(4, 3, 3, 5\), but takes \(4, \?, 3, 3\)"),
    ('conv_bias', (5,), r"'conv' .*'conv_bias' of shape \(5,\), but takes \(4"),
    ('fc_weight', (2, 72), r"'fc' \(FullyConnected\) reads 'fc_weight' of shape \(2, 72\), but takes \(3, \?\)"),
    ('norm_gamma', (5,), r"'norm' \(BatchNorm\) reads 'norm_gamma' of shape \(5,\)"),
    ('norm_moving_mean', (3,), r"'norm' \(BatchNorm\) reads 'norm_moving_mean' of shape \(3,\)"),
    ('norm_moving_var', (1, 4, 1, 1), r"'norm' \(BatchNorm\) reads 'norm_moving_var' of shape \(1, 4, 1, 1\)"),
])
def test_a_parameter_of_the_wrong_shape_is_named_with_the_node_that_reads_it(name, shape, message):
    with pytest.raises(ValueError, match=message):
        gq.attach(net_symbol(), params=with_parameter(name, nd.ones(shape)))


@pytest.mark.parametrize('value', [None, [1.0, 2.0], 3.0, 'ones', np.float32(1)])
def test_a_parameter_that_is_no_array_is_named(value):
    with pytest.raises(TypeError, match=rf"^params\['conv_bias'\] is a {type(value).__name__}, not an array$"):
        gq.attach(net_symbol(), params=with_parameter('conv_bias', value))


@pytest.mark.parametrize('dtype', ['int32', 'bool', 'S1', 'object'])
def test_a_parameter_that_is_not_of_real_numbers_is_named(dtype):
    with pytest.raises((TypeError, ValueError), match='conv_bias'):
        gq.attach(net_symbol(), params=with_parameter('conv_bias', np.ones(4).astype(dtype)))


def test_parameters_in_float64_of_numpy_run():
    values = {name: value.asnumpy().astype('float64') for name, value in parameters().items()}
    net = gq.attach(net_symbol(), params=values)
    x = nd.array(np.random.default_rng(0).normal(size=(2, 3, 6, 6)))
    gq.calibrate(net, [x])
    assert np.isfinite(net(x).asnumpy()).all()


@pytest.mark.parametrize('params', [3.5, ['conv_weight'], {3: nd.ones(3)}])
def test_parameters_in_another_form_are_refused(params):
    with pytest.raises(TypeError):
        gq.attach(net_symbol(), params=params)


def test_the_number_of_an_open_file_is_refused_and_the_file_stays_open():
    reading, writing = os.pipe()
    try:
        with pytest.raises(TypeError):
            gq.attach(net_symbol(), params=reading)
        os.fstat(reading)       # OSError if it is closed
        with pytest.raises(TypeError):
            gq.attach(writing)
        os.fstat(writing)
    finally:
        for end in (reading, writing):
            with suppress(OSError):
                os.close(end)


@pytest.mark.parametrize('make', [
    lambda x: norm(convolution(x), axis=3), lambda x: norm(convolution(x), axis=-1),
    lambda x: norm(mx.sym.FullyConnected(x, num_hidden=3, flatten=False, name='fc')),
    lambda x: norm(mx.sym.FullyConnected(x, num_hidden=3, flatten=False, name='fc'), axis=-1),
    lambda x: norm(mx.sym.SliceChannel(convolution(x), num_outputs=2, name='parts')[1])])
def test_states_of_any_axis_fit(make):
    symbol = make(var('data'))
    values = arrays(symbol)
    data = values.pop('data')
    net = as_graph(symbol, params=values)
    assert_equal_bits(run(net, data), computed(symbol, {**values, 'data': data}))
    without = as_graph(symbol)
    without.initialize()
    without(data)
    assert without.parameter('norm_gamma').shape == values['norm_gamma'].shape


@pytest.mark.parametrize('rows', [[0], [0, 1]])
def test_a_file_of_arrays_without_names_is_refused(tmp_path, rows):
    path = str(tmp_path / 'net.params')
    nd.save(path, [nd.ones(3) for _ in rows])
    with pytest.raises(ValueError, match=f'^{path}: '):
        gq.attach(net_symbol(), params=path)


def test_a_file_of_parameters_is_read(tmp_path):
    path = str(tmp_path / 'net.params')
    nd.save(path, parameters())
    net = gq.attach(net_symbol(), params=path)
    for name, value in parameters().items():
        np.testing.assert_array_equal(net.parameter(name).data().asnumpy(), value.asnumpy(), err_msg=name)


@pytest.mark.parametrize('part', [0.0, 0.001, 0.01, 0.02, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_file_of_parameters_that_was_cut_off_is_refused(tmp_path, part):
    path = tmp_path / 'net.params'
    nd.save(str(path), parameters())
    whole = path.read_bytes()
    path.write_bytes(whole[:int(part * len(whole))])
    with pytest.raises(ValueError, match=f'^{path}: not a file of parameters'):
        gq.attach(net_symbol(), params=str(path))


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / 'net.params'
    path.write_bytes(b'hello' * 100)
    with pytest.raises(ValueError, match=f'^{path}: not a file of parameters'):
        gq.attach(net_symbol(), params=str(path))


@pytest.mark.parametrize('which', ['symbol', 'params'])
def test_a_missing_file_is_a_missing_file(tmp_path, which):
    path = str(tmp_path / 'missing')
    with pytest.raises(FileNotFoundError, match='missing'):
        gq.attach(path) if which == 'symbol' else gq.attach(net_symbol(), params=path)


@pytest.mark.parametrize('key, value', [('__shape__', 'hello'), ('__lr_mult__', 'fast'), ('__wd_mult__', '')])
def test_a_note_that_makes_no_sense_is_named(key, value):
    text = broken(lambda content, nodes: nodes['conv_weight'].update(attrs={key: value}))
    with pytest.raises(ValueError, match=f'conv_weight.*{value}'):
        gq.attach(Graph.read(text))


@pytest.mark.parametrize('inputs, error', [('dta', r"^the graph has no input 'dta'\. Did you mean 'data'\?$"),
                                           (('data', 'data'), 'data'), ((), 'data')])
def test_inputs_that_the_graph_does_not_have_are_refused(inputs, error):
    with pytest.raises(ValueError, match=error):
        gq.attach(net_symbol(), params=parameters(), inputs=inputs)


@pytest.mark.parametrize('attrs', [{}, {'quantizer': 'q'}, {'quantizer': 'q', 'spec': '{}'},
                                   {'quantizer': 'q', 'spec': 'int8'}])
def test_a_quantizer_in_a_file_that_does_not_say_how_it_is_made_is_named(attrs):
    text = broken(lambda content, nodes: nodes['parts'].update(op='gluonquant', name='mine', attrs=attrs))
    text = text.replace('[9, 1, 0]', '[9, 0, 0]')
    with pytest.raises(ValueError, match='mine'):
        gq.attach(Graph.read(text))


BAD_ARGUMENTS = {'a missing Parameter': lambda: {name: value for name, value in parameters().items()
                                                 if name != 'fc_bias'},
                 'a wrong shape': lambda: with_parameter('fc_bias', nd.ones(7))}


@pytest.mark.parametrize('kind', BAD_ARGUMENTS)
def test_a_graph_that_is_refused_is_as_it_was(kind):
    graph = Graph.of(net_symbol())
    before = graph.dump()
    with pytest.raises(ValueError, match='fc_bias'):
        gq.attach(graph, params=BAD_ARGUMENTS[kind]())
    assert graph.dump() == before


def test_a_graph_that_is_attached_to_is_as_it_was():
    graph = Graph.of(net_symbol())
    before = graph.dump()
    gq.attach(graph, params=parameters())
    assert graph.dump() == before


def test_arrays_that_are_passed_are_not_the_parameters():
    values = parameters()
    net = gq.attach(net_symbol(), params=values)
    values['conv_bias'][:] = 100
    assert net.collect_params()['conv_bias'].data().asnumpy().max() < 100


# ---------------------------------------------------------------- files of attached nets


def saved(tmp_path):
    net = gq.attach(net_symbol(), params=parameters())
    x = nd.array(np.random.default_rng(0).normal(size=(2, 3, 6, 6)))
    gq.calibrate(net, [x])
    path = str(tmp_path / 'net.gq')
    gq.save(net, path)
    return net, path, x


@pytest.mark.parametrize('part', [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_checkpoint_that_was_cut_off_is_refused_and_the_net_is_as_it_was(tmp_path, part):
    net, path, x = saved(tmp_path)
    for parameter in net.collect_params().values():
        parameter.set_data(parameter.data() + 1)
    before = {name: parameter.data().asnumpy() for name, parameter in net.collect_params().items()}
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:int(part * len(whole))])
    with pytest.raises(ValueError, match=f'^{path}: not a complete file of gq.save'):
        gq.load(path, net)
    for name, parameter in net.collect_params().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), before[name])


def test_a_net_without_values_leaves_no_file(tmp_path):
    path = tmp_path / 'net.gq'
    with pytest.raises(ValueError, match='has no value yet'):
        gq.save(gq.attach(net_symbol()), str(path))
    assert list(tmp_path.iterdir()) == []


def rewrite_plan(path, change):
    with np.load(path) as archive:
        contents = dict(archive)
    plan = json.loads(str(contents['plan']))
    change(plan)
    contents['plan'] = np.array(json.dumps(plan))
    with open(path, 'wb') as file:
        np.savez(file, **contents)


@pytest.mark.parametrize('kind', ['a cycle', 'no such output', 'an unknown operator', 'too few inputs'])
def test_a_checkpoint_with_a_broken_graph_is_refused_by_name(tmp_path, kind):
    _, path, _ = saved(tmp_path)

    def change(plan):
        content = json.loads(plan['graph'])
        nodes = {node['name']: node for node in content['nodes']}
        number = {node['name']: place for place, node in enumerate(content['nodes'])}
        if kind == 'a cycle':
            nodes['conv']['inputs'][0][0] = number['sum']
        elif kind == 'no such output':
            nodes['parts']['inputs'][0][1] = 5
        elif kind == 'an unknown operator':
            nodes['conv']['op'] = 'Convolutio'
        else:
            nodes['conv']['inputs'].pop()
        plan['graph'] = json.dumps(content)
    rewrite_plan(path, change)
    with pytest.raises(ValueError, match=f"^{path}: node '(conv|parts|norm|sum|.*quantizer)'"):
        gq.load(path)


@pytest.mark.parametrize('key', ['graph', 'inputs', 'parameters', 'form', 'scope', 'decisions'])
def test_a_checkpoint_that_lacks_something_is_refused(tmp_path, key):
    _, path, _ = saved(tmp_path)
    rewrite_plan(path, lambda plan: plan.pop(key))
    with pytest.raises(ValueError, match=f'^{path}'):
        gq.load(path)


@pytest.mark.parametrize('key, value', [('graph', 3), ('graph', 'x'), ('inputs', 3), ('inputs', ['other']),
                                        ('parameters', []), ('decisions', 3), ('decisions', [[1]])])
def test_a_checkpoint_with_something_else_in_a_place_is_refused(tmp_path, key, value):
    _, path, _ = saved(tmp_path)
    rewrite_plan(path, lambda plan: plan.update({key: value}))
    with pytest.raises(ValueError, match=f'^{path}: '):
        gq.load(path)


def test_a_checkpoint_without_a_net_computes_the_same(tmp_path):
    net, path, x = saved(tmp_path)
    loaded = gq.load(path)
    assert isinstance(loaded, GraphNet)
    assert_equal_bits(run(loaded, x), run(net, x))
