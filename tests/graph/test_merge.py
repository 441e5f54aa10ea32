"""`merge`: BatchNorm in graphs, without any net: Symbols and dicts of arrays."""
import json

import mxnet as mx
import numpy as np
import pytest
from mxnet import nd

from gluonquant.graph import Graph
from gluonquant.graph.fold import merge
from gluonquant.symbol_graph import QUANTIZE, Entry
from reference import batchnorm as reference

data = mx.sym.var('data')


def convolution(x=data, name='conv', **attrs):
    return mx.sym.Convolution(x, name=name, **{'num_filter': 4, 'kernel': (3, 3), 'no_bias': True, **attrs})


def batchnorm(x, name='bn', **attrs):
    return mx.sym.BatchNorm(x, name=name, **{'fix_gamma': False, 'eps': 1e-3, **attrs})


def values(symbol, seed=0, shape=(2, 3, 8, 8)):
    """{name: NumPy array} for all Parameters of a symbol: random, variances positive."""
    rng = np.random.default_rng(seed)
    arguments, _, auxiliary = symbol.infer_shape(data=shape)
    names = [*symbol.list_arguments(), *symbol.list_auxiliary_states()]
    shapes = dict(zip(names, [*arguments, *auxiliary]))
    return {name: (rng.uniform(0.5, 2, size) if name.endswith('var') else rng.normal(0, 0.5, size)).astype('float32')
            for name, size in shapes.items() if name != 'data'}


def run(symbol, arrays, shape=(2, 3, 8, 8)):
    x = nd.array(np.random.default_rng(9).uniform(-1, 1, shape))
    arrays = {name: array if isinstance(array, nd.NDArray) else nd.array(array) for name, array in arrays.items()}
    states = symbol.list_auxiliary_states()
    executor = symbol.bind(mx.cpu(), {'data': x, **{name: arrays[name] for name in symbol.list_arguments()
                                                    if name != 'data'}},
                           aux_states={name: arrays[name] for name in states})
    return [out.asnumpy() for out in executor.forward(is_train=False)]


def merged(symbol, arrays):
    """(Symbol, arrays, sentences) after merging."""
    graph = Graph.of(symbol)
    changed, told = merge(graph, arrays)
    return graph.symbol(), {**arrays, **changed}, told


def assert_near(actual, expected, tolerance=1e-5):
    # float32 sums in another form; differences count in units of the largest value
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def assert_merged(symbol, shape=(2, 3, 8, 8)):
    arrays = values(symbol, shape=shape)
    result, new, told = merged(symbol, arrays)
    assert all(sentence.startswith('merged') for sentence in told.values())
    assert 'BatchNorm' not in result.tojson()
    assert_near(run(result, new, shape), run(symbol, arrays, shape))


def operators(graph):
    return [node.op for node in graph.nodes() if node.op != 'null']


# ---------------------------------------------------------------- with arrays

@pytest.mark.parametrize('bias', [True, False])
def test_a_convolution_is_merged(bias):
    assert_merged(batchnorm(convolution(no_bias=not bias)))


@pytest.mark.parametrize('bias', [True, False])
def test_a_transposed_convolution_is_merged(bias):
    layer = mx.sym.Deconvolution(data, name='up', num_filter=4, kernel=(2, 2), stride=(2, 2), no_bias=not bias)
    assert_merged(batchnorm(layer))


@pytest.mark.parametrize('bias', [True, False])
def test_a_fully_connected_layer_is_merged(bias):
    assert_merged(batchnorm(mx.sym.FullyConnected(data, name='fc', num_hidden=5, no_bias=not bias)))


@pytest.mark.parametrize('kernel, shape', [((3,), (2, 3, 9)), ((2, 2, 2), (2, 3, 4, 4, 4))])
def test_convolutions_of_other_dimensions_are_merged(kernel, shape):
    assert_merged(batchnorm(convolution(kernel=kernel)), shape)


def test_a_grouped_convolution_is_merged():
    assert_merged(batchnorm(convolution(convolution(kernel=(1, 1)), 'grouped', num_group=2)))


def test_a_kernel_written_by_python_2_is_merged():
    text = batchnorm(convolution()).tojson().replace('(3, 3)', '(3L, 3L)')
    assert '3L' in text
    assert_merged(mx.sym.load_json(text))


