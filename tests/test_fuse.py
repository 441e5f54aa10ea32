"""`fuse`: which nodes a quantizer takes in, which it must not, and that the graph computes what it did."""
import copy
import itertools
import json
import pickle
import sys

import mxnet as mx
import numpy as np
import pytest
from gluoncv.model_zoo import get_model
from hypothesis import given
from hypothesis import strategies as st
from mxnet import autograd, gluon, init, nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant import ops
from gluonquant.convert import undo
from gluonquant.fuse import QUANTIZERS, FusedGraph, fused, install, outputs, rewrite, uninstall
from gluonquant.layers import QConv2D, QDense
from gluonquant.symbol_graph import Entry, Graph, ancestors
from tiers import running

cannot_decide_type = pytest.mark.filterwarnings('ignore:Cannot decide type')    # Gluon says so of any input

# ---------------------------------------------------------------- graphs by hand


def var(name):
    return mx.sym.var(name)


def quantizer(x, name='q', **attrs):
    """A quantizer of x with one Parameter: a stand-in, which `graph` turns into the operator's node."""
    attrs = {'method': 'int8', 'inputs': 'data,alpha', **attrs}
    return mx.sym.add_n(x, var(f'{name}_alpha'), name=name, attr={'__quantizer__': json.dumps(attrs)})


STEERED = json.dumps({'method': 'int8', 'inputs': 'data,alpha'})


def graph(*heads):
    content = json.loads(mx.sym.Group(heads).tojson(remove_amp_cast=False))
    for node in content['nodes']:
        attrs = node.get('attrs', {})
        if '__quantizer__' in attrs:
            node['op'], node['attrs'] = '_gluonquant_activation', json.loads(attrs['__quantizer__'])
    return Graph.load(json.dumps(content))


def rewritten(*heads):
    made = graph(*heads)
    rewrite(made)
    return made


def edges(made):
    """{node or 'heads': what it reads}, variables left out; 'q:1' is output 1 of q."""
    return {node.name or 'heads': ' '.join(entry.node.name + (f':{entry.index}' if entry.index else '')
                                           for entry in node.inputs)
            for node in [*made.nodes(), made.heads] if node.op != 'null'}


def attrs_of(made, name='q'):
    return next(node.attrs for node in made.nodes() if node.name == name)


RELUS = {'Activation': lambda x, name='relu': mx.sym.Activation(x, act_type='relu', name=name),
         'relu': lambda x, name='relu': mx.sym.relu(x, name=name)}
relu = RELUS['Activation']


def other(x, name='other'):
    """Some reader that is no quantizer."""
    return mx.sym.negative(x, name=name)


# ---------------------------------------------------------------- max pooling


def pool(x, name='pool', **options):
    return mx.sym.Pooling(x, kernel=(2, 2), stride=(2, 2), name=name, **{'pool_type': 'max', **options})


@pytest.mark.parametrize('kind', sorted(RELUS))
def test_a_relu_moves_behind_a_max_pooling_and_is_taken_there(kind):
    assert edges(rewritten(pool(RELUS[kind](var('x'))))) == {'pool': 'x', 'relu': 'pool', 'heads': 'relu'}
    x = pool(RELUS[kind](var('x')))
    made = rewritten(quantizer(x), other(x))
    assert edges(made) == {'pool': 'x', 'q': 'pool q_alpha', 'other': 'q:2', 'heads': 'q other'}


def test_a_relu_that_others_read_and_another_pooling_or_clamp_stay():
    x = relu(var('x'))
    assert not rewrite(graph(pool(x), other(x)))
    assert not rewrite(graph(pool(relu(var('x')), pool_type='avg')))
    assert not rewrite(graph(pool(mx.sym.clip(var('x'), 0, 6))))


def test_relu_and_max_pooling_commute_to_the_last_bit_with_their_gradients(rng):
    x = pool(relu(var('x')))
    values = rng.normal(size=(2, 3, 6, 8)) - 0.7        # in many windows all are negative
    results = []
    for symbol in (x, fused(x)):
        data = nd.array(values)
        data.attach_grad()
        net = gluon.SymbolBlock(symbol, mx.sym.var('x'))
        net.hybridize()
        with autograd.record():
            y = net(data)
        y.backward(nd.arange(y.size).reshape(y.shape))
        results.append((y.asnumpy(), data.grad.asnumpy()))
    for before, after in zip(*results):
        assert np.array_equal(before, after)


