"""Gives compiled operators to MXNet."""
import ctypes
import os
import sys
from pathlib import Path

import mxnet as mx
from mxnet.base import _LIB, OpHandle, c_str, check_call, mx_uint
from mxnet.ndarray.register import _make_ndarray_function
from mxnet.symbol.register import _make_symbol_function

from . import build, selftest
from .find import Unavailable, Unsupported, digest, find

ROLES = ('activation', 'weight')
PREFIXES = {'portable': '_gluonquant_', 'layout': '_gluonquant_blocked_'}


def portable():
    """Register the operators of both tiers with MXNet, unless they are; returns the path of their library."""
    if sys.platform != 'linux':
        raise Unsupported('compiled operators are for Linux')
    if mx.runtime.Features().is_enabled('CUDA'):
        raise Unsupported('compiled operators are for CPUs, and this MXNet may be asked for a GPU')
    path = find('portable')
    if not hasattr(mx.nd._internal, PREFIXES['portable'] + ROLES[0]):
        open_library(path)
        try:
            check_call(_LIB.MXLoadLib(c_str(str(path)), mx_uint(0)))
        except mx.MXNetError as error:
            raise Unavailable(f'MXNet does not take {path}: {error}') from error
        for prefix in PREFIXES.values():
            for role in ROLES:
                _add_functions(prefix + role)
    return path


def _add_functions(name):
    """Make ``mx.nd._internal.<name>`` and ``mx.sym._internal.<name>``.

    ``mx.library.load`` makes those of all operators anew: that takes 0.6 s and replaces every function in ``mx.nd``.
    """
    handle = OpHandle()
    check_call(_LIB.NNGetOpHandle(c_str(name), ctypes.byref(handle)))
    setattr(mx.nd._internal, name, _make_ndarray_function(handle, name, name))
    setattr(mx.sym._internal, name, _make_symbol_function(handle, name, name))


def layout():
    """Make the blocked twins of the registered operators take oneDNN's arrays; returns the path of the library."""
    if digest(Path(mx.libinfo.find_lib_path()[0])) != build.LIBMXNET:
        raise Unsupported('this libmxnet.so is not the build that the layout tier was checked against')
    path = find('layout')
    library = open_library(path)
    library.gluonquant_layout_error.restype = ctypes.c_char_p
    if library.gluonquant_layout_enable():
        raise Unavailable(f'{path}: {library.gluonquant_layout_error().decode()}')
    try:
        selftest.check()
    except (AssertionError, RuntimeError) as error:
        raise Unavailable(f'{path} failed its self-test: {error}') from error
    return path


def open_library(path):
    """The shared object at ``path``, after it has said that it is of this version and for this MXNet."""
    expected = f'gluonquant {build.version()} for mxnet {mx.__version__}'
    try:
        library = ctypes.CDLL(str(path), os.RTLD_NOW | os.RTLD_LOCAL)
        library.gluonquant_build.restype = ctypes.c_char_p
        answer = library.gluonquant_build().decode()
    except (OSError, AttributeError) as error:
        raise Unavailable(f'this is no library of gluonquant: {error}') from error
    if answer != expected:
        raise Unavailable(f'{path} says that it is {answer!r}, not {expected!r}')
    return library
