"""Random graphs: whatever is attached computes, hybridizes, loads, switches off, trains and explains itself."""
import copy
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import mxnet as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mxnet import autograd, gluon, nd
from mxnet._ctypes.ndarray import CachedOp
from random_graphs import RandomGraph, random_graphs

import gluonquant as gq
from gluonquant.graph import OPS, TARGETS, as_graph
from gluonquant.layers import quantizers
from gluonquant.plan import PRESETS
from gluonquant.symbol_graph import QUANTIZE, VARIABLE, Entry, Graph, ancestors, evaluate, invoke
from gluonquant.trace import LAYER_OPS

few, fewer = (settings(max_examples=count, deadline=None) for count in (25, 10))
FURTHER_OPS = ('broadcast_add', 'broadcast_mul', 'relu', 'Activation', 'clip', 'sigmoid', 'mean', 'Dropout',
               'SliceChannel', 'BatchNorm', 'Flatten', 'Reshape', 'transpose', '_mul_scalar')
BATCHES = 2


# ---------------------------------------------------------------- graphs, and nets made from them


class Case(NamedTuple):
    """A random graph and how quantizers are attached to it."""
    graph: RandomGraph
    options: Any

    def attach(self):
        """The net; not every graph has a tensor that is to be quantized."""
        try:
            return gq.attach(self.graph.symbol, params=self.graph.params, inputs=tuple(self.graph.shapes),
                             **self.options)
        except ValueError as error:
            assume('nothing is left to quantize' not in str(error))
            raise

    def calibrated(self):
        """The net with ranges, for which tensors must not always be zero."""
        net = self.attach()
        gq.calibrate(net, [self.graph.inputs(seed) for seed in range(BATCHES)],
                     forward=lambda net, batch: net(*batch))
        assume(all(quantizer.calibrated for quantizer in quantizers(net).values()))
        return net


@st.composite
def cases(draw, **options):
    """Any graph, with any method, bits, target and operators; ``options`` are those of `random_graphs`."""
    method, target = draw(st.sampled_from(sorted(PRESETS))), draw(st.sampled_from([None, *sorted(TARGETS)]))
    assume(not (method in ('dorefa', 'qil') and target == 'tensorrt'))      # unsigned codes here, signed ones there
    further = draw(st.lists(st.sampled_from(FURTHER_OPS), max_size=3, unique=True))
    return Case(draw(random_graphs(**options)), {
        'method': method, 'target': target, 'bits': draw(st.integers(2, 8)), 'ops': (*OPS, *further),
        'first_last_bits': draw(st.sampled_from([8, 8, 5, None]))})


def arrays(out):
    return [array.asnumpy() for array in (out if isinstance(out, (list, tuple)) else [out])]


def run(net, case, seed=0):
    return arrays(net(*case.graph.inputs(seed)))


def computed(graph, symbol=None, seed=0):
    """The outputs of a random graph, or of a symbol with its inputs and Parameters, as MXNet runs it."""
    symbol = graph.symbol if symbol is None else symbol
    values = {**graph.params, **dict(zip(graph.shapes, graph.inputs(seed)))}
    return arrays(CachedOp(symbol)(*(values[name] for name in symbol.list_inputs())))


def text_of(symbol):
    return symbol.tojson(remove_amp_cast=False)