# ---------------------------------------------------------------- clamps


@pytest.mark.parametrize('kind', RELUS)
def test_a_relu_becomes_part_of_the_quantizer_behind_it(kind):
    made = rewritten(quantizer(RELUS[kind](var('x'))))
    assert edges(made) == {'q': 'x q_alpha', 'heads': 'q'}
    assert attrs_of(made) == {'method': 'int8', 'inputs': 'data,alpha', 'low': '0', 'high': 'inf', 'relu': '1'}


def test_a_clip_becomes_part_of_the_quantizer_without_claiming_to_be_a_relu():
    made = rewritten(quantizer(mx.sym.clip(var('x'), 0, 6)))
    assert edges(made) == {'q': 'x q_alpha', 'heads': 'q'}
    assert attrs_of(made) == {'method': 'int8', 'inputs': 'data,alpha', 'low': '0', 'high': '6'}


@pytest.mark.parametrize('low, high', [(-1.5, 2.25), (0.1, 1e30)])
def test_the_bounds_of_a_clip_arrive_exactly(low, high):
    attrs = attrs_of(rewritten(quantizer(mx.sym.clip(var('x'), low, high))))
    assert (float(attrs['low']), float(attrs['high'])) == (low, high)


@pytest.mark.parametrize('act_type', ['sigmoid', 'tanh', 'softrelu', 'softsign'])
def test_other_activations_stay(act_type):
    assert not rewrite(graph(quantizer(mx.sym.Activation(var('x'), act_type=act_type))))


def test_a_relu_without_a_quantizer_stays():
    assert not rewrite(graph(quantizer(other(relu(var('x'))))))


def test_other_readers_of_the_relu_read_what_the_quantizer_keeps():
    x = relu(var('x'))
    made = rewritten(quantizer(x), other(x))
    assert edges(made) == {'q': 'x q_alpha', 'other': 'q:2', 'heads': 'q other'}
    assert attrs_of(made)['keep'] == '1'


def test_a_reader_that_reads_the_relu_twice_reads_the_kept_tensor_twice():
    x = relu(var('x'))
    assert edges(rewritten(quantizer(x), mx.sym.elemwise_mul(x, x, name='square')))['square'] == 'q:2 q:2'


def test_a_relu_that_is_an_output_of_the_graph_stays_an_output_in_its_place():
    x = relu(var('x'))
    assert edges(rewritten(x, quantizer(x), x))['heads'] == 'q:2 q q:2'


def test_of_two_quantizers_on_one_relu_the_second_reads_what_the_first_keeps():
    x = relu(var('x'))
    made = rewritten(quantizer(x, 'q'), quantizer(x, 'p'))
    assert edges(made) == {'q': 'x q_alpha', 'p': 'q:2 p_alpha', 'heads': 'q p'}
    assert 'low' in attrs_of(made, 'q') and 'low' not in attrs_of(made, 'p')


def test_only_the_relu_next_to_the_quantizer_is_taken():
    made = rewritten(quantizer(relu(mx.sym.clip(var('x'), -1, 1, name='clip'))))
    assert edges(made) == {'clip': 'x', 'q': 'clip q_alpha', 'heads': 'q'} and attrs_of(made)['relu'] == '1'


def test_a_relu_in_front_of_a_parameter_stays():
    x = var('x')
    made = mx.sym.add_n(x, relu(var('alpha')), name='q', attr={'__quantizer__': STEERED})
    assert not rewrite(graph(made))


@pytest.mark.parametrize('kind', ['relu', 'sum'])
def test_what_also_steers_the_quantizer_stays(kind):
    x = relu(var('x')) if kind == 'relu' else total()
    made = mx.sym.add_n(x, other(x), name='q', attr={'__quantizer__': STEERED})
    assert not rewrite(graph(made))


# ---------------------------------------------------------------- sums


SUMS = {'+': lambda a, b: a + b, 'elemwise_add': mx.sym.elemwise_add, '_plus': mx.sym._internal._plus,
        '_add': mx.sym._internal._add, '_Plus': mx.sym._internal._Plus}


def total(a='a', b='b', name='sum'):
    return mx.sym.elemwise_add(*(var(part) if isinstance(part, str) else part for part in (a, b)), name=name)


@pytest.mark.parametrize('spelling', SUMS)
def test_a_sum_becomes_part_of_the_quantizer_behind_it(spelling):
    made = rewritten(quantizer(SUMS[spelling](var('a'), var('b'))))
    assert edges(made) == {'q': 'a q_alpha b', 'heads': 'q'}
    assert attrs_of(made) == {'method': 'int8', 'inputs': 'data,alpha,other', 'add': '1'}


