"""Start a scheduler, servers and workers of one command on this machine, and end with them.

    python recipes/launch.py -n 2 python recipes/image_classification.py --kvstore dist_sync ...

On several machines, set the variables that cluster.py lists and start the same command on each.
"""
import argparse
import os
import signal
import socket
import subprocess
import sys
import time

GRACE = 20          # seconds that the others get after one has failed


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('-n', '--num-workers', type=int, default=2)
    parser.add_argument('-s', '--num-servers', type=int, default=1)
    parser.add_argument('--pin', action='store_true', help='give each worker a core of its own and one thread')
    parser.add_argument('command', nargs=argparse.REMAINDER, help='what every one of them runs')
    args = parser.parse_args(argv)
    if not args.command:
        parser.error('there is no command. Write it behind the options: launch.py -n 2 python script.py ...')
    for name in ('num_workers', 'num_servers'):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is below 1.")
    return args


def free_port():
    """A port that is free, as the next one is."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(('', 0))
            try:
                second.bind(('', first.getsockname()[1] + 1))
            except OSError:
                continue
            return first.getsockname()[1]


def start(args):
    """{name: process}."""
    shared = {'DMLC_PS_ROOT_URI': '127.0.0.1', 'DMLC_PS_ROOT_PORT': str(free_port()),
              'DMLC_NUM_WORKER': str(args.num_workers), 'DMLC_NUM_SERVER': str(args.num_servers)}
    cores = sorted(os.sched_getaffinity(0))
    processes = {}
    for role, count in (('scheduler', 1), ('server', args.num_servers), ('worker', args.num_workers)):
        for number in range(count):
            environment, pin = {**os.environ, **shared, 'DMLC_ROLE': role}, None
            if args.pin and role == 'worker':
                environment['OMP_NUM_THREADS'] = '1'
                core = cores[number % len(cores)]

                def pin(core=core):
                    os.sched_setaffinity(0, {core})
            processes[f'{role} {number}'] = subprocess.Popen(args.command, env=environment, preexec_fn=pin)
    return processes


def wait(processes, interrupts):
    """The exit status: 0 if all ended well, else that of the first which did not.

    Those that still run GRACE after that, or after the first of the `interrupts` (times), or at the second, are killed.
    """
    status, deadline = 0, None
    while any(process.poll() is None for process in processes.values()):
        for name, process in processes.items():
            if process.poll() and not status:
                status, deadline = process.poll(), time.time() + GRACE
                print(f'launch: {name} (process {process.pid}) ended with status {status}', file=sys.stderr)
        if interrupts:
            deadline = interrupts[0] + GRACE if len(interrupts) == 1 else 0
        if deadline is not None and time.time() > deadline:
            for process in processes.values():
                process.kill()
        time.sleep(0.05)
    return status or next((process.poll() for process in processes.values() if process.poll()), 0)


def main():
    processes = start(parse_args())
    interrupts = []                                     # Ctrl-C reaches the workers, too, and ends them
    signal.signal(signal.SIGINT, lambda *_: interrupts.append(time.time()))
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes.values()])
    status = wait(processes, interrupts)
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == '__main__':
    main()