def assert_equal_bits(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- symbols and graphs


@few
@given(random_graphs())
def test_a_symbol_that_was_a_graph_is_the_same_to_the_letter(graph):
    assert text_of(Graph.read(Graph.of(graph.symbol).dump()).symbol()) == text_of(graph.symbol)


@few
@given(random_graphs())
def test_nodes_run_one_by_one_compute_what_the_symbol_does(graph):
    made = Graph.of(graph.symbol)
    values = {**graph.params, **dict(zip(graph.shapes, graph.inputs()))}

    def run_node(F, node, inputs):
        return inputs if node is made.heads else invoke(F, node, inputs)
    out = evaluate(mx.nd, [*made.nodes(), made.heads], values, run_node)[made.heads]
    assert_equal_bits(arrays(out), computed(graph))


@few
@given(random_graphs(), st.randoms(use_true_random=False))
def test_nodes_in_a_file_may_stand_in_any_order(graph, random):
    content = json.loads(text_of(graph.symbol))
    order = list(range(len(content['nodes'])))
    random.shuffle(order)
    number = {old: new for new, old in enumerate(order)}
    content['nodes'] = [content['nodes'][old] for old in order]
    for edges in [content['heads'], *(node['inputs'] for node in content['nodes'])]:
        edges[:] = [[number[old], *rest] for old, *rest in edges]
    content['arg_nodes'] = [place for place, node in enumerate(content['nodes']) if node['op'] == VARIABLE]
    assert text_of(Graph.read(json.dumps(content)).symbol()) == text_of(graph.symbol)


@few
@given(random_graphs())
def test_shapes_are_those_of_the_outputs(graph):
    made = Graph.of(graph.symbol)
    shapes = made.shapes(**graph.shapes)
    assert [shapes[entry[:2]] for entry in made.heads.inputs] == [out.shape for out in computed(graph)]


@few
@given(random_graphs())
def test_a_graph_net_without_quantizers_computes_what_the_symbol_does(graph):
    net = as_graph(graph.symbol, params=graph.params, inputs=tuple(graph.shapes))
    assert_equal_bits(arrays(net(*graph.inputs())), computed(graph))


# ---------------------------------------------------------------- attached nets


@few
@given(cases())
def test_outputs_are_finite(case):
    assert all(np.isfinite(out).all() for out in run(case.calibrated(), case))


@few
@given(cases())
def test_outputs_have_the_shapes_of_the_float_ones(case):
    assert [out.shape for out in run(case.calibrated(), case)] == [out.shape for out in computed(case.graph)]


# Hybridizing makes a mean of a global average pooling, which adds up in another order: such graphs have a mean already.
@few
@given(cases(global_average=False), st.booleans())
def test_a_hybridized_net_computes_what_it_does_without_to_the_last_bit(case, static):
    net = case.calibrated()
    expected = run(net, case)
    net.hybridize(static_alloc=static, static_shape=static)
    assert_equal_bits(run(net, case), expected)


@few
@given(cases())
def test_a_net_without_quantization_computes_what_the_symbol_does_to_the_last_bit(case):
    net = gq.set_mode(case.calibrated(), 'off')
    assert_equal_bits(run(net, case), computed(case.graph))


@few
@given(cases(global_average=False))
def test_a_hybridized_net_without_quantization_computes_what_the_symbol_does_to_the_last_bit(case):
    net = gq.set_mode(case.calibrated(), 'off')
    net.hybridize()
    assert_equal_bits(run(net, case), computed(case.graph))


def loaded(net):
    """The net after it was saved, from the file alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / 'net.gq')
        gq.save(net, path)
        return gq.load(path)


@few
@given(cases(), st.booleans())
def test_a_saved_net_loads_without_a_net_and_computes_the_same_to_the_last_bit(case, hybridized):
    net = case.calibrated()
    other = loaded(net)
    for made in (net, other):
        made.hybridize(hybridized)
    assert_equal_bits(run(other, case), run(net, case))


@st.composite
def foldable(draw):
    """A case whose first input passes a convolution and a BatchNorm of its own first: something to fold."""
    case = draw(cases())
    graph, (name, *others) = case.graph, case.graph.shapes
    assume(len(graph.shapes[name]) == 4 and 'BatchNorm' not in case.options['ops'])
    channels, rng = graph.shapes[name][1], np.random.default_rng(draw(st.integers(0, 99)))
    stem = mx.sym.Convolution(mx.sym.var('image'), kernel=(3, 3), pad=(1, 1), num_filter=channels, name='stem')
    stem = mx.sym.BatchNorm(stem, fix_gamma=draw(st.booleans()), name='norm')
    params = {'stem_weight': rng.normal(size=(channels, channels, 3, 3)), 'stem_bias': rng.normal(size=channels),
              'norm_gamma': rng.choice([-1, 1], channels) * rng.uniform(0.5, 2, channels),
              'norm_beta': rng.normal(size=channels), 'norm_moving_mean': rng.normal(size=channels),
              'norm_moving_var': rng.uniform(5, 20, channels)}
    shapes = {'image': graph.shapes[name], **{other: graph.shapes[other] for other in others}}
    return case._replace(graph=RandomGraph(graph.symbol(**{name: stem}), {
        **graph.params, **{key: nd.array(value) for key, value in params.items()}}, shapes))


def assert_near(actual, expected):
    """To the rounding errors of a dozen float32 operators."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * max(1, abs(other).max()))


@fewer
@given(foldable(), st.booleans())
def test_a_saved_loaded_and_merged_net_computes_the_same_with_quantized_weights(case, hybridized):
    """Activations stay float: at a rounding tie, theirs would differ by a whole step."""
    net = case._replace(options={**case.options, 'activation': 'none'}).calibrated()
    expected = run(net, case)
    other = gq.fold(loaded(net))
    other.hybridize(hybridized)
    assert_near(run(other, case), expected)


@fewer
@given(foldable())
def test_a_merged_net_without_quantization_computes_what_the_symbol_does(case):
    assert_near(run(gq.set_mode(gq.fold(loaded(case.calibrated())), 'off'), case), computed(case.graph))


@fewer
@given(foldable(), st.sampled_from(['frozen', 'batch']))
def test_a_folded_net_without_quantization_computes_what_the_symbol_does(case, mode):
    net = case.calibrated()
    assert_near(run(gq.set_mode(gq.fold(net, mode), 'off'), case), computed(case.graph))


@few
@given(cases())
def test_a_copied_net_computes_the_same_to_the_last_bit(case):
    net = case.calibrated()
    assert_equal_bits(run(copy.deepcopy(net), case), run(net, case))


@pytest.mark.filterwarnings('ignore:Cannot decide type')        # Gluon says so of any input
@few
@given(cases())
def test_an_exported_net_computes_what_the_hybridized_one_does_to_the_last_bit(case):
    net = case.calibrated()
    net.hybridize()
    expected = run(net, case)
    with tempfile.TemporaryDirectory() as folder:
        net.export(f'{folder}/net')
        names = ['data'] if len(case.graph.shapes) == 1 else ['data0', 'data1']     # Gluon calls them so
        block = gluon.SymbolBlock.imports(f'{folder}/net-symbol.json', names, f'{folder}/net-0000.params')
    assert_equal_bits(run(block, case), expected)


@few
@given(cases())
def test_a_saved_net_explains_itself_as_before(case):
    net = case.calibrated()
    assert gq.explain(loaded(net)) == gq.explain(net)


@few
@given(cases())
def test_a_saved_net_trains_on_as_before(case):
    net = case.calibrated()
    other = loaded(net)
    for made in (net, other):
        train(made, case)
    for (name, mine), theirs in zip(values(net).items(), values(other).values()):
        np.testing.assert_array_equal(theirs, mine, err_msg=name)


def values(net):
    return {name: parameter.data().asnumpy() for name, parameter in net._collect_params_with_prefix().items()}


def train(net, case):
    """One step; returns {name: gradient}."""
    mx.random.seed(0)       # of Dropout
    trainer = gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 1e-3}, kvstore=None)
    with autograd.record():
        out = net(*case.graph.inputs())
        loss = sum((part ** 2).mean() for part in (out if isinstance(out, (list, tuple)) else [out]))
    loss.backward()
    gradients = {name: parameter.grad().asnumpy() for name, parameter in net.collect_params().items()
                 if parameter.grad_req != 'null'}
    trainer.step(1)
    nd.waitall()
    return gradients