def test_a_sum_and_the_relu_behind_it_become_part_of_the_quantizer():
    made = rewritten(quantizer(relu(total())))
    assert edges(made) == {'q': 'a q_alpha b', 'heads': 'q'}
    assert attrs_of(made) == {'method': 'int8', 'inputs': 'data,alpha,other', 'add': '1', 'low': '0', 'high': 'inf',
                              'relu': '1'}


def test_other_readers_of_the_sum_read_what_the_quantizer_keeps():
    x = total()
    made = rewritten(quantizer(x), other(x), x)
    assert edges(made) == {'q': 'a q_alpha b', 'other': 'q:1', 'heads': 'q other q:1'}


def test_other_readers_of_the_relu_read_the_clamped_sum():
    x = relu(total())
    made = rewritten(quantizer(x), other(x))
    assert edges(made) == {'q': 'a q_alpha b', 'other': 'q:2', 'heads': 'q other'}


def test_a_sum_that_is_read_besides_the_relu_stays():
    x = total()
    made = rewritten(quantizer(relu(x)), other(x))
    assert edges(made) == {'sum': 'a b', 'q': 'sum q_alpha', 'other': 'sum', 'heads': 'q other'}
    assert attrs_of(made)['low'] == '0' and 'add' not in attrs_of(made)


def test_a_sum_behind_a_relu_that_is_an_output_stays():
    x = total()
    assert edges(rewritten(x, quantizer(relu(x)))) == {'sum': 'a b', 'q': 'sum q_alpha', 'heads': 'sum q'}


def test_the_sum_of_a_tensor_with_itself_stays():
    a = other(var('a'))
    assert not rewrite(graph(quantizer(total(a, a))))


def test_the_sum_of_two_outputs_of_one_node_is_taken():
    halves = mx.sym.split(var('a'), 2, name='halves')
    assert edges(rewritten(quantizer(total(halves[0], halves[1]))))['q'] == 'halves q_alpha halves:1'


@pytest.mark.parametrize('sum_of', [mx.sym.broadcast_add, mx.sym.add_n, mx.sym.elemwise_sub])
def test_other_sums_stay(sum_of):
    assert not rewrite(graph(quantizer(sum_of(var('a'), var('b')))))


def test_only_the_last_sum_of_a_chain_is_taken():
    made = rewritten(quantizer(total(total('a', 'b', 'inner'), 'c')))
    assert edges(made) == {'inner': 'a b', 'q': 'inner q_alpha c', 'heads': 'q'}


def test_a_chain_of_residual_blocks_keeps_one_sum_per_quantizer():
    x = total('a', 'b', 'first')
    y = total(x, other(quantizer(x, 'q1'), 'conv'), 'second')
    made = rewritten(quantizer(y, 'q2'))
    assert edges(made) == {'q1': 'a q1_alpha b', 'conv': 'q1', 'q2': 'q1:1 q2_alpha conv', 'heads': 'q2'}


def test_quantizers_of_a_sum_and_of_its_relu_share_the_work():
    x = total()
    made = rewritten(quantizer(relu(x), 'q'), quantizer(x, 'p'))
    assert edges(made) == {'p': 'a p_alpha b', 'q': 'p:1 q_alpha', 'heads': 'q p'}


# ---------------------------------------------------------------- attributes


@pytest.mark.parametrize('method, kept', [('int8', 2), ('lsq', 1), ('pact', 2)])
def test_what_is_kept_is_the_last_output_of_any_method(method, kept):
    x = relu(var('x'))
    assert edges(rewritten(quantizer(x, method=method), other(x)))['other'] == f'q:{kept}'


def test_other_attributes_of_the_quantizer_stay():
    made = rewritten(quantizer(relu(var('x')), qmax='15', gate='1'))
    assert {'qmax': '15', 'gate': '1', 'method': 'int8'}.items() <= attrs_of(made).items()


@pytest.mark.parametrize('attrs', [{'add': '1'}, {'low': '0'}, {'high': '6'}, {'keep': '1'}])
def test_a_quantizer_that_has_taken_something_takes_no_more(attrs):
    assert not rewrite(graph(quantizer(relu(total()), **attrs)))


def guard(x, name='guard'):
    """The identity that the portable tier puts in front of a tensor."""
    return mx.sym.identity(x, name=name)


