"""The package reads from left to right: a module imports only from modules before it."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gluonquant

PACKAGE = Path(gluonquant.__file__).parent
ORDER = ['integer', 'files', 'registry', 'table', 'grid', 'config', 'ops', 'symbol_graph', 'trace', 'functional',
         'batchnorm', 'observers', 'quantizers', 'layers', 'plan', 'fuse', 'calibrate', 'ranges', 'graph', 'convert',
         'summary', 'fold', 'switches', 'reestimate', 'training', 'distributed', 'checkpoint', 'torch_weights',
         'finalize', 'export', 'packed', 'mxnet_int8', 'verify']
FILES = sorted(path for path in PACKAGE.rglob('*.py') if path.parent != PACKAGE or path.name != '__init__.py')


def part(path):
    """The top-level part of the package that ``path`` belongs to."""
    return path.relative_to(PACKAGE).parts[0].replace('.py', '')


def imported_parts(path):
    """Top-level parts of the package that the file imports, relative imports resolved."""
    package = ['gluonquant', *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf8'))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[:len(package) - node.level + 1]
            names = [[*base, *node.module.split('.')]] if node.module else [[*base, a.name] for a in node.names]
            yield from (name[1] for name in names if len(name) > 1)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(module.split('.')[0] == 'gluonquant' for module in modules), 'import relatively'


def test_every_part_has_its_place():
    assert {part(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path):
    mine = ORDER.index(part(path))
    later = {name for name in imported_parts(path) if ORDER.index(name) > mine}
    assert not later, f'{path.name} imports {later}, which come after it'


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_say_what_they_are_for_and_print_nothing(path):
    tree = ast.parse(path.read_text(encoding='utf8'))
    assert ast.get_docstring(tree)
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert 'print' not in calls


def test_grid_config_and_registry_do_not_need_mxnet():
    for name in ('grid', 'config', 'registry'):
        assert 'mxnet' not in (PACKAGE / f'{name}.py').read_text(encoding='utf8')


def test_what_is_deployed_runs_without_mxnet():
    code = 'import gluonquant.integer, sys; assert not {"mxnet", "onnx"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_functions_stay_in_front_of_modules_of_their_name():
    code = ('import gluonquant.calibrate, gluonquant.finalize, gluonquant as gq; from gluonquant import fold; '
            'assert all(map(callable, (gq.calibrate, gq.finalize, gq.convert, gq.summary, fold)))')
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('order', ['gluonquant, mxnet', 'mxnet, gluonquant'])
def test_operators_are_loaded_with_mxnet(order):
    code = f'import {order}; import sys; assert "gluonquant.ops" in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_public_names_exist_and_are_documented():
    for name in gluonquant.__all__:
        assert getattr(gluonquant, name).__doc__, name
