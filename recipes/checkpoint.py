"""Checkpoints that are either complete or not there.

A checkpoint is a folder: it is written under another name, flushed to the disk and renamed at the end, and a
rename is atomic. A run killed while it writes therefore leaves the checkpoint before, which `latest` finds.
"""
import json
import logging
import os
import re
import shutil

import mxnet as mx

import report
from options import option

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


def start_or_resume(args, folder, free_options, new, workers=None):
    """The state to continue from: that of the newest checkpoint in `folder`, or that of a new run.

    Parameters
    ----------
    args : Namespace, whose `resume`, `overwrite` and `save_dir` are heeded.
    free_options : set of str, names of options that may have other values in a continuation.
    new : dict, what the state of a new run has beside stage, epoch, step, history, seconds, finished, options, threads
        and workers.
    workers : Workers, optional, of a job. They must find the same checkpoint.
    """
    options = {name: value for name, value in vars(args).items() if name not in free_options}
    count, first = (workers.count, workers.first) if workers else (1, True)
    path, state = latest(folder)
    if workers and not workers.same(state['step'] if state else -1):
        raise SystemExit(f'the workers find different checkpoints in {args.save_dir}. Pass a --save-dir that all of '
                         'them share.')
    if args.resume and state:
        if state['workers'] != count:
            raise SystemExit(f"the run in {args.save_dir} was started with {state['workers']} workers, on which "
                             'batches and schedule depend. Continue it with as many: recipes/launch.py -n '
                             f"{state['workers']}.")
        changed = {name for name in options if options[name] != state['options'].get(name)}
        if changed:
            name = min(changed)
            raise SystemExit(f"{option(name)} is {options[name]}, but the run in {args.save_dir} was started with "
                             f"{state['options'].get(name)}. Continue it with the same options, or start another run "
                             'with another --save-dir.')
        if state['threads'] != report.threads():
            logging.warning('the run was started with %s and continues with %s: its last bits may differ',
                            state['threads'], report.threads())
        logging.info('continuing from %s', path)
        return {**state, 'path': path}
    if state and not state['finished'] and not args.overwrite:
        raise SystemExit(f"{args.save_dir} holds an unfinished run ({state['stage']}, epoch {state['epoch']}). Pass "
                         '--resume to continue it, --overwrite to discard it, or another --save-dir.')
    if args.resume:
        logging.info('no checkpoint in %s: starting from the beginning', folder)
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    return {'stage': 'float', 'epoch': 0, 'step': 0, 'history': [], 'seconds': 0.0, 'finished': False,
            'options': options, 'threads': report.threads(), 'workers': count, 'path': None, **new}


def save_float(net, path):
    """As net.save_parameters, which with several contexts saves a rounded mean of equal values."""
    mx.nd.waitall()
    mx.nd.save(path, {name: parameter.list_data()[0].copyto(mx.cpu())
                      for name, parameter in net._collect_params_with_prefix().items()})


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