def test_what_stands_in_front_of_an_identity_is_taken_and_the_identity_stays():
    made = rewritten(quantizer(guard(relu(var('x')))))
    assert edges(made) == {'guard': 'x', 'q': 'guard q_alpha', 'heads': 'q'} and attrs_of(made)['relu'] == '1'


def test_each_part_of_a_sum_gets_an_identity():
    made = rewritten(quantizer(guard(relu(total()))))
    assert edges(made) == {'guard': 'a', 'guard_other': 'b', 'q': 'guard q_alpha guard_other', 'heads': 'q'}


def test_other_readers_of_what_an_identity_read_get_what_is_kept():
    x = relu(var('x'))
    made = rewritten(quantizer(guard(x), 'q'), quantizer(guard(x, 'second'), 'p'))
    assert edges(made) == {'guard': 'x', 'q': 'guard q_alpha', 'second': 'q:2', 'p': 'second p_alpha', 'heads': 'q p'}


def test_an_identity_that_others_read_hides_the_relu():
    x = guard(relu(var('x')))
    assert not rewrite(graph(quantizer(x), other(x)))


def test_an_identity_in_front_of_nothing_to_take_stays():
    made = graph(quantizer(guard(var('x'))))
    before = made.dump()
    assert not rewrite(made) and made.dump() == before


@pytest.mark.parametrize('name', sorted(QUANTIZERS))
def test_both_tiers_of_quantizers_are_fused(name):
    made = graph(quantizer(relu(var('x'))))
    made.nodes()[-1].op = name
    assert rewrite(made)


# ---------------------------------------------------------------- any graph


OPS = {'negative': np.negative, '_copy': np.copy, 'Activation': lambda a: np.maximum(a, 0), 'elemwise_add': np.add}


def run(made, feed):
    """The graph's outputs in NumPy; a quantizer follows its attributes, and its planes are no tensor to read."""
    values = {}
    for node in made.nodes():
        x = [values[entry.node, entry.index] for entry in node.inputs]
        if node.op == 'null':
            results = [feed(node.name)]
        elif node.op == 'clip':
            results = [np.clip(x[0], float(node.attrs['a_min']), float(node.attrs['a_max']))]
        elif node.op == '_gluonquant_activation':
            named = dict(zip(node.attrs['inputs'].split(','), x))
            data = named['data'] + named.get('other', 0)
            data = np.clip(data, float(node.attrs.get('low', '-inf')), float(node.attrs.get('high', 'inf')))
            results = [np.rint(data * 4 + named['alpha'])]
            results += ['planes'] * (outputs({**node.attrs, 'keep': '0'}) - 1) + [data] * ('keep' in node.attrs)
        else:
            results = [OPS[node.op](*x)]
        values.update({(node, index): result for index, result in enumerate(results)})
    return [values[entry.node, entry.index] for entry in made.heads.inputs]


@st.composite
def graphs(draw):
    """A few tensors and many of what is fused, wired at random."""
    made = [var('x'), var('y')]
    for step in range(draw(st.integers(2, 12))):
        kind = draw(st.sampled_from(['quantizer', 'quantizer', 'relu', 'clip', 'sum', 'sum', 'guard', 'other']))
        x, y, name = draw(st.sampled_from(made)), draw(st.sampled_from(made)), f'{kind}{step}'
        if kind == 'quantizer':
            made.append(quantizer(x, name, method=draw(st.sampled_from(['int8', 'lsq', 'pact']))))
        elif kind == 'clip':
            made.append(mx.sym.clip(x, -0.5, 0.75, name=name))
        elif kind == 'sum':
            made.append(total(x, y, name))
        else:
            made.append({'relu': relu, 'guard': guard, 'other': other}[kind](x, name))
    return graph(*draw(st.lists(st.sampled_from(made), min_size=1, max_size=4)), made[-1])


def values_of(name):
    return np.random.default_rng(len(name) + ord(name[-1])).uniform(-1, 1, 8)


@given(graphs())
def test_a_fused_graph_computes_what_it_did(made):
    expected = run(made, values_of)
    rewrite(made)
    np.testing.assert_array_equal(run(made, values_of), expected)


@given(graphs())
def test_fusing_twice_is_fusing_once(made):
    rewrite(made)
    before = made.dump()
    assert not rewrite(made) and made.dump() == before


