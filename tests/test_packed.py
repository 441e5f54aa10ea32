"""`save_packed`, `load_packed` and reading packed files without MXNet.

    python tests/test_packed.py         # writes the golden file anew; a new version of the format gets a new one
"""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mxnet import nd

import gluonquant as gq
from deploy_nets import SHAPE, attached, converted, float_net, images
from gluonquant.integer.packed_file import pack, parse, read_packed, unpack

GOLDEN = Path(__file__).parent / 'golden' / 'packed_v1.gqp'
METHODS = [('int8', 8), ('lsq', 2), ('lsq', 4), ('dorefa', 3), ('qil', 4), ('gdrq', 4), ('fqn', 7)]


def expected():
    return GOLDEN.with_suffix('.npz')


@given(st.integers(1, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2 ** bits - 1),
                                                                                min_size=1, max_size=40))))
@settings(max_examples=200, deadline=None)
def test_packing_keeps_every_number(given_):
    bits, numbers = given_
    data = pack(np.array(numbers), bits)
    assert len(data) == -(-len(numbers) * bits // 8)
    assert unpack(data, bits, len(numbers)).tolist() == numbers


@pytest.mark.parametrize('make', [attached, converted])
@pytest.mark.parametrize('method, bits', METHODS)
def test_outputs_are_equal_in_gluon_and_in_the_integer_runner(make, method, bits, tmp_path):
    net, x = make(bits, method=method, first_last_bits=min(bits + 1, 7) if method == 'fqn' else 8), images()
    gq.set_phase(net, True)
    final = gq.save_packed(net, tmp_path / 'net.gqp', SHAPE)
    gq.export_onnx(final, str(tmp_path / 'net.onnx'), SHAPE)
    assert np.array_equal(gq.load_packed(tmp_path / 'net.gqp')(nd.array(x)).asnumpy(), final(nd.array(x)).asnumpy())
    assert np.array_equal(gq.integer.run(tmp_path / 'net.gqp', x)['output'],
                          gq.integer.run(str(tmp_path / 'net.onnx'), x)['output'])


def test_a_loaded_net_exports_the_same_graph(tmp_path):
    gq.save_packed(attached(4), tmp_path / 'net.gqp', SHAPE)
    gq.export_onnx(gq.load_packed(tmp_path / 'net.gqp'), str(tmp_path / 'net.onnx'), SHAPE)
    first, second = gq.integer.read(tmp_path / 'net.gqp'), gq.integer.read(tmp_path / 'net.onnx')
    assert [vars(node) for node in first.nodes] == [vars(node) for node in second.nodes]
    assert first.constants.keys() == second.constants.keys()
    assert all(np.array_equal(array, second.constants[name]) for name, array in first.constants.items())


def test_weights_take_as_many_bits_as_they_have(tmp_path):
    sizes = {}
    for bits in (2, 4, 8):
        gq.save_packed(attached(bits, net=float_net(64)), tmp_path / 'net.gqp', SHAPE)
        sizes[bits] = (tmp_path / 'net.gqp').stat().st_size
    weights = 64 * 64 * 9 + 64 * 64     # of the two inner layers
    assert sizes[8] - sizes[4] == pytest.approx(weights / 2, rel=0.05)
    assert sizes[4] - sizes[2] == pytest.approx(weights / 4, rel=0.05)


def test_reading_and_running_needs_no_mxnet(tmp_path):
    gq.save_packed(attached(4), tmp_path / 'net.gqp', SHAPE, architecture='residual')
    code = ('import sys; sys.modules.update(mxnet=None, onnx=None)\n'
            'import numpy as np, gluonquant.integer as integer\n'
            f'print(integer.run({str(tmp_path / "net.gqp")!r}, np.zeros({SHAPE}, np.float32))["output"].shape)')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == '(1, 10)'
    assert read_packed(tmp_path / 'net.gqp').header['architecture'] == 'residual'


def test_a_loaded_net_verifies_and_is_hybridized(tmp_path):
    final = gq.save_packed(attached(4), tmp_path / 'net.gqp', SHAPE)
    loaded, x = gq.load_packed(tmp_path / 'net.gqp'), nd.array(images())
    loaded.hybridize(static_alloc=True, static_shape=True)
    assert np.array_equal(loaded(x).asnumpy(), final(x).asnumpy())


@pytest.mark.parametrize('change, message', [
    (lambda data: data[:-1], 'the file is cut off or altered'),
    (lambda data: data[:100], 'the file is cut off or altered'),
    (lambda data: data[:10], 'the file is cut off or altered'),
    (lambda data: b'', 'no packed file'),
    (lambda data: b'PK' + data[2:], 'no packed file'),
    (lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:], 'the file is cut off or altered')])
def test_damaged_files_are_refused(change, message, tmp_path):
    gq.save_packed(attached(4), tmp_path / 'net.gqp', SHAPE)
    (tmp_path / 'net.gqp').write_bytes(change((tmp_path / 'net.gqp').read_bytes()))
    with pytest.raises(ValueError, match=message):
        gq.load_packed(tmp_path / 'net.gqp')


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_is_noticed(data):
    content = bytearray(GOLDEN.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match='checksum does not fit|no packed file'):
        parse(bytes(content), 'file')


def test_another_version_is_refused_with_both_numbers():
    import hashlib
    content = bytearray(GOLDEN.read_bytes()[:-32])
    content[8] = 9
    with pytest.raises(ValueError, match='file: version 9; this library reads version 1'):
        parse(bytes(content) + hashlib.sha256(bytes(content)).digest(), 'file')


def test_the_golden_file_of_version_1_still_loads():
    saved = np.load(expected())
    assert np.array_equal(gq.integer.run(GOLDEN, saved['x'])['output'], saved['integer'])
    # The order of float32 sums is MXNet's and may change with the machine.
    np.testing.assert_allclose(gq.load_packed(GOLDEN)(nd.array(saved['x'])).asnumpy(), saved['gluon'], rtol=1e-4,
                               atol=1e-4)


def test_a_net_that_cannot_be_exported_is_not_packed_either(tmp_path):
    with pytest.raises(ValueError, match='weight codes, fqn of 8 bits'):
        gq.save_packed(attached(8, method='fqn'), tmp_path / 'net.gqp', SHAPE)
    assert not list(tmp_path.iterdir())


if __name__ == '__main__':
    final = gq.save_packed(attached(4), GOLDEN, SHAPE, architecture='residual')
    x = images(4)
    np.savez(expected(), x=x, integer=gq.integer.run(GOLDEN, x)['output'], gluon=final(nd.array(x)).asnumpy())
