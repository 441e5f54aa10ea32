"""Several workers on one machine or many, by the environment variables of MXNet's parameter server.

    DMLC_ROLE           worker, server or scheduler: what this process is
    DMLC_PS_ROOT_URI    address of the machine with the scheduler
    DMLC_PS_ROOT_PORT   a free port there; the next one must be free, too
    DMLC_NUM_WORKER, DMLC_NUM_SERVER

MXNet waits for ever for a worker that has died, also while a worker that has failed tidies up. So every process keeps a
connection to the scheduler's machine: when one of them breaks, the scheduler tells the others who is missing, and they
end at once. And a worker that fails ends without tidying up: see `run`.
"""
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback

LOST = 75           # exit status of a process that ends because another one died
PATIENCE = 60       # seconds to wait for the scheduler at the start
ARRIVAL = 300       # seconds until all have to be there
ROLES = ('worker', 'server', 'scheduler')


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
    if role() not in ROLES:
        raise SystemExit(f'DMLC_ROLE is {role()!r}. Set it to one of {", ".join(ROLES)}, or unset it to work alone.')
    missing = [name for name in ('DMLC_PS_ROOT_URI', 'DMLC_PS_ROOT_PORT', 'DMLC_NUM_WORKER', 'DMLC_NUM_SERVER')
               if name not in os.environ]
    if missing:
        raise SystemExit(f'DMLC_ROLE is {role()}, but {missing[0]} is not set. Set it, or start with '
                         'recipes/launch.py.')
    os.environ.pop('PORT', None)        # the parameter server would take it for its own
    port = int(os.environ['DMLC_PS_ROOT_PORT'])
    if role() == 'scheduler':
        _check_ports(port, port + 1)
        Watch(port + 1, int(os.environ['DMLC_NUM_WORKER']), int(os.environ['DMLC_NUM_SERVER']))
    member = Member(os.environ['DMLC_PS_ROOT_URI'], port + 1) if role() != 'scheduler' else None
    if role() != 'worker':
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is for the workers, whom these follow
        import mxnet  # noqa: F401     serves until the job is done, then exits
    return member


def run(main):
    """Call main(). If it fails in a worker, end the process at once, so that the others learn of it."""
    try:
        main()
    except BaseException as error:
        if role() is None:
            raise
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
            print('' if error.code == status else error.code, file=sys.stderr)
        else:
            status = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _check_ports(*ports):
    for port in ports:
        try:
            socket.create_server(('', port)).close()
        except OSError as error:
            raise SystemExit(f'port {port} cannot be used on this machine: {error}. Set DMLC_PS_ROOT_PORT everywhere '
                             'to a port that is free, as the next one is.') from None


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
            said = f'lost the scheduler ({error})'
        if not self._done:
            _give_up(said or 'lost the scheduler')


class Watch:
    """Runs beside the scheduler: knows who takes part, and tells all when one is lost before every worker is done."""

    def __init__(self, port, workers, servers):
        self._names, self._done, self._lock = {}, 0, threading.Lock()
        self._workers, self._expected, self._arrived = workers, workers + servers, 0
        self._server = socket.create_server(('', port))
        threading.Thread(target=self._accept, daemon=True).start()
        arrival = threading.Timer(ARRIVAL, self._count)
        arrival.daemon = True
        arrival.start()

    def _count(self):
        """End the job if some process has never come."""
        with self._lock:
            if self._arrived == self._expected:
                return
            reason = f'only {self._arrived} of {self._expected} workers and servers came within {ARRIVAL} s'
            self._tell(reason)
        _give_up(reason)

    def _tell(self, reason):
        for other in self._names:
            with contextlib.suppress(OSError):      # lost, too
                other.sendall(f'{reason}\n'.encode())

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
                        self._arrived += connection not in self._names
                        self._names[connection] = line.strip()
        except OSError:
            pass                        # a broken connection says the same as a closed one
        with self._lock:
            name = self._names.pop(connection, 'a process')
            if left or self._done == self._workers:
                return
            self._tell(f'lost {name}')
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
    logging.error('%s ends: %s.%s', role(), reason, again)
    sys.stderr.flush()
    os._exit(LOST)