@given(graphs())
def test_a_fused_graph_is_written_in_topological_order_with_its_variables(made):
    variables = {node.name for node in made.nodes() if node.op == 'null'}
    rewrite(made)
    content = json.loads(made.dump())
    assert all(number < place for place, node in enumerate(content['nodes']) for number, _, _ in node['inputs'])
    assert {content['nodes'][number]['name'] for number in content['arg_nodes']} == variables


# ---------------------------------------------------------------- graphs as Python sees them


def test_a_graph_that_nobody_rewires_is_written_as_it_was():
    block = nn.HybridSequential(prefix='net_')
    with block.name_scope():
        block.add(nn.Conv2D(3, 1), nn.BatchNorm())
    halves = mx.sym.split(block(var('x')), 2)
    body = mx.sym.contrib.foreach(lambda x, state: (x + state, x), halves[1], var('state'))[0]
    symbol = mx.sym.Group([mx.sym.amp_cast(halves[0], dtype='float16'), body, halves[1]])
    text = symbol.tojson(remove_amp_cast=False)
    assert mx.sym.load_json(Graph.load(text).dump()).tojson(remove_amp_cast=False) == text


def test_names_and_attributes_in_any_script_survive():
    note = 'a "quoted" \\ line\nand é, 量'
    symbol = mx.sym.load_json(Graph.load(mx.sym.relu(mx.sym.var('é', attr={'__note__': note})).tojson()).dump())
    assert symbol.attr_dict()['é']['__note__'] == note


def test_ancestors_come_behind_what_they_read_and_once():
    x = var('x')
    made = graph(total(relu(x), quantizer(x)))
    assert [node.name for node in ancestors(made.heads.inputs)] == ['x', 'relu', 'q_alpha', 'q', 'sum']


def test_a_deep_graph_needs_no_deep_stack():
    x = var('x')
    for _ in range(5000):
        x = -x
    made = rewritten(quantizer(relu(x)))
    assert len(made.nodes()) == 5003


def test_a_node_that_nothing_reads_any_more_leaves_with_all_it_alone_read():
    made = graph(other(relu(var('x'), 'a'), 'b'))
    a, b = (next(node for node in made.nodes() if node.name == name) for name in 'ab')
    x = a.inputs[0].node
    made.connect(made.heads, [Entry(x)])
    assert made.readers(x) == [made.heads] and not a.inputs and not b.inputs


# ---------------------------------------------------------------- symbols


def pooling(**kwargs):
    kwargs = {'global_pool': True, 'pool_type': 'avg', 'kernel': (1, 1), **kwargs}
    return mx.sym.Pooling(var('x'), name='pool', **kwargs)


def op_of(symbol, name='pool'):
    return next(node['op'] for node in json.loads(symbol.tojson())['nodes'] if node['name'] == name)


@pytest.mark.parametrize('kwargs', [{}, {'pooling_convention': 'full'}, {'layout': 'NCHW'}, {'kernel': (7, 7)},
                                    {'pad': (1, 1), 'stride': (2, 2)}])
def test_a_global_average_pooling_becomes_a_mean(kwargs):
    symbol = pooling(**kwargs)
    x = np.random.default_rng(3).normal(size=(2, 3, 5, 6))
    assert op_of(fused(symbol)) == 'mean' and fused(symbol).list_outputs() == ['pool_output']
    for made in (symbol, fused(symbol)):
        out = made.eval(x=nd.array(x))[0].asnumpy()
        np.testing.assert_allclose(out, x.mean((2, 3), keepdims=True), rtol=0, atol=1e-6)   # float32, 30 terms


@pytest.mark.parametrize('kwargs', [{'pool_type': 'max'}, {'global_pool': False}, {'kernel': (1,)},
                                    {'kernel': (1, 1, 1)}, {'layout': 'NHWC'}, {'kernel': ()}])
def test_other_poolings_stay(kwargs):
    symbol = pooling(**kwargs)
    assert fused(symbol) is symbol


def test_notes_on_a_pooling_stay():
    with mx.AttrScope(__note__='mine'):
        symbol = pooling()
    assert fused(symbol).attr_dict()['pool'] == {'__note__': 'mine', 'axis': '(2, 3)', 'keepdims': 'True'}


def test_a_symbol_with_nothing_to_fuse_comes_back_itself():
    symbol = relu(total())
    assert fused(symbol) is symbol


def test_a_symbol_of_mxnet_numpy_comes_back_itself():
    symbol = pooling().as_np_ndarray()
    assert fused(symbol) is symbol


