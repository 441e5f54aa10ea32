"""Compiles the fused operators into the package; everything else about it stands in setup.cfg.

Without a C++ compiler the package is installed without them, and compiles them at its first import on a machine that
has one. The operators do not use Python's C interface: a wheel that has them is for a platform, not for a Python.
"""
import importlib.util
import logging
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

spec = importlib.util.spec_from_file_location('operators', Path(__file__).parent / 'gluonquant/ops/build.py')
operators = importlib.util.module_from_spec(spec)
spec.loader.exec_module(operators)


class BuildPackage(build_py):
    """Copies the package, then compiles into the copy; a checkout stays free of binaries."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.compile_operators(Path(self.build_lib, 'gluonquant/ops'))

    def compile_operators(self, folder):
        for old in [*folder.glob('_*.so'), *folder.glob('_*.json')]:
            old.unlink()
        names = operators.supported()
        if not names:
            logging.warning('the operators are not compiled: this takes Linux and MXNet')
        for name in names:
            try:
                operators.build(name, folder)
                self.distribution.has_ext_modules = lambda: True
            except operators.BuildError as error:
                logging.warning('the %s operators are left out: %s', name, error)


class BuildWheel(bdist_wheel):
    """Names the platform if something was compiled, and any Python 3."""

    def run(self):
        self.run_command('build')
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self):
        return ('py3', 'none', super().get_tag()[2])


setup(cmdclass={'build_py': BuildPackage, 'bdist_wheel': BuildWheel})
