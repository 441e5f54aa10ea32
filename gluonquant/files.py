"""Files that are whole or not there."""
import os
from contextlib import contextmanager, suppress


@contextmanager
def replacing(path):
    """Yield a file to write bytes to; it becomes ``path`` at the end. If anything fails, what was there stays."""
    unfinished = f'{os.fspath(path)}.part{os.getpid()}'
    try:
        with open(unfinished, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(unfinished)