def test_casts_of_mixed_precision_stay():
    symbol = relu(mx.sym.amp_cast(pooling(), dtype='float16', name='cast'))
    assert 'cast_output' in fused(symbol).get_internals().list_outputs()


NETS = {'cifar_resnet20_v1': 32, 'resnet18_v1b': 64, 'mobilenetv2_1.0': 64}


def zoo(name):
    net = get_model(name, classes=10)
    net.initialize(init.Xavier())
    x = nd.array(np.random.default_rng(2).normal(size=(2, 3, NETS[name], NETS[name])))
    net(x)
    return net, x


@pytest.fixture(scope='module', params=NETS)
def zoo_net(request):
    return zoo(request.param)


def as_block(symbol, net):
    return gluon.SymbolBlock(symbol, var('data'), params=net.collect_params())


@cannot_decide_type
def test_a_float_net_computes_the_same(zoo_net):
    net, x = zoo_net
    symbol, results = net(var('data')), []
    weight = next(iter(net.collect_params('.*weight$').values()))
    for made in (symbol, fused(symbol)):
        block = as_block(made, net)
        with autograd.record():     # in training mode: oneDNN's max pooling has no gradient to give in the other
            out = block(x)
        out.backward()
        results.append((out.asnumpy(), weight.grad().asnumpy()))
    assert fused(symbol) is not symbol
    for before, after in zip(*results):
        # The mean adds up in another order; what float32 loses there, the backward pass adds up again.
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_names_attributes_and_states_of_a_net_stay(zoo_net):
    symbol = zoo_net[0](var('data'))
    made = fused(symbol)
    for ask in ('list_arguments', 'list_auxiliary_states', 'list_outputs'):
        assert getattr(made, ask)() == getattr(symbol, ask)()
    # A ReLU and a max pooling may have changed places.
    assert sorted(made.get_internals().list_outputs()) == sorted(symbol.get_internals().list_outputs())
    before, after = symbol.attr_dict(), made.attr_dict()
    assert [name for name in before if after[name] != before[name] and op_of(symbol, name) != 'Pooling'] == []


def test_a_fused_symbol_comes_back_itself(zoo_net):
    made = fused(zoo_net[0](var('data')))
    assert fused(made) is made


# ---------------------------------------------------------------- the compiled operators


@pytest.fixture(params=['portable', 'layout'])
def tier(request):
    """Runs on the operators of this tier."""
    with running(request.param) as name:
        yield name


@pytest.mark.native
@pytest.mark.parametrize('merged', [{}, {'low': '0'}, {'high': '6'}, {'keep': '1'}, {'low': '0', 'keep': '1'},
                                    {'low': '0', 'keep': '1', 'add': '1', 'inputs': 'data,mode,mode,other'}])
@pytest.mark.parametrize('method', ['int8', 'affine', 'pact', 'dorefa', 'cliprelu', 'lsq', 'lsqplus', 'qil', 'gdrq'])
def test_outputs_are_counted_as_the_operator_counts_them(tier, method, merged):
    for gate, signed in itertools.product('01', '01'):
        attrs = {'method': method, 'inputs': 'data,mode,mode,mode', 'gate': gate, 'signed': signed, **merged}
        inputs = [var(f'input{place}') for place in range(4)]
        node = getattr(mx.sym._internal, ops.name('activation'))(*inputs, **attrs)
        assert outputs(attrs) == len(node.list_outputs())