@few
@given(cases(), st.booleans())
def test_gradients_are_finite(case, hybridized):
    net = case.calibrated()
    net.hybridize(hybridized)
    for name, gradient in train(net, case).items():
        assert np.isfinite(gradient).all(), name


@few
@given(cases(), st.booleans())
def test_outputs_are_finite_after_a_step(case, hybridized):
    net = case.calibrated()
    net.hybridize(hybridized)
    train(net, case)
    assert all(np.isfinite(out).all() for out in run(net, case))


# ---------------------------------------------------------------- decisions


def operators(graph):
    return [node for node in graph.nodes() if node.op not in (VARIABLE, QUANTIZE)]


@few
@given(cases())
def test_every_operator_is_explained(case):
    rows = gq.explain(case.attach()).rows
    assert {(row.node, row.op) for row in rows} == {(node.name, node.op) for node in
                                                    operators(Graph.of(case.graph.symbol))}


@few
@given(cases())
def test_every_quantizer_is_explained(case):
    net = case.attach()
    assert {row.quantizer for row in gq.explain(net).rows} - {None} == set(quantizers(net))


@few
@given(cases())
def test_what_is_explained_as_quantized_is_quantized(case):
    """A row says which quantizer stands in front of which input; where there is none, the operator reads a float."""
    net = case.attach()
    nodes = {node.name: node for node in operators(net.graph)}
    for row in gq.explain(net).rows:
        read = [entry.node.attrs['quantizer'] for entry in nodes[row.node].inputs if entry.node.op == QUANTIZE]
        direct = 'passes it through' in row.reason or 'the quantizer stands behind it' in row.reason
        assert row.quantizer is None or direct or row.quantizer in read, row


def inputs_of_operators(net, case):
    """{name of operator: [array of each input]} as the net runs."""
    read, run_node = {}, net._run

    def look(F, node, inputs):
        read[node.name] = [array.asnumpy() for array in inputs]
        return run_node(F, node, inputs)
    net._run = look
    run(net, case)
    return read


