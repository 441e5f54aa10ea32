"""`draw`: the picture shows what is in the net, and graphviz can read it."""
import html
import json
import re
import shutil
import subprocess

import mxnet as mx
import pytest
from gluoncv.model_zoo import get_model
from mxnet import nd
from mxnet.gluon import nn

import gluonquant as gq
from gluonquant.graph.draw import COLORS, RED
from gluonquant.graph.picture import make_picture
from gluonquant.layers import quantizers
from gluonquant.symbol_graph import QUANTIZE

needs_dot = pytest.mark.skipif(shutil.which('dot') is None, reason='graphviz is not installed')
WEIRD = 'a "b" <c> & \\N \\ {d} 层 é;'


class Branches(nn.HybridBlock):
    """Two convolutions of one tensor, joined, pooled, and a Dense."""

    def __init__(self):
        super().__init__(prefix='net_')
        with self.name_scope():
            self.stem = nn.Conv2D(4, 3, strides=2, padding=1, in_channels=3)
            self.left = nn.Conv2D(4, 1, in_channels=4)
            self.right = nn.Conv2D(4, 3, padding=1, in_channels=4)
            self.last = nn.Dense(3, in_units=8)

    def hybrid_forward(self, F, x):
        x = F.relu(self.stem(x))
        x = F.concat(F.relu(self.left(x)), F.relu(self.right(x)), dim=1)
        return self.last(F.Pooling(x, pool_type='max', global_pool=True))


def initialized(net):
    net.initialize()
    return net


def plain(count, channels=4):
    """A stem and ``count`` equal layers."""
    net = nn.HybridSequential(prefix='net_')
    with net.name_scope():
        net.add(nn.Conv2D(channels, 3, padding=1, in_channels=3))
        for _ in range(count):
            net.add(nn.Conv2D(channels, 3, padding=1, in_channels=channels, activation='relu'), nn.BatchNorm())
    return initialized(net)


@pytest.fixture
def resnet(seed):
    return initialized(get_model('resnet18_v1b', classes=10))


@pytest.fixture
def calibrated(seed):
    net = gq.attach(initialized(Branches()), bits=3)
    gq.calibrate(net, [nd.random.normal(shape=(2, 3, 8, 8))])
    return net


class Drawn:
    """What a .dot file says: ``boxes`` {number: attributes}, ``edges`` {(from, to): label}, titles of clusters."""

    def __init__(self, text):
        self.text = text
        self.boxes = {int(number): html.unescape(about) for number, about in
                      re.findall(r'^n(\d+) \[(label=.*)\]$', text, re.M)}
        self.edges = {(int(first), int(last)): html.unescape(label) for first, last, label in
                      re.findall(r'^n(\d+) -> n(\d+)(?: \[label="(.*)"\])?$', text, re.M)}
        self.clusters = [re.sub('<[^>]*>', '', title) for title in re.findall(r'^label=<(.*)> labeljust', text, re.M)]

    def having(self, *parts):
        """The attributes of the boxes in which all ``parts`` stand."""
        return [about for about in self.boxes.values() if all(part in about for part in parts)]

    def behind(self, part):
        """Labels of the edges behind boxes in which ``part`` stands, those without one left out."""
        return [label.strip() for (first, _), label in self.edges.items() if part in self.boxes[first] and label]


@pytest.fixture
def drawn(tmp_path):
    def make(net, **options):
        path = gq.draw(net, tmp_path / 'picture.dot', **options)
        with open(path, encoding='utf8') as file:
            return Drawn(file.read())
    return make


def run_dot(text, kind):
    return subprocess.run(['dot', f'-T{kind}'], input=text.encode(), capture_output=True, check=True).stdout.decode()


@needs_dot
@pytest.mark.parametrize('collapse', [False, True])
def test_graphviz_reads_every_box_and_edge(calibrated, drawn, collapse):
    picture = drawn(calibrated, collapse=collapse)
    lines = [line.split()[0] for line in run_dot(picture.text, 'plain').splitlines()]
    assert (lines.count('node'), lines.count('edge')) == (len(picture.boxes), len(picture.edges))


@needs_dot
@pytest.mark.parametrize('name', ['squeezenet1.0', 'mobilenetv2_0.25', 'densenet121'])
def test_graphviz_reads_every_cluster(drawn, name):
    picture = drawn(gq.attach(initialized(get_model(name)), target='openvino'))
    assert picture.clusters and run_dot(picture.text, 'canon').count('subgraph cluster') == len(picture.clusters)


