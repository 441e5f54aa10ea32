"""What the benchmarks share: what they say about the machine, fresh processes, and the file of figures."""
import json
import multiprocessing
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mxnet as mx

import gluonquant as gq


def machine(threads):
    """What the figures were measured on; ``threads`` is one number or a list."""
    lines = Path('/proc/cpuinfo').read_text(encoding='utf8').splitlines()
    model = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), 'unknown')
    return {'cpu': model, 'cpus': os.cpu_count(), 'threads': threads, 'python': platform.python_version(),
            'mxnet': mx.__version__, 'gluonquant': gq.__version__, 'operators': gq.ops.backend().tier}


def tiers():
    """The tiers of operators that run here, slowest first."""
    return list(gq.ops.TIERS[:gq.ops.TIERS.index(gq.ops.backend().tier) + 1])


def in_own_process(environment, function, *args):
    """``function(*args)`` in a fresh process with these environment variables, which MXNet reads when it starts."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def save(path, **figures):
    """Write the figures as JSON; ``path`` may be None."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=1) + '\n', encoding='utf8')