@few
@given(cases())
def test_an_input_that_is_explained_as_quantized_holds_codes(case):
    """What stands on a grid of n bits has 2^n different values at most, whatever it passed through."""
    net = case.calibrated()
    read, activations = inputs_of_operators(net, case), quantizers(net, 'activation')
    nodes = {node.name: node for node in operators(Graph.of(case.graph.symbol))}
    for row in gq.explain(net).rows:
        if row.quantizer in activations and 'the quantizer stands behind it' not in row.reason:
            for slot, entry in enumerate(nodes[row.node].inputs):
                if row.input == entry.node.name + (f'[{entry.index}]' if entry.index else ''):
                    assert len(np.unique(read[row.node][slot])) <= activations[row.quantizer].grid.levels, row


@few
@given(cases())
def test_an_operator_that_is_explained_as_float_reads_nothing_quantized(case):
    net = case.attach()
    quantized = {node.name for node in operators(net.graph)
                 if any(entry.node.op == QUANTIZE for entry in node.inputs)}
    assert {row.node for row in gq.explain(net).rows if not row.input} & quantized == set()


@few
@given(cases())
def test_what_is_quantized_without_a_sign_is_never_negative(case):
    net = case.calibrated()
    read = inputs_of_operators(net, case)
    for node in net.graph.nodes():
        if node.op == QUANTIZE and json.loads(node.attrs['spec'])['signed'] is False:
            assert read[node.name][0].min() >= 0, node.name


@few
@given(cases())
def test_a_tensor_has_the_most_bits_that_those_who_read_it_ask_for(case):
    assume(case.options['target'] is None)
    graph = case.attach().graph
    layers = [node for node in operators(graph) if node.op in LAYER_OPS]
    before = {other for node in layers for other in ancestors(node.inputs)}
    asked = dict.fromkeys(graph.nodes(), case.options['bits'])
    if layers:
        ends = [layers[0], *(node for node in layers if node not in before)]
        asked.update(dict.fromkeys(ends, case.options['first_last_bits']))
    for node in graph.nodes():
        if node.op == QUANTIZE:
            assert json.loads(node.attrs['spec'])['bits'] == max(asked[reader] for reader in graph.readers(node))


@few
@given(cases())
def test_a_tensor_has_one_quantizer_at_most(case):
    graph = case.attach().graph
    counts = Counter(node.inputs[0][:2] for node in graph.nodes() if node.op == QUANTIZE)
    assert {(node.name, index): count for (node, index), count in counts.items() if count > 1} == {}


@few
@given(cases())
def test_no_quantizer_reads_a_quantizer(case):
    graph = case.attach().graph
    assert [node.name for node in graph.nodes() if node.op == QUANTIZE and node.inputs[0].node.op == QUANTIZE] == []


@few
@given(cases())
def test_with_a_target_all_that_reads_a_quantized_tensor_reads_it_quantized(case):
    assume(case.options['target'] is not None)
    net = case.attach()
    graph, activations = net.graph, quantizers(net, 'activation')
    for node in graph.nodes():
        if node.op == QUANTIZE and node.attrs['quantizer'] in activations:
            entry = node.inputs[0]
            assert set(graph.entry_readers(Entry(*entry[:2]))) <= {node, graph.heads}


@few
@given(cases())
def test_with_a_target_outputs_stay_float(case):
    assume(case.options['target'] is not None)
    assert [entry.node.name for entry in case.attach().graph.heads.inputs if entry.node.op == QUANTIZE] == []


@few
@given(cases())
def test_without_quantizers_the_graph_is_what_it_was(case):
    graph = case.attach().graph.copy()
    graph.strip()
    assert text_of(graph.symbol()) == text_of(case.graph.symbol)


@few
@given(cases())
def test_attaching_again_decides_the_same(case):
    first, second = case.attach(), case.attach()
    assert first.graph.dump() == second.graph.dump() and first.decisions == second.decisions


@few
@given(cases())
def test_attaching_changes_no_parameter(case):
    net = case.attach()
    for name, value in case.graph.params.items():
        np.testing.assert_array_equal(net.parameter(name).data().asnumpy(), value.asnumpy(), err_msg=name)


# ---------------------------------------------------------------- folding BatchNorm

# The place for: `gq.fold` of `as_graph(graph.symbol, ...)` and of `case.calibrated()` keeps the outputs. Graphs come
# from `random_graphs()` and `cases()`, what MXNet computes from `computed(graph)`; tests here run under `slow` too.


# ---------------------------------------------------------------- many more graphs

PROPERTIES = {name: test for name, test in list(globals().items()) if name.startswith('test_')}


@pytest.mark.slow
@pytest.mark.parametrize('name', PROPERTIES)
def test_it_holds_for_many_graphs(name):
    test = PROPERTIES[name]
    inner, drawn = test.hypothesis.inner_test, test.hypothesis._given_kwargs
    settings(max_examples=400, deadline=None)(given(**drawn)(inner))()