def test_every_quantizer_of_a_tensor_has_a_box(resnet, drawn):
    net = gq.attach(resnet, bits=4)
    picture = drawn(net, collapse=False)
    nodes = [node for node in net.graph.nodes() if node.op == QUANTIZE and '"activation"' in node.attrs['spec']]
    assert len(picture.having('style=filled ')) == len(nodes) == 31
    assert (len(picture.having('=<lsq 4u>')), len(picture.having('=<lsq 4s>'))) == (18, 11)
    assert all(f'tooltip="{net.label(node)}"' in picture.text for node in nodes)


def test_weights_are_no_boxes_but_lines_of_their_layer(resnet, drawn):
    picture = drawn(gq.attach(resnet, bits=4, first_last_bits=None, weight='int8'), collapse=False)
    assert len(picture.having('Convolution', 'weight int8 4s per channel')) == 19
    assert not [about for about in picture.boxes.values() if 'tooltip="layer' in about and '.weight' in about]
    assert len(picture.having('ellipse')) == 2


def test_layers_tell_kernel_stride_groups_and_dilation(drawn):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(6, 3, strides=2, groups=3), nn.Conv2D(5, (1, 7), dilation=2), nn.Conv2DTranspose(2, 4, (2, 1)),
            nn.MaxPool2D(3, 2), nn.GlobalAvgPool2D(), nn.Dense(7))
    text = drawn(net).text
    for title in ('Convolution 6 3x3/2 groups 3', 'Convolution 5 1x7 dilate 2', 'Deconvolution 2 4x4/2x1',
                  'Pooling max 3x3/2', 'Pooling avg global', 'FullyConnected 7'):
        assert f'>{title}<' in text or f'<{title}>' in text


def test_a_method_has_its_color_and_stands_in_the_legend(drawn):
    picture = drawn(gq.attach(initialized(Branches()), weight='sawb', activation='pact', first_last_bits=None, only={
        'Convolution': 2}))
    assert picture.having(f'fillcolor="{COLORS["pact"]}"', 'pact 4u')
    assert picture.having(f'fillcolor="{COLORS["sawb"]}99"', 'weight sawb 4s<BR')       # no scale per channel
    assert all(f'BGCOLOR="{COLORS[name]}">{name}<' in picture.text for name in ('pact', 'sawb'))
    assert 'lsq' not in picture.text


def test_a_method_of_the_users_own_is_grey(drawn):
    net = gq.attach(initialized(Branches()))
    for quantizer in quantizers(net).values():
        quantizer.method = 'mine'
    assert drawn(net).having('fillcolor="#DDDDDD"', 'mine 4u')


def test_float_layers_in_a_quantized_net_have_a_red_frame_and_say_what_is_float(drawn):
    net = gq.attach(initialized(Branches()), ops=['Convolution', 'FullyConnected', 'Concat'], exclude=['right'], rules=[
        gq.Rule('left', weight='none'), gq.Rule('last', activation='none')])
    picture = drawn(net)
    red = {re.search('tooltip="(.*?)"', about)[1]: re.search(r'>(\w[\w ]* float)<', about)[1]
           for about in picture.having(f'color="{RED}" penwidth=3')}
    # The layer on the right reads the tensor that is quantized for the one on the left, before the quantizer; the last
    # one what comes from two grids.
    assert red == {'left': 'weight float', 'right': 'input and weight float', 'last': 'input float'}
    assert f'<TD COLOR="{RED}"' in picture.text


def test_nothing_is_red_where_nothing_is_quantized_or_everything(calibrated, drawn):
    for net in (initialized(Branches()), calibrated):
        assert RED not in drawn(net).text


def test_a_layer_behind_a_pooling_that_passes_codes_on_has_no_float_input(drawn):
    net = gq.attach(initialized(Branches()), target='openvino')
    picture = drawn(net)
    (pooling,) = [number for number, about in picture.boxes.items() if 'Pooling' in about]
    assert ['FullyConnected' in picture.boxes[last] for first, last in picture.edges if first == pooling] == [True]
    assert RED not in picture.text


def test_a_layer_behind_a_concat_of_one_grid_has_no_float_input(drawn):
    data = mx.sym.var('data')
    x, y = (mx.sym.Convolution(data, kernel=(1, 1), num_filter=2, name=name) for name in 'xy')
    net = mx.sym.Group([mx.sym.Convolution(tensor, kernel=(1, 1), num_filter=2)
                        for tensor in (x, y, mx.sym.concat(x, y, dim=1))])
    picture = drawn(gq.attach(net, target='openvino'))
    assert [picture.boxes[first][:14] for first, last in picture.edges if 'convolution2' in picture.boxes[last]] == [
        'label=<Concat ']
    assert RED not in picture.text


