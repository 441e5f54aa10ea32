"""The benchmarks run, and compute from their timings what they say."""
import attach
import convert
import graphs
import kernels
import plot
import pytest
import train_step
from gluoncv.model_zoo import get_model
from mxnet import nd

import gluonquant as gq
from gluonquant.ops import build

VARIANTS = [train_step.STOCK, train_step.TUNED, ('pact+sawb', 'pure')]


def test_the_tuned_float_net_computes_the_same_without_pooling():
    net = get_model('cifar_resnet20_v1', classes=10)
    net.initialize()
    data = nd.random.uniform(shape=(2, 3, 16, 16))
    expected = net(data).asnumpy()
    net.apply(train_step.tune)
    # A mean adds up in another order than a pooling: a few units in the last place.
    assert abs(net(data).asnumpy() - expected).max() <= 1e-5 * abs(expected).max()
    net.hybridize()
    net(data)
    assert 'Pooling' not in net._cached_graph[1].tojson()


def test_every_variant_takes_steps_and_the_tier_is_put_back(monkeypatch):
    monkeypatch.setitem(train_step.NETS, 'tiny', ('cifar_resnet20_v1', 2, 8))
    before = gq.ops.backend()
    times = train_step.measure_time('tiny', VARIANTS, 4, 1)
    assert list(times) == VARIANTS and min(times.values()) > 0
    assert gq.ops.backend().tier == before.tier


def test_ratios_divide_by_the_float_net_of_the_column():
    times, peaks = (dict(zip(VARIANTS, values)) for values in ((0.4, 0.2, 0.8), (50.0, 100.0, 150.0)))
    row = list(train_step.make_rows('resnet20', 1, 4, times, peaks))[-1]
    assert (row['time_per_stock'], row['time_per_tuned'], row['memory_per_tuned']) == (2, 4, 1.5)


def test_the_picture_is_drawn_with_and_without_memory(tmp_path):
    for threads, peaks in ((1, dict.fromkeys(VARIANTS, 100.0)), (2, {})):
        rows = list(train_step.make_rows('resnet20', threads, 4, dict.fromkeys(VARIANTS, 0.1), peaks))
        path = tmp_path / f'{threads}.png'
        plot.plot({'machine': {'cpu': 'some'}, 'rows': rows}, path)
        assert path.read_bytes().startswith(b'\x89PNG')


def test_growth_is_the_exponent_between_nets_of_a_tier():
    rows = [{'tier': tier, 'layers': layers, 'seconds': {'forward': seconds}}
            for tier, layers, seconds in (('pure', 10, 1.0), ('pure', 20, 4.0), ('layout', 40, 9.0))]
    convert.add_growth(rows)
    assert [row['growth'] for row in rows] == [{}, {'forward': 2.0}, {}]


def test_stages_are_timed_for_float_and_converted_nets():
    before = gq.ops.use('pure')
    try:
        for tier, stages in (('float', ('forward', 'step')), ('pure', convert.STAGES)):
            seconds, layers = convert.measure_once('cifar_resnet20_v1', tier, 'int8')
            assert tuple(seconds) == stages and layers == 22
    finally:
        gq.ops.use(before)


@pytest.mark.slow
@pytest.mark.native
def test_kernels_are_timed_in_each_instruction_set_of_this_machine(tmp_path):
    program = kernels.compile_program(tmp_path)
    available = [isa for isa in build.INSTRUCTION_SETS if kernels.run(program, isa) == [isa]]
    assert 'baseline' in available
    for isa in available:
        rows = {row['kernel']: row for row in kernels.measure(program, isa, 0.03, 1)}
        row = rows['forward, clamp, pass']
        assert row['elements'] == 2 * kernels.ROW and row['moves'] == 'x y plane'
        # 4 bytes of x, 4 of y and a bit for each element, as the triad moves them
        assert row['gb_per_s'] / row['triad_gb_per_s'] == pytest.approx(row['share'])
        assert min(row['share'] for row in rows.values()) > 0


def test_attaching_is_measured_and_its_growth_is_that_of_a_power(tmp_path):
    rows = attach.measure(['alexnet'], 1)
    assert [(row['target'], row['nodes'] > 30, row['seconds'] > 0) for row in rows] == [(None, True, True),
                                                                                       ('onnxruntime', True, True)]
    made = [{'model': '', 'target': None, 'nodes': nodes, 'quantizers': 1, 'seconds': 0.01 * nodes ** 1.5}
            for nodes in (10, 20, 40)]
    assert attach.exponent(made) == pytest.approx(1.5)
    attach.plot(made + [{**row, 'target': 'onnxruntime'} for row in made], tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').read_bytes().startswith(b'\x89PNG')


def test_the_pictures_of_the_readme_show_a_float_and_a_quantized_net():
    net, quantized = graphs.make_nets(size=32, batches=1)
    assert not gq.layers.quantizers(net) and len(gq.layers.quantizers(quantized, 'weight')) == 21