class Residual(nn.HybridBlock):
    """A residual block whose shortcut is the ReLU in front of it, as an output too; a clipped layer; a pooling."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.first, self.second, self.third = (nn.Conv2D(6, 3, padding=1) for _ in range(3))
            self.fourth, self.pool, self.output = nn.Conv2D(8, 3), nn.GlobalAvgPool2D(), nn.Dense(3)

    def hybrid_forward(self, F, x):
        x = F.relu(self.first(x))
        y = F.relu(self.second(x) + x)
        z = F.clip(self.third(y), 0, 6) + y
        return self.output(self.pool(self.fourth(z))), x


def trained(net):
    """Outputs, gradients and states of two steps."""
    net.hybridize()
    found = []
    for seed in (1, 2):
        x = nd.array(np.random.default_rng(seed).uniform(-1, 1, (2, 3, 8, 8)))
        x.attach_grad()
        with autograd.record():
            out, side = net(x)
            loss = (out ** 2).sum() + (side ** 2).sum()
        loss.backward()
        parameters = net.collect_params().values()
        found += [out, x.grad, *(p.data() if p.grad_req == 'null' else p.grad() for p in parameters)]
    return [array.asnumpy() for array in found]


@pytest.mark.native
@pytest.mark.parametrize('method', ['int8', 'lsq', 'pact', 'qil', 'gdrq', 'fqn', 'dorefa'])
def test_a_fused_net_trains_as_the_unfused_one(seed, tier, method):
    mx.random.seed(seed)
    net = converted(Residual, method=method)
    mx.random.seed(seed)
    other = install(converted(Residual, method=method))
    expected, actual = trained(net), trained(other)
    ops_found = [node['op'] for node in json.loads(other._cached_graph[1].tojson())['nodes']]
    assert not {'Activation', 'relu'} & set(ops_found) and 'mean' in ops_found
    for before, after in zip(expected, actual):
        # Convolutions and sums of gradients may add up in another order.
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * max(np.abs(before).max(), 1e-3))


# ---------------------------------------------------------------- hybridized nets


class Net(nn.HybridBlock):
    """At the top level of a module, so that pickle finds it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.conv, self.pool, self.output = nn.Conv2D(4, 3), nn.GlobalAvgPool2D(prefix='pool_'), nn.Dense(3)

    def hybrid_forward(self, F, x):
        return self.output(self.pool(F.relu(self.conv(x))))


class Around:
    class Net(Net):
        """Inner."""