def test_quantizers_that_share_a_range_have_a_number(drawn):
    data = mx.sym.var('data')
    x, y = (mx.sym.Convolution(data, kernel=(1, 1), num_filter=2, name=name) for name in 'xy')
    both = mx.sym.concat(x, y, dim=1)
    net = mx.sym.Group([mx.sym.Convolution(tensor, kernel=(1, 1), num_filter=2) for tensor in (both, x)])
    shared = gq.attach(net, target='openvino', rules=[gq.Rule('*', bits=6)])
    picture = drawn(shared)
    assert len(picture.having('=<int8 6s>')) == 1 and len(picture.having('lsq 6s · shared 1>')) == 2
    assert [box.group for box in make_picture(shared).boxes if box.group] == 2 * ['x.output_quantizer']
    assert 'shared' not in drawn(gq.attach(net)).text


def test_the_edge_behind_a_quantizer_has_its_range_and_scale(calibrated, drawn):
    picture = drawn(calibrated)
    for path, quantizer in quantizers(calibrated, 'activation').items():
        low, high = quantizer.affine_bounds()
        (label,) = set(picture.behind(f'tooltip="{path}'))
        shown = [float(number) for number in re.findall(r'-?\d[\d.e-]*', label)]
        # Three digits are shown.
        assert shown == pytest.approx([low, high, float(quantizer.qparams().scale[0])], rel=5e-3)


def test_a_range_is_written_once_however_many_read_it(calibrated, drawn):
    picture = drawn(calibrated)
    (stem,) = [number for number, about in picture.boxes.items() if 'tooltip="relu0.output_quantizer' in about]
    assert sorted(bool(label) for (first, _), label in picture.edges.items() if first == stem) == [False, True]


def test_before_calibration_the_edges_say_so(drawn):
    net = gq.attach(initialized(Branches()), activation='lsq')
    assert set(drawn(net).behind('lsq')) == {'not calibrated'}


def test_an_empty_quantizer_has_a_box_without_range_and_leaves_its_reader_float(drawn):
    graph = gq.attach(initialized(Branches())).graph
    for node in graph.nodes():
        if node.op == QUANTIZE and node.name.startswith('data'):
            node.attrs['spec'] = node.attrs['spec'].replace('int8', 'none')
    picture = drawn(graph)
    assert picture.having('=<none>', 'tooltip="data') and picture.behind('=<none>') == []
    assert len(picture.having('input float', 'Convolution 4 3x3/2')) == 1


def test_batchnorm_and_activations_stand_in_the_box_of_their_layer(resnet, drawn):
    picture = drawn(resnet, collapse=False)
    assert len(picture.having('<BR/>BatchNorm, relu>')) == 9 and len(picture.having('=<elemwise_add, relu>')) == 8
    assert len(picture.boxes) == 1 + 21 + 8 + 3 + 1


def test_an_activation_behind_a_quantizer_or_read_by_two_layers_is_drawn_as_it_stands(drawn):
    net = gq.attach(initialized(nn.Conv2D(2, 1, in_channels=3, activation='relu')), ops=['Convolution', 'Activation'])
    assert drawn(net).having('=<relu>')
    x = mx.sym.Convolution(mx.sym.var('data'), kernel=(1, 1), num_filter=2)
    assert drawn(mx.sym.Group([mx.sym.relu(x), x])).having('=<relu>')


def test_folded_batchnorm_is_drawn_with_its_layer(drawn):
    net = nn.HybridSequential()
    net.add(nn.Conv2D(4, 3, in_channels=3, use_bias=False), nn.BatchNorm(in_channels=4))
    net = gq.attach(initialized(net), bits=4)
    net.fold_batchnorm()
    assert drawn(net).having('Convolution 4 3x3', 'weight int8 8s per channel', 'BatchNorm (folded)')
    gq.calibrate(net, [nd.ones((1, 3, 4, 4))])
    net(nd.ones((1, 3, 4, 4)))
    net.merge_batchnorm()
    assert drawn(net).having('Convolution 4 3x3', 'weight int8 8s per channel') and 'BatchNorm' not in drawn(net).text


