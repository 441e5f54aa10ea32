"""How much faster two workers, or two contexts of a process, train than one: images per second, jobs in turn.

    python benchmarks/scaling.py --output results/scaling.json

Every job trains cifar_resnet20_v1 at 4 bits on scikit-learn's digits with one thread for each core: one worker, two
workers pinned to a core each, two CPU contexts. A figure is the median over rounds of a job's last epoch.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import machine, save

RECIPES = Path(__file__).resolve().parents[1] / 'recipes'
JOBS = {'1 worker': ['launch', '-n', '1'], '2 workers': ['launch', '-n', '2'], '1 context': [],
        '2 contexts': ['--num-cpus', '2']}


def command(job, batch_size, folder):
    """The words of one job, which trains on batches of `batch_size` on each device."""
    words = JOBS[job]
    script = [sys.executable, str(RECIPES / 'image_classification.py'), '--float-epochs', '1', '--num-epochs', '3',
              '--save-dir', folder]
    if words[:1] == ['launch']:
        return [sys.executable, str(RECIPES / 'launch.py'), *words[1:], '--pin', *script, '--kvstore', 'dist_sync',
                '--batch-size', str(batch_size)]
    devices = int(job.split()[0])
    return [*script, *words, '--batch-size', str(batch_size * devices)]


def images_per_s(job, batch_size):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command(job, batch_size, folder), check=True, capture_output=True,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
        with open(os.path.join(folder, 'results.json')) as file:
            return json.load(file)['history'][-1]['images_per_s']


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--batch-size', type=int, default=64, help='images of a device and step')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--output', help='JSON file')
    args = parser.parse_args()
    found = {job: [] for job in JOBS}
    for _ in range(args.rounds):
        for job in JOBS:
            found[job].append(images_per_s(job, args.batch_size))
    medians = {job: statistics.median(values) for job, values in found.items()}
    ratios = {f'{kind}s': round(medians[f'2 {kind}s'] / medians[f'1 {kind}'], 2) for kind in ('worker', 'context')}
    for kind, ratio in ratios.items():
        print(f'two {kind} train {ratio} times as fast as one')
    save(args.output, machine=machine(1), batch_size=args.batch_size, images_per_s=found, two_over_one=ratios)


if __name__ == '__main__':
    main()
