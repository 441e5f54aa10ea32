"""Several workers on one machine or many, by the environment variables of MXNet's parameter server.

    DMLC_ROLE           worker, server or scheduler: what this process is
    DMLC_PS_ROOT_URI    address of the machine with the scheduler
    DMLC_PS_ROOT_PORT   a free port there; the next one must be free, too
    DMLC_NUM_WORKER, DMLC_NUM_SERVER

MXNet waits for ever for a worker that has died. So every process also keeps a connection to the scheduler's machine:
when one of them breaks, the scheduler tells the others who is missing, and they end at once.
"""
import contextlib
import logging
import os
import socket
import sys
import threading
import time

LOST = 75           # exit status of a process that ends because another one died
PATIENCE = 60       # seconds to wait for the scheduler at the start


def role():
    """'worker', 'server', 'scheduler', or None: no variable is set, and this process works alone."""
    return os.environ.get('DMLC_ROLE')


def join():
    """Take part in what the environment describes. Call it before anything imports mxnet.

    A worker gets its `Member`, and so does a process that works alone: None. Servers and the scheduler do their work in
    here and exit with the job.
    """
    if role() is None:
        return None
    missing = [name for name in ('DMLC_PS_ROOT_URI', 'DMLC_PS_ROOT_PORT', 'DMLC_NUM_WORKER', 'DMLC_NUM_SERVER')
               if name not in os.environ]
    if missing:
        raise SystemExit(f'DMLC_ROLE is {role()}, but {missing[0]} is not set. Set it, or start with '
                         'recipes/launch.py.')
    os.environ.pop('PORT', None)        # the parameter server would take it for its own
    port = int(os.environ['DMLC_PS_ROOT_PORT']) + 1
    if role() == 'scheduler':
        Watch(port, int(os.environ['DMLC_NUM_WORKER']))
    member = Member(os.environ['DMLC_PS_ROOT_URI'], port) if role() != 'scheduler' else None
    if role() != 'worker':
        import mxnet  # noqa: F401     serves until the job is done, then exits
    return member


class Member:
    """This process's connection to the watch, which ends the process when another one is lost."""

    def __init__(self, host, port):
        self._socket = _connect(host, port)
        self._done = False
        self.name = f'process {os.getpid()} on {socket.gethostname()}'
        self.say(f'{role()} ({self.name})')
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, text):
        """Give a new name to this process, for what others are told of it."""
        self._socket.sendall(f'{text}\n'.encode())

    def leave(self):
        """This worker's job is done."""
        self._done = True
        self._socket.sendall(b'done\n')

    def _listen(self):
        try:
            said = self._socket.makefile().readline().strip()
        except OSError as error:
            said = f'the scheduler ({error})'
        if not self._done:
            _give_up(f'lost {said or "the scheduler"}')


class Watch:
    """Runs beside the scheduler: knows who takes part, and tells all when one is lost before every worker is done."""

    def __init__(self, port, workers):
        self._names, self._done, self._workers, self._lock = {}, 0, workers, threading.Lock()
        self._server = socket.create_server(('', port))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            connection, _ = self._server.accept()
            _keep_alive(connection)
            threading.Thread(target=self._follow, args=(connection,), daemon=True).start()

    def _follow(self, connection):
        left = False
        try:
            for line in connection.makefile():
                left = line.strip() == 'done'
                with self._lock:
                    self._done += left
                    if not left:
                        self._names[connection] = line.strip()
        except OSError:
            pass                        # a broken connection says the same as a closed one
        with self._lock:
            name = self._names.pop(connection, 'a process')
            if left or self._done == self._workers:
                return
            for other in self._names:
                with contextlib.suppress(OSError):      # lost, too
                    other.sendall(f'{name}\n'.encode())
        _give_up(f'lost {name}')


def _connect(host, port):
    deadline = time.time() + PATIENCE
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            break
        except OSError as error:
            if time.time() > deadline:
                raise SystemExit(f'no scheduler answers at {host}, port {port}: {error}. Start one there with '
                                 'DMLC_ROLE=scheduler and the same command.') from None
            time.sleep(0.2)
    connection.settimeout(None)
    _keep_alive(connection)
    return connection


def _keep_alive(connection):
    """Notice within half a minute that the other machine is gone, although nothing is being said."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (('TCP_KEEPIDLE', 10), ('TCP_KEEPINTVL', 5), ('TCP_KEEPCNT', 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)


def _give_up(reason):
    """End this process although its main thread waits inside of MXNet."""
    again = '' if role() != 'worker' else ' Start the job again with --resume: it continues from the last checkpoint.'
    text = f'{role()} ends: {reason}.{again}'
    logging.error(text)
    if not logging.getLogger().handlers:
        print(text, file=sys.stderr)
    sys.stderr.flush()
    os._exit(LOST)