def test_a_chain_of_equal_layers_is_drawn_once(drawn):
    picture = drawn(plain(5))
    assert picture.clusters == ['× 5  1to 9'] and len(picture.having('Convolution')) == 2
    assert sorted(picture.edges) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert len(drawn(plain(5), collapse=False).having('Convolution')) == 6


def test_equal_blocks_of_resnets_are_drawn_once(resnet, drawn):
    for net in (resnet, gq.attach(resnet)):
        assert drawn(net).clusters == ['× 2  layer1.0.conv1to layer1.1.conv2']
    deep = get_model('resnet50_v1b', classes=10)
    assert [title.split()[1] for title in drawn(deep).clusters] == ['2', '3', '5', '2']


def test_densely_connected_layers_are_drawn_once(drawn):
    assert sorted(int(title.split()[1]) for title in drawn(get_model('densenet121')).clusters) == [6, 12, 16, 24]


def test_layers_that_are_quantized_differently_are_not_equal(drawn):
    # The first and the last layer have 8 bits.
    assert drawn(gq.attach(plain(7))).clusters == ['× 6  1to 11']
    assert drawn(gq.attach(plain(7), rules=[gq.Rule('7', bits=2)])).clusters == ['× 3  1to 5', '× 2  9to 11']


def test_layers_that_look_equal_but_are_not_stay_apart(drawn):
    x = mx.sym.var('data')
    for pad in (0, 1, 1, 1, 2, 2):
        x = mx.sym.Convolution(x, kernel=(3, 3), pad=(pad, pad), num_filter=4)
    assert [title.split()[1] for title in drawn(x).clusters] == ['3']


def test_a_collapsed_block_with_a_range_that_is_unknown_says_so(drawn):
    net = gq.attach(plain(5), table={'batchnorm1_fwd': 2})
    assert drawn(net).behind('lsq 4s') == ['not calibrated']


def test_a_collapsed_block_tells_the_span_of_its_ranges(seed, drawn):
    net = gq.attach(plain(5))
    gq.calibrate(net, [nd.random.normal(shape=(2, 3, 8, 8))])
    inner = list(quantizers(net, 'activation').values())[1:-1]
    scales = [float(quantizer.qparams().scale[0]) for quantizer in inner]
    assert [label.split('scale ')[1] for label in drawn(net).behind('lsq 4s')] == [
        f'{min(scales):.3g}…{max(scales):.3g}']


def test_what_reads_a_collapsed_block_reads_its_box(resnet, drawn):
    picture = drawn(resnet)
    names = {number: re.search('tooltip="(.*?)"', about)[1] for number, about in picture.boxes.items()}
    assert all(last in names and first in names for first, last in picture.edges)
    assert [names[first] for first, last in picture.edges if names[last] in ('layer2.0.conv1', 'layer2.0.downsample.0')
            ] == ['layers1_basicblockv1b0__plus0'] * 2
    # Nothing but the net's input has no input, nothing but its output is not read.
    assert {names[number] for number in names} - {names[last] for _, last in picture.edges} == {'data'}
    assert {names[number] for number in names} - {names[first] for first, _ in picture.edges} == {'output'}


@needs_dot
def test_weird_names_survive(drawn):
    x = mx.sym.Convolution(mx.sym.var('data'), kernel=(1, 1), num_filter=2, name=WEIRD)
    picture = drawn(mx.sym.relu(x, name='r'), title=WEIRD)
    # The title, the line in the layer, its tooltip.
    shown = WEIRD.replace('\\', '\N{SET MINUS}')
    assert html.unescape(run_dot(picture.text, 'svg')).count(shown) == picture.text.count('é') == 3


@needs_dot
def test_control_characters_are_shown_as_escapes_and_long_names_cut(drawn):
    graph = gq.graph.as_graph(mx.sym.relu(mx.sym.var('data'))).graph
    graph.nodes()[0].name, graph.nodes()[1].name = 'a\x00b\ud800', 100 * 'x'
    net = gq.graph.GraphNet(graph, {}, ['a\x00b\ud800'])
    text = drawn(net).text
    run_dot(text, 'svg')
    assert 'a\N{SET MINUS}x00b\N{SET MINUS}xd800' in text and f'"{59 * "x"}…"' in text


@needs_dot
def test_files_are_of_the_kind_that_their_extension_names(calibrated, tmp_path):
    starts = {'png': b'\x89PNG\r\n', 'svg': b'<?xml', 'pdf': b'%PDF', 'PNG': b'\x89PNG\r\n', 'dot': b'digraph'}
    for extension, start in starts.items():
        path = tmp_path / f'net.{extension}'
        assert gq.draw(calibrated, path) == str(path) and path.read_bytes().startswith(start)
    assert sorted(path.suffix[1:] for path in tmp_path.iterdir()) == sorted(starts)


