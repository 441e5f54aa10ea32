"""Checkpoints that are either complete or not there.

A checkpoint is a folder: it is written under another name, flushed to the disk and renamed at the end, and a
rename is atomic. A run killed while it writes therefore leaves the checkpoint before, which `latest` finds.
"""
import json
import os
import re
import shutil

STATE_FILE = 'state.json'
_NAME = re.compile(r'\d+-\w+')


def write(directory, stage, epoch, state, writers, keep=2):
    """Write one checkpoint and delete all but the newest `keep`.

    Parameters
    ----------
    directory : str, the folder of this run's checkpoints.
    stage : str;  epoch : int, for its name.
    state : dict, JSON-serializable; `state['step']` is an integer that grows from one checkpoint to the next.
    writers : dict of file name -> function that writes the file at the path it is given.
    """
    target = os.path.join(directory, f"{state['step']:05d}-{stage}_{epoch}")
    partial = target + '.partial'
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    for name, writer in writers.items():
        writer(os.path.join(partial, name))
    with open(os.path.join(partial, STATE_FILE), 'w') as file:
        json.dump(state, file, indent=1)
    for name in os.listdir(partial):
        _flush(os.path.join(partial, name))
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    _flush(directory)
    for path in complete(directory)[:-keep]:
        shutil.rmtree(path)


def complete(directory):
    """Paths of the complete checkpoints in `directory`, oldest first."""
    names = os.listdir(directory) if os.path.isdir(directory) else []
    names = [name for name in names if _NAME.fullmatch(name)]
    return [os.path.join(directory, name) for name in sorted(names, key=lambda name: int(name.split('-')[0]))]


def latest(directory):
    """Path and state of the newest complete checkpoint, or (None, None)."""
    paths = complete(directory)
    if not paths:
        return None, None
    with open(os.path.join(paths[-1], STATE_FILE)) as file:
        return paths[-1], json.load(file)


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