def test_fix_gamma_is_the_operators_default():
    symbol = mx.sym.BatchNorm(convolution(), name='bn')
    arrays = values(symbol)
    result, new, _ = merged(symbol, dict(arrays))
    assert_near(run(result, new), run(symbol, arrays))


def test_several_layers_are_merged():
    first = mx.sym.relu(batchnorm(convolution(), 'first'))
    assert_merged(batchnorm(mx.sym.FullyConnected(first, name='fc', num_hidden=5), 'second'))


def test_arrays_of_mxnet_and_of_numpy_do_alike():
    symbol = batchnorm(convolution(no_bias=False))
    arrays = values(symbol)
    first, second = (merge(Graph.of(symbol), given)[0] for given in
                     (arrays, {name: nd.array(array) for name, array in arrays.items()}))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_merged_arrays_are_those_of_the_reference_rounded_once():
    symbol = batchnorm(convolution(no_bias=False))
    arrays = values(symbol)
    weight, bias = reference.merged(reference.Convolution((1, 1), (0, 0)), arrays['conv_weight'], arrays['conv_bias'],
                                    arrays['bn_gamma'], arrays['bn_beta'], arrays['bn_moving_mean'],
                                    arrays['bn_moving_var'], 1e-3)
    changed, _ = merge(Graph.of(symbol), arrays)
    np.testing.assert_array_equal(changed['conv_weight'], weight.astype('float32'))
    np.testing.assert_array_equal(changed['conv_bias'], bias.astype('float32'))


def test_arrays_that_change_are_returned_and_given_ones_stay():
    symbol = batchnorm(convolution(no_bias=False))
    arrays = values(symbol)
    before = {name: array.copy() for name, array in arrays.items()}
    changed, _ = merge(Graph.of(symbol), arrays)
    assert sorted(changed) == ['conv_bias', 'conv_weight']
    for name, array in before.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_layer_without_bias_gets_one_beside_its_weight():
    changed, _ = merge(Graph.of(batchnorm(convolution())), values(batchnorm(convolution())))
    assert changed['conv_bias'].shape == (4,)


def test_a_bias_is_named_after_the_layer_if_the_weight_has_a_name_of_its_own():
    symbol = batchnorm(convolution(weight=mx.sym.var('kernels')))
    changed, _ = merge(Graph.of(symbol), values(symbol))
    assert sorted(changed) == ['conv_bias', 'kernels']


def test_a_name_that_is_taken_is_not_taken_again():
    """Something else is called conv_bias."""
    other = mx.sym.var('conv_bias', shape=(1,))
    symbol = mx.sym.broadcast_add(batchnorm(convolution()), other)
    arrays = values(symbol)
    result, new, _ = merged(symbol, arrays)
    np.testing.assert_array_equal(new['conv_bias'], arrays['conv_bias'])
    assert_near(run(result, new), run(symbol, arrays))


def test_a_bias_that_another_layer_reads_stays():
    bias = mx.sym.var('shared')
    symbol = mx.sym.Group([batchnorm(convolution(no_bias=False, bias=bias)),
                           convolution(name='other', no_bias=False, bias=bias)])
    arrays = values(symbol)
    result, new, _ = merged(symbol, arrays)
    np.testing.assert_array_equal(new['shared'], arrays['shared'])
    assert_near(run(result, new), run(symbol, arrays))


def test_one_bias_of_two_merged_layers_becomes_two():
    bias = mx.sym.var('shared')
    symbol = mx.sym.Group([batchnorm(convolution(name=name, no_bias=False, bias=bias), f'{name}_bn')
                           for name in ('one', 'two')])
    assert_merged(symbol)


def test_what_cannot_be_merged_stays_and_is_told():
    layer = convolution()
    symbol = mx.sym.Group([batchnorm(layer), mx.sym.relu(layer, name='act')])
    arrays = values(symbol)
    result, new, told = merged(symbol, arrays)
    assert told == {'bn': "stays: 'act' reads 'conv' too"}
    np.testing.assert_array_equal(run(result, new)[0], run(symbol, arrays)[0])