@needs_dot
def test_a_png_is_large_enough_to_read_and_small_enough_to_keep(resnet, tmp_path):
    path = tmp_path / 'net.png'
    gq.draw(gq.attach(resnet), path)
    content = path.read_bytes()
    width, height = (int.from_bytes(content[at:at + 4], 'big') for at in (16, 20))
    assert 300 < width < 800 and 2000 < height < 5000 and len(content) < 300_000


def test_symbols_files_and_nets_of_several_inputs_are_read(drawn, tmp_path):
    x = mx.sym.FullyConnected(mx.sym.var('left') + mx.sym.var('right'), num_hidden=3, name='dense')
    x.save(str(tmp_path / 'net-symbol.json'))
    for net in (x, str(tmp_path / 'net-symbol.json')):
        picture = drawn(net, inputs=('left', 'right'))
        assert [re.search('tooltip="(.*?)"', about)[1] for about in picture.having('ellipse')] == [
            'left', 'right', 'output']
        assert picture.having('FullyConnected 3')


def test_each_output_has_an_ellipse(drawn):
    x = mx.sym.split(mx.sym.var('data'), num_outputs=2, name='halves')
    picture = drawn(mx.sym.Group([x[0], x[1] + 1]))
    assert len(picture.having('ellipse', '=<output 1>')) == len(picture.having('ellipse', '=<output 2>')) == 1
    assert picture.having('split into 2') and picture.having('=<+ 1')


def test_drawing_changes_neither_net_nor_caches(calibrated, drawn):
    float_net = initialized(Branches())
    data = nd.random.normal(shape=(2, 3, 8, 8))
    for net in (calibrated, float_net):
        net.hybridize()
        out, cache = net(data).asnumpy(), net._cached_op
        before = {name: value.data().asnumpy().tobytes() for name, value in net.collect_params().items()}
        shown = json.dumps(net.settings(), default=str) if net is calibrated else ''
        drawn(net)
        assert net._cached_op is cache and (net(data).asnumpy() == out).all()
        assert {name: value.data().asnumpy().tobytes() for name, value in net.collect_params().items()} == before
        assert not shown or json.dumps(net.settings(), default=str) == shown


def test_the_same_net_gives_the_same_text(resnet, drawn):
    net = gq.attach(resnet)
    assert drawn(net).text == drawn(net).text


def test_another_extension_is_refused_by_name_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"net\.gif' has the extension '\.gif': known are \.dot, \.pdf, \.png, \.svg"):
        gq.draw(None, tmp_path / 'net.gif')


def test_a_net_without_graph_is_refused(tmp_path):
    with pytest.raises(TypeError, match='is no HybridBlock'):
        gq.draw(nn.Sequential(), tmp_path / 'net.dot')
    assert not list(tmp_path.iterdir())


def test_without_graphviz_the_error_says_what_to_install_and_dot_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(RuntimeError, match=r'dot is not installed \(apt-get install graphviz\).* or write a \.dot'):
        gq.draw(plain(1), tmp_path / 'net.png')
    gq.draw(plain(1), tmp_path / 'net.dot')
    assert [path.name for path in tmp_path.iterdir()] == ['net.dot']


def test_a_file_stays_if_graphviz_fails(tmp_path, monkeypatch):
    program = tmp_path / 'bin' / 'dot'
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho half a picture\necho "too tired" >&2\nexit 3\n', encoding='utf8')
    program.chmod(0o755)
    monkeypatch.setenv('PATH', str(program.parent), prepend=':')
    (tmp_path / 'net.png').write_text('before', encoding='utf8')
    with pytest.raises(RuntimeError, match='dot failed with code 3: too tired'):
        gq.draw(plain(1), tmp_path / 'net.png')
    assert (tmp_path / 'net.png').read_text(encoding='utf8') == 'before'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bin', 'net.png']


def test_a_file_stays_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / 'net.dot').write_text('before', encoding='utf8')

    def refuse(*_):
        raise OSError('no')
    monkeypatch.setattr('os.replace', refuse)
    with pytest.raises(OSError, match='no'):
        gq.draw(plain(1), tmp_path / 'net.dot')
    assert [(path.name, path.read_text(encoding='utf8')) for path in tmp_path.iterdir()] == [('net.dot', 'before')]
