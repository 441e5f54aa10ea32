"""Finding, checking and choosing the compiled operators."""
import _ctypes
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import mxnet as mx
import numpy as np
import pytest

import gluonquant as gq
from gluonquant import ops
from gluonquant.ops import build, find, load

FORK = multiprocessing.get_context('fork')


@pytest.fixture(scope='module')
def library():
    """The portable library, compiled once and kept in the cache of whoever runs the tests."""
    try:
        return find.find('portable')
    except find.Unavailable as reason:
        pytest.skip(f'no library: {reason}')


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no installed library."""
    monkeypatch.setenv('GLUONQUANT_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(find, 'INSTALLED', tmp_path / 'installed')
    folder = find.cache_folder()
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def copied(library, cache):
    """The library in the cache, to be damaged."""
    return put(library, cache)


def put(library, folder):
    """Copy a library, with a manifest that fits."""
    folder.mkdir(exist_ok=True)
    path = folder / '_portable.so'
    shutil.copy(library, path)
    path.with_suffix('.json').write_text(json.dumps(build.manifest('portable', path)), encoding='utf8')
    return path


@pytest.fixture
def compiler(library, tmp_path, monkeypatch):
    """A compiler that takes a moment to copy the library instead; returns how often it has linked."""
    log, script = tmp_path / 'log', tmp_path / 'c++'
    script.write_text(f'#!/bin/sh\nfor target; do :; done\ncp {library} $target\n'
                      f'case $target in *.so) sleep 0.2; echo >> {log};; esac\n', encoding='utf8')
    script.chmod(0o755)
    monkeypatch.setenv('CXX', str(script))
    return lambda: log.read_text().count('\n') if log.exists() else 0


@pytest.fixture
def fresh(monkeypatch):
    """A process that has tried no tier yet."""
    monkeypatch.setattr(ops, '_attempts', {})
    monkeypatch.setattr(ops, '_backend', ops.backend())


def no_compiler(monkeypatch):
    monkeypatch.setenv('CXX', '/nowhere/c++')


def python(code, **environment):
    """Run code in a process of its own; returns its output and what it wrote to stderr."""
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


# Finding.

@pytest.mark.native
@pytest.mark.parametrize('damage', [
    lambda data: data[:len(data) // 2],
    lambda data: data[:5000] + b'?' + data[5001:],
    lambda data: b'',
], ids=['truncated', 'one byte', 'empty'])
def test_a_damaged_library_is_not_opened_but_compiled_again(copied, compiler, damage):
    whole = copied.read_bytes()
    copied.write_bytes(damage(whole))
    with pytest.raises(find.Unavailable, match='does not fit: (size|sha256) is'):
        find.verify('portable', copied.parent)
    assert find.find('portable') == copied and copied.read_bytes() == whole and compiler() == 1


@pytest.mark.native
@pytest.mark.parametrize('field', ['gluonquant', 'mxnet', 'key'])
def test_a_library_of_another_version_is_passed_over(library, cache, compiler, field, caplog):
    installed = put(library, find.INSTALLED)
    manifest = json.loads(installed.with_suffix('.json').read_text(encoding='utf8'))
    installed.with_suffix('.json').write_text(json.dumps({**manifest, field: '0'}), encoding='utf8')
    assert find.find('portable') == cache / '_portable.so'
    assert f'{installed} does not fit: {field} is {manifest[field]}, its manifest says 0' in caplog.text


@pytest.mark.native
def test_an_installed_library_comes_before_the_cache(library, copied):
    installed = put(library, find.INSTALLED)
    assert find.find('portable') == installed != copied


@pytest.mark.native
@pytest.mark.parametrize('text', ['', '[]', '{}', 'null'])
def test_a_broken_manifest_is_no_manifest(copied, text):
    copied.with_suffix('.json').write_text(text, encoding='utf8')
    with pytest.raises(find.Unavailable, match='or its manifest cannot be read: '):
        find.verify('portable', copied.parent)


@pytest.mark.native
def test_of_two_processes_one_compiles(cache, compiler):
    processes = [FORK.Process(target=find.find, args=('portable',)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert compiler() == 1


def test_without_library_and_compiler_the_reason_says_what_to_install(cache, monkeypatch):
    no_compiler(monkeypatch)
    with pytest.raises(find.Unavailable, match=r'there is no .*_portable.json; .* no C\+\+ compiler .* g\+\+'):
        find.find('portable')


def test_a_cache_that_cannot_be_written_is_named(cache, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('GLUONQUANT_CACHE', str(tmp_path / 'file'))
    with pytest.raises(find.Unavailable, match='cache cannot be used .*set GLUONQUANT_CACHE'):
        find.find('portable')


def test_a_failed_compilation_is_not_repeated(cache, tmp_path, monkeypatch, caplog):
    script = tmp_path / 'c++'
    script.write_text('#!/bin/sh\necho broken\nexit 1', encoding='utf8')
    script.chmod(0o755)
    monkeypatch.setenv('CXX', str(script))
    for _ in range(2):
        with pytest.raises(find.Unavailable, match='could not be compiled: read .*_portable.failed, and delete it'):
            find.find('portable')
        assert (cache / '_portable.failed').read_text().endswith(' returned 1:\nbroken')
        assert caplog.text.count('compiling the portable operators') == 1


def test_a_digest_is_kept_until_the_file_changes(cache, tmp_path, monkeypatch):
    file = tmp_path / 'file'
    file.write_bytes(b'one')
    first = find.digest(file)
    file.write_bytes(b'three')
    assert find.digest(file) == build.digest(file) != first
    monkeypatch.setattr(build, 'digest', None)
    assert find.digest(file) != first


# Opening.

def test_a_foreign_library_is_refused():
    with pytest.raises(find.Unavailable, match='this is no library of gluonquant: .*gluonquant_build'):
        load.open_library(_ctypes.__file__)


@pytest.mark.native
def test_a_library_that_says_another_version_is_refused(library, tmp_path):
    path, name = tmp_path / 'other.so', f'gluonquant {build.version()} for'.encode()
    path.write_bytes(library.read_bytes().replace(name, name.replace(b'.', b'9')))
    with pytest.raises(find.Unavailable, match="says that it is 'gluonquant 0919.*, not 'gluonquant 0.1"):
        load.open_library(path)


def quantized(x):
    """What a quantized layer makes of x: runs both operators."""
    net = gq.convert(mx.gluon.nn.Dense(8, in_units=x.shape[1]), bits=4, method='int8')
    net.initialize(mx.init.One())
    gq.calibrate(net, [x], batches=1)
    return net(x).asnumpy()


@pytest.mark.native
def test_a_forked_worker_computes_the_same(library):
    x = mx.nd.random.uniform(shape=(512, 256), ctx=mx.cpu())        # enough for several threads
    expected, (receive, send) = quantized(x), FORK.Pipe()
    process = FORK.Process(target=lambda: send.send(quantized(x)), daemon=True)
    process.start()
    assert receive.poll(60), 'the worker hangs'
    np.testing.assert_array_equal(receive.recv(), expected)
    process.join()


@pytest.mark.native
def test_loading_the_library_again_does_no_harm(library):
    out, _ = python(f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import mxnet as mx
from test_load import ops, quantized
x = mx.nd.ones((4, 8))
before = quantized(x)
mx.library.load(ops.backend().path.replace('_layout', '_portable'), verbose=False)
print((quantized(x) == before).all())''')
    assert out == 'True'


# Choosing.

def test_an_unknown_tier_is_refused_by_its_name():
    with pytest.raises(ValueError, match="no operators called 'fast': choose from pure, portable, layout, auto"):
        ops.use('fast')
    with pytest.raises(ValueError, match="no operators called 'auto': choose from pure, portable, layout$"):
        ops.require('auto')
    with pytest.raises(ValueError, match="no operator for role 'bias': choose from activation, weight"):
        ops.name('bias')


def test_an_unknown_tier_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv('GLUONQUANT_OPS', 'fast')
    with pytest.raises(ValueError, match="GLUONQUANT_OPS=fast: no operators called 'fast'"):
        ops._start()


@pytest.mark.native
def test_use_returns_the_tier_before(library, fresh):
    ops.use('pure')
    assert ops.use('portable') == 'pure' and ops.name('weight') == '_gluonquant_weight'
    assert ops.backend() == ('portable', 'it was asked for', str(library))
    assert ops.use('pure') == 'portable' and ops.name('weight') is None
    with pytest.raises(RuntimeError, match='portable operators are required, but the pure ones run: it was asked for'):
        ops.require()


def test_a_tier_that_cannot_run_changes_nothing(cache, fresh, monkeypatch):
    no_compiler(monkeypatch)
    before = ops.backend()
    with pytest.raises(RuntimeError, match='the portable operators cannot run here: there is no '):
        ops.use('portable')
    assert ops.backend() is before


@pytest.mark.native
def test_another_build_of_mxnet_is_no_reason_to_warn(library, fresh, monkeypatch):
    monkeypatch.setattr(build, 'LIBMXNET', 'another')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ops.use('auto')
    assert ops.backend().tier == 'portable' and 'libmxnet.so is not the build' in ops.backend().reason


@pytest.mark.native
def test_a_failing_self_test_warns_and_runs_the_portable_operators(library, fresh, monkeypatch):
    ops.use('auto')
    if ops.backend().tier != 'layout':
        pytest.skip(ops.backend().reason)
    monkeypatch.setattr(load.selftest, 'check', Mock(side_effect=AssertionError('3 is not 4')))
    ops._attempts.clear()
    with pytest.warns(RuntimeWarning, match='runs on its portable operators.*failed its self-test: 3 is not 4'):
        ops.use('auto')
    assert ops.backend().tier == 'portable'


def test_importing_without_library_and_compiler_warns_once_and_runs(tmp_path):
    out, err = python('from gluonquant import ops; print(ops.backend().tier)', CXX='/nowhere/c++',
                      GLUONQUANT_CACHE=str(tmp_path), GLUONQUANT_OPS='auto')
    assert out == 'pure'
    assert err.count('RuntimeWarning') == 1 and 'install g++' in err