def test_every_batchnorm_is_told_of():
    symbol = batchnorm(mx.sym.relu(batchnorm(convolution(), 'first')), 'second')
    told = merged(symbol, values(symbol))[2]
    assert told['first'] == "merged into 'conv'" and told['second'].startswith('stays: it reads ')


def test_a_graph_without_batchnorm_stays():
    symbol = mx.sym.relu(convolution())
    assert merge(Graph.of(symbol), values(symbol)) == ({}, {})


def test_parameters_of_the_batchnorm_leave_the_graph():
    symbol = batchnorm(convolution())
    result, _, _ = merged(symbol, values(symbol))
    assert result.list_arguments() == ['data', 'conv_weight', 'conv_bias'] and not result.list_auxiliary_states()


def test_the_merged_layer_keeps_its_name_and_attributes():
    symbol = batchnorm(convolution(stride=(2, 2), pad=(1, 1)))
    result, _, _ = merged(symbol, values(symbol))
    node = next(node for node in json.loads(result.tojson())['nodes'] if node['op'] == 'Convolution')
    assert node['name'] == 'conv' and {**node['attrs'], 'no_bias': None} == {
        'kernel': '(3, 3)', 'num_filter': '4', 'stride': '(2, 2)', 'pad': '(1, 1)', 'no_bias': None}


def test_merged_files_are_read_by_mxnet(tmp_path):
    symbol = batchnorm(convolution())
    arrays = values(symbol)
    result, new, _ = merged(symbol, arrays)
    result.save(str(tmp_path / 'net-symbol.json'))
    nd.save(str(tmp_path / 'net-0000.params'), {f'arg:{name}': nd.array(new[name]) for name in
                                                result.list_arguments() if name != 'data'})
    again = mx.gluon.SymbolBlock.imports(str(tmp_path / 'net-symbol.json'), ['data'],
                                         str(tmp_path / 'net-0000.params'))
    x = nd.array(np.random.default_rng(9).uniform(-1, 1, (2, 3, 8, 8)))
    assert_near([again(x).asnumpy()], run(symbol, arrays))


def test_float64_arrays_stay_float64():
    symbol = batchnorm(convolution())
    arrays = {name: array.astype('float64') for name, array in values(symbol).items()}
    changed, _ = merge(Graph.of(symbol), arrays)
    assert {array.dtype for array in changed.values()} == {np.dtype('float64')}


# ---------------------------------------------------------------- quantized weights

def with_quantizer(symbol, name='conv'):
    """The graph with a quantizer in front of the weight of a layer."""
    graph = Graph.of(symbol)
    layer = next(node for node in graph.nodes() if node.name == name)
    quantizer = graph.add(QUANTIZE, 'quantizer', [layer.inputs[1]], quantizer='q', spec='{}')
    graph.connect(layer, [layer.inputs[0], Entry(quantizer), *layer.inputs[2:]])
    return graph


def test_a_factor_behind_the_quantizer_takes_up_k():
    symbol = batchnorm(convolution())
    graph, arrays = with_quantizer(symbol), values(symbol)
    changed, _ = merge(graph, arrays)
    assert operators(graph) == [QUANTIZE, 'broadcast_mul', 'Convolution']
    assert sorted(changed) == ['conv_bias', 'conv_factor'] and changed['conv_factor'].shape == (4, 1, 1, 1)


def test_a_graph_with_a_factor_computes_the_same_without_its_quantizer():
    symbol = batchnorm(convolution(no_bias=False))
    graph, arrays = with_quantizer(symbol), values(symbol)
    changed, _ = merge(graph, arrays)
    graph.strip()
    assert_near(run(graph.symbol(), {**arrays, **changed}), run(symbol, arrays))


def test_the_factor_of_a_transposed_convolution_lies_along_axis_1():
    symbol = batchnorm(mx.sym.Deconvolution(data, name='conv', num_filter=4, kernel=(2, 2)))
    graph, arrays = with_quantizer(symbol), values(symbol)
    changed, _ = merge(graph, arrays)
    assert changed['conv_factor'].shape == (1, 4, 1, 1)
    graph.strip()
    assert_near(run(graph.symbol(), {**arrays, **changed}), run(symbol, arrays))


