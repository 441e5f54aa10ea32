"""Several workers on this machine: they train the net that one would, and none hangs when one dies."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import cluster
import launch
from tiny import write_folder
from workers import Workers

ROOT = Path(__file__).parents[2]
JOB = [sys.executable, str(ROOT / 'recipes' / 'launch.py'), '-n', '2']
EPOCHS = 8
OPTIONS = ['--num-epochs', EPOCHS, '--float-epochs', 1, '--batch-size', 4, '--calibration-batches', 1,
           '--float-lr', 0.01, '--lr', 0.01]


def start(command):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'}
    return subprocess.Popen([str(word) for word in command], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finished(command):
    process = start(command)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    return text


def recipe(images, out, *more):
    return [*JOB, sys.executable, ROOT / 'recipes' / 'image_classification.py', '--kvstore', 'dist_sync',
            '--data-dir', images, '--save-dir', out, *OPTIONS, *more]


@pytest.mark.parametrize('method', ['lsq', pytest.param('pact', marks=pytest.mark.slow),
                                    pytest.param('int8', marks=pytest.mark.slow)])
def test_two_workers_follow_one_with_the_joint_batch_for_20_steps(tmp_path, method):
    script = [sys.executable, Path(__file__).parent / 'joint_batch.py']
    jobs = [start([*JOB, *script, tmp_path / 'two', method]), start([*script, tmp_path / 'one', method])]
    for job in jobs:
        text, _ = job.communicate(timeout=120)
        assert job.returncode == 0, text
    one, *two = (dict(np.load(tmp_path / f'{name}.npz')) for name in ('one.0', 'two.0', 'two.1'))
    for name, value in one.items():
        np.testing.assert_array_equal(two[0][name], two[1][name], err_msg=name)
        np.testing.assert_allclose(two[0][name], value, rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """(images, folder) of a job that nobody disturbs."""
    folder = tmp_path_factory.mktemp('straight')
    images = write_folder(folder / 'images', train=32)
    finished(recipe(images, folder / 'run'))
    return images, folder / 'run'


def test_one_worker_writes_and_all_validate_every_image_once(straight):
    _, out = straight
    with open(out / 'results.json') as file:
        found = json.load(file)
    assert len(found['history']) == 1 + EPOCHS and 0 <= found['accuracy']['fine-tuned'] * 10 <= 10
    assert (found['accuracy']['fine-tuned'] * 10) % 1 == pytest.approx(0, abs=1e-9)     # of 10 images
    assert (out / 'train.log').exists() and (out / 'train.log.1').exists()


def test_a_killed_worker_ends_the_job_with_a_clear_error_and_it_resumes_to_the_same_bits(straight, tmp_path):
    images, expected = straight
    job = start(recipe(images, tmp_path))
    lines = []
    for line in job.stdout:
        lines.append(line)
        if 'quantized epoch 2/' in line:
            break
    listing = subprocess.run(['ps', '-eo', 'pid,ppid'], capture_output=True, text=True).stdout.split()[2:]
    children = [int(pid) for pid, parent in zip(listing[::2], listing[1::2]) if int(parent) == job.pid]
    workers = [pid for pid in children if b'DMLC_ROLE=worker' in Path(f'/proc/{pid}/environ').read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    killed = time.time()
    text = ''.join(lines) + job.communicate(timeout=60)[0]
    assert job.returncode != 0 and time.time() - killed < 60
    assert re.search(rf'worker ends: lost worker \d \(process {workers[-1]} on .*--resume', text), text
    assert not (tmp_path / 'results.json').exists()

    text = finished(recipe(images, tmp_path, '--resume'))
    assert int(re.search(r'continuing from .*quantized_(\d)', text)[1]) >= 2
    first, second = (np.load(folder / 'quantized.params') for folder in (tmp_path, expected))
    for name in first.files:
        assert first[name].tobytes() == second[name].tobytes(), name


def test_a_worker_that_fails_ends_the_job(straight, tmp_path):
    script = tmp_path / 'fails.py'
    script.write_text(textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(ROOT / 'recipes')!r}, {str(ROOT)!r}]
        import cluster
        member = cluster.join()
        from workers import Workers

        def main():
            workers = Workers('dist_sync', member=member)
            workers.total(1)
            if workers.rank == 1:
                raise ValueError('image 7 cannot be decoded')
            workers.total(1)
        cluster.run(main)
    """))
    job = start([*JOB, sys.executable, script])
    text = job.communicate(timeout=60)[0]
    assert job.returncode not in (0, None) and 'image 7 cannot be decoded' in text and 'lost worker 1' in text


