"""What a run leaves behind: a table, results as JSON, and a picture of its curves."""
import json
import os
import platform
import subprocess
from importlib import metadata

import matplotlib

import gluonquant as gq

matplotlib.use('Agg')           # before pyplot, which would look for a display
import matplotlib.pyplot as plt  # noqa: E402


def versions():
    """Versions of everything the numbers depend on, and the revision of this checkout if git knows it."""
    # The installed distribution is asked, because gluoncv 0.10.5.post0 calls itself 0.11.0.
    found = {'python': platform.python_version(), 'gluonquant': gq.__version__,
             **{name: metadata.version(name) for name in ('mxnet', 'numpy', 'gluoncv')}}
    command = ['git', '-C', os.path.dirname(os.path.abspath(__file__)), 'describe', '--always', '--dirty']
    try:
        found['git'] = subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found['git'] = None
    return found


def threads():
    """What MXNet takes its number of threads from; sums, and so the last bits of results, depend on it."""
    return {'cpus': os.cpu_count(), 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS')}


class Board:
    """Writes TensorBoard's scalars into `directory`: curves, and every quantizer's range and share of clipped values.

    Points of `first` and later epochs that an interrupted run has left are discarded.
    """
    def __init__(self, directory, first):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise SystemExit('--tensorboard needs tensorboardX: pip install tensorboardX, or leave the option out.'
                             ) from None
        self._writer = SummaryWriter(directory, purge_step=first)

    def note(self, epoch, row, net, batches):
        """Add the epoch that `row` of the history is about; `batches` show how much is clipped."""
        scalars = {f"{row['stage']}/{name}": row[name] for name in ('loss', 'accuracy', 'val_accuracy', 'images_per_s')}
        scalars[f"{row['stage']}/lr"] = row['lr_last']
        if row['stage'] == 'quantized':
            for path, (low, high) in gq.ranges(net).items():
                scalars.update({f'low/{path}': low, f'high/{path}': high})
            scalars.update({f'clipped/{path}': share for path, share in gq.clipped(net, batches).items()})
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()


def table(title, accuracy, sizes, measure='top-1'):
    """Lines of text: one row per stage in `accuracy` (dict stage -> `measure` in 0..1), with its size.

    `sizes` maps 'float' and 'quantized' to bytes.
    """
    rows = [title, f"{'':18}{measure:>8}{'size':>12}"]
    for stage, value in accuracy.items():
        size = sizes['float' if stage == 'float' else 'quantized']
        ratio = '' if stage == 'float' else f"   {sizes['float'] / size:.1f}x smaller"
        rows.append(f'{stage:18}{value:8.4f}{size / 1000:9,.1f} kB{ratio}')
    return '\n'.join(rows)


def write_json(path, results):
    """Write `results`, replacing an older file only when the new one is complete."""
    with open(path + '.partial', 'w') as file:
        json.dump(results, file, indent=1)
    os.replace(path + '.partial', path)


def plot(path, history, found, title, losses, scores, measure='top-1'):
    """Two panels over the epochs of both stages: training losses; `measure` in percent.

    Parameters
    ----------
    history : list of dict, a row for each epoch; a score may be None in some of them.
    found : dict of stage -> `measure` in 0..1: 'float' and, where it was measured, 'calibrated only'.
    losses, scores : dict of what a row calls it -> label of its line.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axes, lines, factor in ((left, losses, 1), (right, scores, 100)):
        for name, label in lines.items():
            points = [(i, factor * row[name]) for i, row in enumerate(history, 1) if row[name] is not None]
            axes.plot(*zip(*points or [((), ())]), marker='.', label=label)
    if 'calibrated only' in found:
        start = sum(row['stage'] == 'float' for row in history) + 0.5
        for axes in (left, right):
            axes.axvline(start, color='gray', linestyle=':')
        right.plot([start], [100 * found['calibrated only']], 'rx', label='calibrated only')
    right.axhline(100 * found['float'], color='gray', linewidth=0.8, label='float network')
    stages = dict.fromkeys(row['stage'] for row in history)
    left.set(xlabel='epoch', ylabel='training loss', title=', then '.join(stages))
    right.set(xlabel='epoch', ylabel=f'{measure}, %', title=title)
    for name in losses:
        values = [row[name] for row in history if row[name] > 0]
        if values and max(values) > 4 * min(values):
            left.set_yscale('log')
    if len(losses) > 1:
        left.legend()
    right.legend()
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.savefig(path, dpi=110)
    plt.close(figure)