def test_a_batchnorm_that_is_folded_already_goes_in_front_of_the_quantizer():
    symbol = batchnorm(convolution())
    graph, arrays = with_quantizer(symbol), values(symbol)
    layer, norm = (next(node for node in graph.nodes() if node.name == name) for name in ('conv', 'bn'))
    graph.fold(layer, norm)
    changed, told = merge(graph, arrays)
    assert operators(graph) == [QUANTIZE, 'Convolution']
    assert sorted(changed) == ['conv_bias', 'conv_weight'] and told == {'bn': "merged into 'conv'"}


# ---------------------------------------------------------------- the graph alone

def test_without_arrays_the_graph_is_merged_and_no_array_returned():
    graph = Graph.of(batchnorm(convolution()))
    assert merge(graph) == ({}, {'bn': "merged into 'conv'"})
    assert operators(graph) == ['Convolution']


def test_the_graph_alone_runs_with_parameters_merged_elsewhere():
    symbol = batchnorm(convolution(name='conv'))
    symbol = batchnorm(mx.sym.FullyConnected(mx.sym.relu(symbol), name='fc', num_hidden=5), 'second')
    arrays = values(symbol)
    _, elsewhere, _ = merged(symbol, arrays)
    graph = Graph.of(symbol)
    merge(graph)
    assert_near(run(graph.symbol(), elsewhere), run(symbol, arrays))


@pytest.mark.parametrize('bias', [True, False])
def test_the_graph_is_the_same_with_and_without_arrays(bias):
    symbol = batchnorm(convolution(no_bias=not bias))
    alone, together = Graph.of(symbol), Graph.of(symbol)
    merge(alone)
    merge(together, values(symbol))
    assert alone.dump() == together.dump()


def test_a_quantized_graph_is_the_same_with_and_without_arrays():
    symbol = batchnorm(convolution())
    alone, together = with_quantizer(symbol), with_quantizer(symbol)
    merge(alone)
    merge(together, values(symbol))
    assert alone.dump() == together.dump()


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize('missing, reader', [('bn_gamma', 'bn'), ('bn_beta', 'bn'), ('bn_moving_mean', 'bn'),
                                             ('bn_moving_var', 'bn'), ('conv_weight', 'conv'), ('conv_bias', 'conv')])
def test_a_missing_array_is_named(missing, reader):
    symbol = batchnorm(convolution(no_bias=False))
    arrays = values(symbol)
    del arrays[missing]
    with pytest.raises(ValueError, match=f"node '{reader}' .*reads '{missing}', for which there is no array"):
        merge(Graph.of(symbol), arrays)


@pytest.mark.parametrize('missing', ['second_gamma', 'fc_weight'])
def test_nothing_is_changed_when_an_array_is_missing(missing):
    symbol = batchnorm(mx.sym.FullyConnected(mx.sym.relu(batchnorm(convolution())), name='fc', num_hidden=5), 'second')
    graph, arrays = Graph.of(symbol), values(symbol)
    before = graph.dump()
    del arrays[missing]
    with pytest.raises(ValueError, match=f'{missing}.*no array'):
        merge(graph, arrays)
    assert graph.dump() == before


def test_nothing_is_changed_when_an_array_of_a_folded_layer_is_missing():
    symbol = batchnorm(convolution())
    graph, arrays = with_quantizer(symbol), values(symbol)
    graph.fold(*(next(node for node in graph.nodes() if node.name == name) for name in ('conv', 'bn')))
    before = graph.dump()
    del arrays['conv_weight']
    with pytest.raises(ValueError, match="node 'bn' .*reads 'conv_weight', for which there is no array"):
        merge(graph, arrays)
    assert graph.dump() == before


def test_arrays_of_a_batchnorm_that_stays_are_not_needed():
    symbol = batchnorm(mx.sym.relu(batchnorm(convolution())), 'second')
    arrays = {name: array for name, array in values(symbol).items() if not name.startswith('second')}
    _, told = merge(Graph.of(symbol), arrays)
    assert told['bn'] == "merged into 'conv'"


def test_a_layer_with_a_computed_bias_stays():
    symbol = batchnorm(convolution(no_bias=False, bias=mx.sym.var('b') * 2))
    graph, arrays = Graph.of(symbol), values(symbol)
    before = graph.dump()
    changed, told = merge(graph, arrays)
    assert changed == {} and told['bn'].startswith('stays') and graph.dump() == before
