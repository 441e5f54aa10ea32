"""What the operators are compiled from and with, and what a failure says."""
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gluonquant.ops import build, find

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(script) makes $CXX a shell script, which finds the path of what it is to write in $target."""
    def install(script):
        path = tmp_path / 'c++'
        path.write_text(f'#!/bin/sh\nfor target; do :; done\n{script}\n', encoding='utf8')
        path.chmod(0o755)
        monkeypatch.setenv('CXX', str(path))
    return install


def words(name, **options):
    compiles, link = build.commands(name, Path('work'), ['c++'], **options)
    return [word for command in [*compiles, link] for word in command]


def test_the_compiler_is_the_chosen_one(monkeypatch):
    monkeypatch.setenv('CXX', f'{sys.executable} -x')
    assert build.find_compiler() == [sys.executable, '-x']
    monkeypatch.setenv('CXX', '/nowhere/c++')
    assert build.find_compiler() is None


def test_without_a_compiler_there_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert build.find_compiler() is None
    with pytest.raises(build.BuildError, match='there is no C\\+\\+ compiler'):
        build.build('portable', tmp_path)


@pytest.mark.parametrize('name', ['portable', 'layout'])
def test_every_source_is_compiled_and_openmp_is_not_linked(name):
    other = {'portable': 'layout.cc', 'layout': 'operators.cc'}[name]
    compiled = {Path(word).name for word in words(name) if word.endswith('.cc')}
    assert compiled - {'lib_api.cc'} == {path.name for path in build.SOURCES.glob('*.cc')} - {other}
    assert not [word for word in words(name) if 'omp' in word.replace('-fno-omit-frame-pointer', '')]


def test_kernels_are_compiled_for_each_instruction_set():
    compiles, _ = build.commands('portable', Path('work'), ['c++'])
    kernels = [command for command in compiles if any(word.endswith('kernels.cc') for word in command)]
    assert len(kernels) == (3 if build.X86 else 1)
    assert '-DGLUONQUANT_ISA=baseline' in kernels[0] and not [word for word in kernels[0] if word.startswith('-m')]


def test_only_the_layout_library_needs_mxnet():
    assert '-l:libmxnet.so' in words('layout') and '-D_GLIBCXX_USE_CXX11_ABI=0' in words('layout')
    assert '-l:libmxnet.so' not in words('portable') and '-D_GLIBCXX_USE_CXX11_ABI=0' not in words('portable')


def test_an_edited_source_is_another_library(tmp_path, monkeypatch):
    (tmp_path / 'kernels.cc').write_text('one', encoding='utf8')
    monkeypatch.setattr(build, 'SOURCES', tmp_path)
    before = build.key()
    (tmp_path / 'kernels.cc').write_text('two', encoding='utf8')
    assert build.key() != before


def test_a_failure_tells_the_command_and_the_end_of_the_output(compiler, tmp_path):
    compiler('seq 100; exit 3')
    with pytest.raises(build.BuildError) as error:
        build.build('portable', tmp_path)
    assert '/c++ -std=c++14 ' in str(error.value) and ' returned 3:\n81\n82\n' in str(error.value)


def test_a_failure_leaves_what_was_there(compiler, tmp_path):
    folder = tmp_path / 'folder'
    compiler('echo binary > $target')
    build.build('portable', folder)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    compiler('exit 1')
    with pytest.raises(build.BuildError):
        build.build('portable', folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    assert set(before) == {'_portable.so', '_portable.json'}


@pytest.mark.native
def test_the_portable_library_needs_only_the_system_and_shows_only_its_interface():
    try:
        path = find.find('portable')
    except find.Unavailable as reason:
        pytest.skip(f'no library: {reason}')
    dynamic = subprocess.run(['readelf', '--dynamic', path], stdout=subprocess.PIPE, text=True, check=True).stdout
    needed = {line.split('[')[1].split('.so')[0] for line in dynamic.splitlines() if '(NEEDED)' in line}
    assert needed <= {'libstdc++', 'libgcc_s', 'libm', 'libdl', 'libc', 'ld-linux-x86-64', 'ld-linux-aarch64'}
    shown = subprocess.run(['nm', '-D', '--defined-only', path], stdout=subprocess.PIPE, text=True, check=True).stdout
    names = [line.split()[-1] for line in shown.splitlines()]
    assert {'initialize', '_opRegSize', 'gluonquant_build'} <= set(names)
    assert not [name for name in names if name.startswith('_Z')]


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.parametrize('name', ['portable', 'layout'])
def test_the_sanitizers_compile(name, tmp_path):
    if build.find_compiler() is None or name not in build.supported():
        pytest.skip(f'no compiler, or {name} is not for this MXNet')
    build.build(name, tmp_path, sanitize=True)
    symbols = subprocess.run(['nm', '-D', tmp_path / f'_{name}.so'], stdout=subprocess.PIPE, text=True, check=True)
    assert '__asan_init' in symbols.stdout and '__ubsan' in symbols.stdout


@pytest.mark.slow
@pytest.mark.native
def test_a_wheel_carries_what_was_compiled_and_names_the_platform(tmp_path):
    pytest.importorskip('setuptools.command.bdist_wheel', reason='needs setuptools 70.1 or newer')
    if build.find_compiler() is None:
        pytest.skip('no compiler')
    checkout = tmp_path / 'checkout'        # setuptools leaves files in it
    shutil.copytree(ROOT / 'gluonquant', checkout / 'gluonquant')
    for name in ('setup.py', 'setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, checkout)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, checkout]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wheel, = tmp_path.glob('*.whl')
    assert wheel.name.split('-')[2:4] == ['py3', 'none'] and wheel.stem.endswith('linux_' + build.platform.machine())
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f'gluonquant/ops/_{name}.{end}' for name in build.supported() for end in ('so', 'json')} <= names
    assert 'gluonquant/ops/src/kernels.cc' in names
