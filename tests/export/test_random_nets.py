"""Random nets: what is exported computes in ONNX Runtime, in the integer runner and in Gluon the same codes."""
import re

import numpy as np
import pytest
from export_nets import (
    WEIGHTS,
    Case,
    Step,
    cases,
    deployed,
    run_gluon,
    run_integers,
    run_onnxruntime,
    steps_before_rounding,
)
from hypothesis import assume, given, settings

pytest.importorskip('onnxruntime', minversion='1.21')
pytest.importorskip('onnx')

few = settings(max_examples=7, deadline=None)
METHODS = tuple(method for method in WEIGHTS if method != 'none')
# Sums of floats, which ONNX Runtime adds in another order: a dense layer, too, that is quantized and an output besides.
SHARED = 'Gemm with several readers'
FLOAT_SUMS = {'AveragePool', 'BatchNormalization', 'Conv', 'GlobalAveragePool', SHARED}
REFUSED = re.compile(r"'[\w.]+' cannot be exported: .|nothing is left to quantize|[\w.]+: .* values are not finite")


def made(case):
    """The net as it is deployed, or a message that says what cannot be, and why."""
    try:
        return deployed(case.calibrated())
    except ValueError as error:
        assert REFUSED.search(str(error)), error
        assume(False)


def differing(actual, expected):
    """{name: largest difference} of the tensors that are not equal bit for bit."""
    assert sorted(actual) == sorted(expected)
    return {name: abs(actual[name].astype(float) - array).max() for name, array in expected.items()
            if not np.array_equal(actual[name], array)}


def codes_of(tensors):
    return {name: array for name, array in tensors.items() if array.dtype != np.float32}


def operators_behind_codes(model, name):
    """The operators between the last integers and a tensor; SHARED for a dense layer that several others read."""
    node = model.maker().get(name)
    if node is None or node.op == 'DequantizeLinear':
        return set()
    readers = sum(other.inputs.count(name) for other in model.nodes)
    mine = SHARED if node.op == 'Gemm' and readers > 1 else node.op
    return {mine}.union(*(operators_behind_codes(model, source) for source in node.inputs))


def assert_near(actual, expected, where):
    """To the rounding errors of float32 sums, which a BatchNorm of next to no variance multiplies by 300, and to those
    of ONNX Runtime's sigmoid, a quotient of polynomials that is off by up to 1e-7 even where it is small."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-7 + 1e-4 * abs(expected).max(), err_msg=where)


def assert_ties(steps, where):
    """Numbers of steps that a float32 sum in another order, off by 1e-5 of the grid, may round to the other side."""
    np.testing.assert_allclose(steps - np.floor(steps), 0.5, atol=1e-3, err_msg=where)


@few
@given(cases(ways=('onnxruntime',), weights=METHODS))
def test_onnxruntime_computes_the_codes_of_the_integer_runner(case):
    net = made(case)
    assert differing(codes_of(run_integers(net, case.images())), codes_of(run_onnxruntime(net, case.images()))) == {}


@few
@given(cases(ways=('onnxruntime',), weights=METHODS))
def test_onnxruntime_computes_the_outputs_of_the_integer_runner_to_the_last_bit_but_for_sums_of_floats(case):
    net = made(case)
    actual, expected = (run(net, case.images()) for run in (run_integers, run_onnxruntime))
    for name in differing(actual, expected):
        operators = operators_behind_codes(net.model, name)
        # ONNX Runtime takes the ReLU of a dense layer that no quantizer follows into a float operator.
        assert operators & FLOAT_SUMS or {'Gemm', 'Relu'} <= operators, name
        assert_near(actual[name], expected[name], name)


@few
@given(cases(ways=('free', 'convert'), weights=METHODS))
def test_behind_layers_that_compute_in_float_a_code_may_be_the_next_one(case):
    """Where a sum of floats lies next to a rounding tie; what comes behind such a code is not compared."""
    net = made(case)
    actual, expected = (run(net, case.images()) for run in (run_integers, run_onnxruntime))
    codes = codes_of(expected)
    found = differing({name: actual[name] for name in codes}, codes)
    if not found:
        for name in net.model.outputs:
            assert_near(actual[name], expected[name], name)
        return
    first = next(name for node in net.model.nodes for name in node.outputs if name in found)
    assert found[first] == 1
    assert_ties(steps_before_rounding(net, case.images(), first)[actual[first] != expected[first]], first)


@few
@given(cases())
def test_the_finalized_net_rounds_to_the_codes_of_the_integer_runner_but_at_ties(case):
    net = made(case)
    codes = run_integers(net, case.images())
    for name, own, steps in run_gluon(net, case.images(), codes)[0]:
        assert_ties(steps[own != codes[name]], name)
        assert (abs(own - codes[name].astype(int)) <= 1).all(), name


@few
@given(cases())
def test_the_finalized_net_computes_the_outputs_of_the_integer_runner(case):
    net = made(case)
    expected = run_integers(net, case.images())
    for out, name in zip(run_gluon(net, case.images(), expected)[1], net.model.outputs):
        assert_near(out, expected[name], name)


def test_layers_without_a_quantized_weight_compute_in_float():
    """To half a step of 8-bit output codes in all but rounding ties; a quantized weight is off by more."""
    case = Case((Step('Conv', (0,), {'channels': 8, 'kernel_size': 3, 'in_channels': 4}), Step('relu', (1,), {}),
                 Step('Dense', (2,), {'units': 3, 'in_units': 8 * 7 * 6})), 0, (), 'onnxruntime',
                {'weight': 'none', 'activation': 'int8', 'bits': 8, 'first_last_bits': 8})
    net = deployed(case.calibrated())
    actual, expected = (codes_of(run(net, case.images())) for run in (run_integers, run_onnxruntime))
    assert max(np.mean(actual[name] != expected[name]) for name in actual) < 0.01


# ---------------------------------------------------------------- many more nets

PROPERTIES = {name: test for name, test in list(globals().items()) if hasattr(test, 'hypothesis')}


@pytest.mark.slow
@pytest.mark.parametrize('name', PROPERTIES)
def test_it_holds_for_many_nets(name):
    test = PROPERTIES[name]
    inner, drawn = test.hypothesis.inner_test, test.hypothesis._given_kwargs
    settings(max_examples=200, deadline=None)(given(**drawn)(inner))()