class Outer(gluon.Block):
    """Two parts, one without quantized layers, that are hybridized each for itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        with self.name_scope():
            self.first, self.net = nn.GlobalMaxPool2D(), Net(prefix='net_')

    def forward(self, x):
        return self.net(x) + self.first(x).sum()


def images():
    return nd.array(np.random.default_rng(4).uniform(-1, 1, (2, 3, 8, 8)))


def converted(kind=Net, **options):
    """A calibrated net whose graphs are not fused yet."""
    net = kind(prefix='net_')
    net.initialize(init.Xavier())
    net(images())
    gq.calibrate(gq.convert(net, **options), [images()])
    return uninstall(net)


def traced_op(block, name='pool_fwd'):
    return next(node['op'] for node in json.loads(block._cached_graph[1].tojson())['nodes']
                if node['name'].endswith(name))


@pytest.fixture
def net(seed):
    return converted()


def test_the_graph_of_an_installed_net_is_fused(net):
    plain = net(images()).asnumpy()
    install(net).hybridize()
    np.testing.assert_allclose(net(images()).asnumpy(), plain, rtol=0, atol=1e-6)   # one mean of 36 float32 values
    assert traced_op(net) == 'mean'


def test_converting_installs_and_undoing_it_uninstalls():
    net = Net()
    assert isinstance(gq.convert(net), FusedGraph)
    undo(net)
    assert type(net) is Net


def test_the_class_of_an_installed_net_is_hard_to_tell_from_its_own(net):
    net.__class__ = Around.Net
    before = repr(net)
    cls = type(install(net))
    assert cls is not Around.Net and isinstance(net, Around.Net) and repr(net) == before
    assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == ('Net', 'Around.Net', __name__, 'Inner.')


def test_a_graph_is_fused_once_however_often_it_is_asked_for(net, monkeypatch):
    calls = []
    monkeypatch.setattr(sys.modules[FusedGraph.__module__], 'fused', lambda symbol: calls.append(1) or symbol)
    install(net)._get_graph(images())
    assert net._get_graph(images()) is net._get_graph(images()) and calls == [1]


def test_two_nets_of_one_class_stay_of_one_class(net):
    assert type(install(net)) is type(install(converted()))


def test_installing_twice_is_installing_once(net):
    assert type(install(net)) is type(install(install(net)))


def test_uninstalling_gives_the_class_back(net):
    install(net).hybridize()
    net(images())
    assert type(uninstall(net)) is Net
    net(images())
    assert traced_op(net) == 'Pooling'


def test_uninstalling_what_was_not_installed_changes_nothing(net):
    assert type(uninstall(net)) is Net


def test_uninstalling_works_when_the_layers_are_float_again(net):
    install(net)
    for layer in (net.conv, net.output):
        layer.to_float()
    assert type(uninstall(net)) is Net


def test_a_graph_that_was_traced_before_installing_is_traced_anew(net):
    net.hybridize()
    net(images())
    install(net)(images())
    assert traced_op(net) == 'mean'


def test_only_the_topmost_hybrid_blocks_with_quantized_layers_change(seed):
    outer = install(converted(Outer))
    assert type(outer) is Outer and isinstance(outer.net, FusedGraph)
    assert type(outer.first) is nn.GlobalMaxPool2D
    assert type(outer.net.pool) is nn.GlobalAvgPool2D and type(outer.net.conv) is QConv2D
    outer.hybridize()
    outer(images())
    assert traced_op(outer.net) == 'mean'


def test_uninstalling_reaches_the_topmost_hybrid_blocks(seed):
    assert type(uninstall(install(converted(Outer))).net) is Net


def test_a_quantized_layer_as_the_whole_net_stays_as_it_is(seed):
    assert type(install(gq.convert(nn.Dense(3), method='int8'))) is QDense


@cannot_decide_type
def test_float_nets_and_symbol_blocks_stay_as_they_are():
    net = Net()
    block = gluon.SymbolBlock(net(var('data')), var('data'), params=net.collect_params())
    assert type(install(net)) is Net and type(install(block)) is gluon.SymbolBlock


@pytest.mark.filterwarnings('ignore:.*not calibrated')
def test_shapes_are_inferred_through_the_fused_graph(seed):
    net = Net()
    gq.convert(net, method='int8').initialize()
    net.hybridize()
    assert net(images()).shape == (2, 3) and net.conv.weight.shape == (4, 3, 3, 3) and traced_op(net) == 'mean'


COPIES = {'deepcopy': copy.deepcopy, 'copy': copy.copy,
          **{f'pickle {n}': lambda x, n=n: pickle.loads(pickle.dumps(x, n)) for n in range(6)}}


@pytest.mark.parametrize('way', COPIES)
def test_copies_of_an_installed_net_are_installed_and_compute_the_same(net, way):
    other = COPIES[way](install(net))
    assert type(other) is type(net) and other is not net
    other.hybridize()
    net.hybridize()
    np.testing.assert_array_equal(other(images()).asnumpy(), net(images()).asnumpy())
    assert traced_op(other) == 'mean'


class Reduces(Net):
    """Says itself how it is made."""

    def __reduce__(self):
        return type(self), ()


def test_a_class_that_says_how_it_is_copied_is_asked(seed):
    net = install(converted(Reduces))
    assert type(copy.deepcopy(net)) is type(pickle.loads(pickle.dumps(net))) is type(net)


def test_a_net_installed_in_another_net_still_computes(net):
    expected = net(images()).asnumpy()
    outer = nn.HybridSequential()
    outer.add(install(net))
    outer.hybridize()
    np.testing.assert_array_equal(outer(images()).asnumpy(), expected)


@cannot_decide_type
def test_an_exported_net_is_the_fused_one_and_computes_the_same(net, tmp_path):
    install(net).hybridize()
    expected = net(images()).asnumpy()
    net.export(str(tmp_path / 'net'))
    block = gluon.SymbolBlock.imports(str(tmp_path / 'net-symbol.json'), ['data'], str(tmp_path / 'net-0000.params'))
    np.testing.assert_array_equal(block(images()).asnumpy(), expected)
    assert traced_op(block) == 'mean' and fused(block._cached_graph[1]) is block._cached_graph[1]


def test_a_float_net_is_fused_on_request_and_converts_attaches_and_saves_as_before(tmp_path):
    plain = get_model('cifar_resnet20_v1', classes=10)
    plain.initialize(init.Xavier())
    data = nd.random.normal(shape=(2, 3, 32, 32))
    expected = plain(data)
    plain.save_parameters(str(tmp_path / 'plain.params'))
    made = get_model('cifar_resnet20_v1', classes=10)
    made.load_parameters(str(tmp_path / 'plain.params'))
    assert gq.fuse(made) is made
    made.hybridize()
    np.testing.assert_allclose(made(data).asnumpy(), expected.asnumpy(), rtol=1e-5, atol=1e-6)
    assert 'mean' in {node.op for node in Graph.of(made._cached_graph[1]).nodes()}
    made.hybridize(False)
    attached = gq.attach(made, 8)
    assert 'Pooling' in {node.op for node in attached.graph.nodes()}
    gq.convert(made, 8)
    assert len(gq.summary(made).rows) == len(gq.summary(gq.convert(plain, 8)).rows)


def test_only_a_block_is_fused():
    with pytest.raises(TypeError, match='net is a str'):
        gq.fuse('net')
