"""Finds a compiled library: the one installed with the package, the one in the cache, or one compiled into it now.

Whatever is found is compared with its manifest before anyone opens it, because the loader can kill the process over
a truncated file.
"""
import fcntl
import hashlib
import json
import logging
import os
from pathlib import Path

from . import build

INSTALLED = build.FOLDER

logger = logging.getLogger(__name__)


class Unavailable(RuntimeError):
    """A library that cannot run here; the text is the reason."""


class Unsupported(Unavailable):
    """A library that was never meant to run here: there is nothing to repair."""


def find(name):
    """Path of the library 'portable' or 'layout', which agrees with its manifest."""
    reasons = []
    try:
        for folder in (INSTALLED, cache_folder()):
            try:
                return verify(name, folder)
            except Unavailable as reason:
                reasons.append(str(reason))
        return _compile(name, cache_folder(), '; '.join(reasons))
    except OSError as error:
        reasons.append(f'the cache cannot be used ({error}), set GLUONQUANT_CACHE to a folder that can be written')
        raise Unavailable('; '.join(reasons)) from error


def verify(name, folder):
    """Path of the library in ``folder``, unless it differs from its manifest or that from this package."""
    path = folder / f'_{name}.so'
    try:
        said = json.loads(path.with_suffix('.json').read_text(encoding='utf8'))
        facts = build.manifest(name, path)
        wrong = [field for field in facts if said[field] != facts[field]]
    except FileNotFoundError as error:
        raise Unavailable(f'there is no {error.filename}') from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Unavailable(f'{path} or its manifest cannot be read: {error!r}') from error
    if wrong:
        field = wrong[0]
        raise Unavailable(f'{path} does not fit: {field} is {facts[field]}, its manifest says {said[field]}')
    return path


def _compile(name, folder, reason):
    """Compile into ``folder``, one process at a time: those that waited find the library there."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = folder / f'_{name}.failed'
    with open(folder / 'lock', 'w', encoding='utf8') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return verify(name, folder)
        except Unavailable:
            pass
        if not failed.exists():     # else trying again in every process would cost each of them the time
            if build.find_compiler() is None:
                raise Unavailable(f'{reason}; and there is no C++ compiler to make it: install g++, or set CXX')
            logger.warning('compiling the %s operators, which takes some ten seconds, once (%s)', name, reason)
            try:
                build.build(name, folder)
                return verify(name, folder)
            except build.BuildError as error:
                logger.warning('%s', error)
                failed.write_text(str(error), encoding='utf8')
        raise Unavailable(f'the {name} operators could not be compiled: read {failed}, and delete it to try again')


def cache_folder():
    """Where libraries of these sources, for this MXNet and this C library, are cached."""
    return _cache() / f'{build.key()[:16]}-{os.confstr("CS_GNU_LIBC_VERSION").replace(" ", "-")}'


def _cache():
    chosen = os.environ.get('GLUONQUANT_CACHE')
    if chosen:
        return Path(chosen).absolute()
    parent = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    if not os.path.isabs(parent):       # a user without a home
        raise OSError(f'{parent} is no absolute path')
    return Path(parent, 'gluonquant')


def digest(path):
    """SHA-256 of a large file, up to half a second for libmxnet.so; kept in the cache while its size and time stand."""
    stat = path.stat()
    identity = hashlib.sha256(f'{path} {stat.st_size} {stat.st_mtime_ns}'.encode()).hexdigest()
    try:
        kept = _cache() / f'{path.name}-{identity[:16]}'
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            new = kept.with_name(f'{kept.name}.{os.getpid()}')
            new.write_text(build.digest(path), encoding='ascii')
            os.replace(new, kept)
        return kept.read_text(encoding='ascii')
    except OSError:
        return build.digest(path)
