"""Compiles the fused operators: what is compiled, with which flags, and how the result is written.

setup.py runs this file by its path, so it imports neither the package nor mxnet. A library ``_name.so`` stands beside
its manifest ``_name.json``, which says what it was made from and what it must look like.
"""
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = FOLDER / 'src'
X86 = platform.machine() == 'x86_64'

# The one libmxnet.so that layout.cc was checked against: mxnet 1.9.1 from PyPI, Linux, x86-64.
LIBMXNET = 'b4e7f881e385e342fd6b8316b34fde03ccaaf74d649999de2333ee5b4d8f2ba0'

# Every fake quantizer is exact to the bit: no contraction to fused multiply-adds, no reordering. OpenMP is missing on
# purpose: parallel.h calls the runtime that MXNet brings.
FLAGS = ['-std=c++14', '-O3', '-fPIC', '-ffp-contract=off', '-fno-math-errno'] + ['-DGLUONQUANT_X86=1'] * X86
SANITIZE = ['-O1', '-g', '-fsanitize=address,undefined', '-fno-omit-frame-pointer']
INSTRUCTION_SETS = {'baseline': []}
if X86:
    INSTRUCTION_SETS.update(avx2=['-mavx2'], avx512=['-mavx512f', '-mavx512dq', '-mavx512bw', '-mavx512vl'])

# What MXNet's wheel was built with, as far as it changes the classes in MXNet's headers.
LAYOUT_FLAGS = ['-D_GLIBCXX_USE_CXX11_ABI=0', '-DMXNET_USE_MKLDNN=1', '-DMXNET_USE_CUDA=0', '-DMXNET_USE_OPENCV=0',
                '-DMSHADOW_USE_CUDA=0', '-DMSHADOW_USE_MKL=0', '-DMSHADOW_USE_CBLAS=0', '-DMSHADOW_USE_F16C=0',
                '-fno-access-control', '-w']

# All other symbols stay inside: a second library of operators in the process shares none of MXNet's registries.
EXPORTS = '{ global: initialize; _op*; _part*; _pass*; _msg*; gluonquant_*; local: *; };'


class BuildError(RuntimeError):
    """Compiling failed; the text carries the command and the end of the compiler's output."""


def find_compiler():
    """The C++ compiler as a list of words, $CXX or else g++ or c++; None where there is none."""
    chosen = shlex.split(os.environ.get('CXX', ''))
    candidates = [chosen] if chosen else [['g++'], ['c++']]
    return next((words for words in candidates if shutil.which(words[0])), None)


def find_mxnet():
    """Folder and version of the installed MXNet, which is not imported; (None, None) where there is none."""
    spec = importlib.util.find_spec('mxnet')
    if spec is None or not spec.submodule_search_locations:
        return None, None
    folder = Path(spec.submodule_search_locations[0])
    return folder, _version(folder / 'libinfo.py')


def _version(path):
    return re.search(r'^__version__ = [\'"](.+)[\'"]', path.read_text(encoding='utf8'), re.MULTILINE)[1]


def version():
    """gluonquant's version, which setup.py needs before the package can be imported."""
    return _version(FOLDER.parent / '__init__.py')


def digest(path):
    """SHA-256 of a file."""
    state = hashlib.sha256()
    with open(path, 'rb') as file:
        for chunk in iter(lambda: file.read(1 << 20), b''):
            state.update(chunk)
    return state.hexdigest()


def key():
    """SHA-256 of all that decides what a library is: this file, the sources, versions and machine."""
    files = [Path(__file__), *(path for path in sorted(SOURCES.iterdir()) if path.suffix in ('.cc', '.h'))]
    parts = [version(), find_mxnet()[1], platform.machine(), *(f'{path.name} {digest(path)}' for path in files)]
    return hashlib.sha256('\n'.join(map(str, parts)).encode()).hexdigest()


def manifest(name, path):
    """What the manifest of the library at ``path`` has to say, for it to be the library ``name`` of this package."""
    facts = {'gluonquant': version(), 'mxnet': find_mxnet()[1], 'key': key()}
    if name == 'layout':
        facts['libmxnet'] = LIBMXNET
    return {**facts, 'size': path.stat().st_size, 'sha256': digest(path)}


def commands(name, work, compiler, sanitize=False):
    """The commands that make ``work/_name.so``: a list of those that compile, and the one that links them."""
    mxnet, mxnet_version = find_mxnet()
    flags = [*FLAGS, f'-DGLUONQUANT_VERSION="{version()}"', f'-DGLUONQUANT_MXNET="{mxnet_version}"',
             f'-I{mxnet / "include"}']
    link = ['-shared', f'-Wl,--version-script={work / "exports"}']
    if name == 'layout':
        flags += [*LAYOUT_FLAGS, f'-I{mxnet / "include/mkldnn"}']
        link += [f'-L{mxnet}', '-l:libmxnet.so']
    if sanitize:
        flags += SANITIZE
        link += SANITIZE
    else:
        link += ['-Wl,-z,defs']       # a missing symbol fails here instead of when the library is loaded
    units = list(_units(name, mxnet))
    objects = [str(work / f'{number}.o') for number in range(len(units))]
    compiles = [[*compiler, *flags, *more, '-c', str(source), '-o', target]
                for (source, more), target in zip(units, objects)]
    return compiles, [*compiler, *objects, *link, '-ldl', '-lm', '-o', str(work / f'_{name}.so')]


def _units(name, mxnet):
    """Source and own flags of every object file: kernels, what both libraries share, the library's interface."""
    for isa, flags in INSTRUCTION_SETS.items():
        yield SOURCES / 'kernels.cc', [f'-DGLUONQUANT_ISA={isa}', *flags]
    other = {'portable': 'layout.cc', 'layout': 'operators.cc'}[name]
    for source in sorted(SOURCES.glob('*.cc')):
        if source.name not in ('kernels.cc', other):
            yield source, []
    if name == 'portable':
        yield mxnet / 'src/lib_api.cc', ['-D_opRegSize=registered_operators']     # see operators.cc


def supported():
    """Names of the libraries that can run with the installed MXNet."""
    mxnet, _ = find_mxnet()
    if sys.platform != 'linux' or mxnet is None:
        return []
    return ['portable'] + ['layout'] * (digest(mxnet / 'libmxnet.so') == LIBMXNET)


def build(name, folder, sanitize=False):
    """Compile the library 'portable' or 'layout' into ``folder``; it and its manifest are replaced when all is done.

    ``sanitize``: with the address and undefined-behaviour sanitizers. Such a library runs in a process that was
    started with ``LD_PRELOAD=libasan.so``; built into ``find.cache_folder()`` it is found by the package as any other.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError('there is no C++ compiler (looked for $CXX, g++ and c++)')
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        work = Path(work)
        (work / 'exports').write_text(EXPORTS, encoding='utf8')
        compiles, link = commands(name, work, compiler, sanitize)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compiles))
        _run(link)
        library = work / f'_{name}.so'
        facts = json.dumps(manifest(name, library), indent=1)
        library.with_suffix('.json').write_text(facts, encoding='utf8')
        for path in (library, library.with_suffix('.json')):
            os.replace(path, folder / path.name)


def _run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
    if done.returncode:
        end = '\n'.join(done.stdout.splitlines()[-20:])
        raise BuildError(f'{shlex.join(command)} returned {done.returncode}:\n{end}')