def test_ctrl_c_ends_the_job(straight, tmp_path):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'}
    heeded = partial(signal.signal, signal.SIGINT, signal.default_int_handler)     # jobs in the background ignore it
    job = subprocess.Popen([str(word) for word in recipe(straight[0], tmp_path, '--num-epochs', 200)], env=environment,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                           preexec_fn=heeded)
    lines = []
    for line in job.stdout:
        lines.append(line)
        if 'quantized epoch 2/' in line:
            os.killpg(job.pid, signal.SIGINT)
            break
    text = ''.join(lines) + job.communicate(timeout=40)[0]
    assert job.returncode != 0 and 'continue all workers with --resume' in text, text


def test_another_number_of_workers_does_not_resume(straight, tmp_path):
    shutil.copytree(straight[1], tmp_path / 'run')
    words = [str(word) for word in recipe(straight[0], tmp_path / 'run', '--resume', '--kvstore', 'device')]
    process = subprocess.run(words[len(JOB):], capture_output=True, text=True,
                             env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert process.returncode != 0 and 'was started with 2 workers' in process.stderr


def test_a_worker_that_never_comes_is_missed(monkeypatch):
    ended = threading.Event()
    reasons = []
    monkeypatch.setattr(cluster, 'ARRIVAL', 0.3)
    monkeypatch.setattr(cluster, '_give_up', lambda reason: (reasons.append(reason), ended.set()))
    watch = cluster.Watch(0, workers=1, servers=1)
    with socket.create_connection(('127.0.0.1', watch._server.getsockname()[1])) as connection:
        connection.sendall(b'worker (process 1)\n')
        assert ended.wait(10) and reasons == ['only 1 of 2 workers and servers came within 0.3 s']
        assert connection.makefile().readline() == reasons[0] + '\n'
        connection.sendall(b'done\n')      # or the watch, a thread of this process, would end it for losing a worker
        while not watch._done:
            time.sleep(0.01)


def test_a_port_in_use_and_an_unknown_role_are_named(monkeypatch):
    with socket.create_server(('', 0)) as taken, pytest.raises(SystemExit, match='Set DMLC_PS_ROOT_PORT everywhere'):
        cluster._check_ports(taken.getsockname()[1])
    monkeypatch.setenv('DMLC_ROLE', 'Worker')
    with pytest.raises(SystemExit, match="DMLC_ROLE is 'Worker'. Set it to one of worker, server, scheduler"):
        cluster.join()


def test_a_lone_process_and_a_worker_are_told_apart():
    with pytest.raises(SystemExit, match='recipes/launch.py'):
        Workers('dist_sync')
    with pytest.raises(SystemExit, match='Pass --kvstore dist_sync'):
        Workers('device', member=object())


def test_a_missing_variable_and_a_missing_scheduler_are_named(monkeypatch):
    monkeypatch.setenv('DMLC_ROLE', 'worker')
    monkeypatch.delenv('DMLC_PS_ROOT_URI', raising=False)
    with pytest.raises(SystemExit, match='DMLC_PS_ROOT_URI is not set'):
        cluster.join()
    monkeypatch.setattr(cluster, 'PATIENCE', 0.3)
    for name, value in (('DMLC_PS_ROOT_URI', '127.0.0.1'), ('DMLC_PS_ROOT_PORT', str(launch.free_port())),
                        ('DMLC_NUM_WORKER', '1'), ('DMLC_NUM_SERVER', '1')):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match='no scheduler answers at 127.0.0.1'):
        cluster.join()


@pytest.mark.parametrize('words, message', [(['-n', '2'], 'there is no command'), (['-n', '0', 'x'], 'is below 1')])
def test_launching_nothing_is_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        launch.parse_args(words)
    assert message in capsys.readouterr().err
