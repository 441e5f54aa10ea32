"""Names for things: quantizers, observers and layers register here beside their class."""
import difflib


def nearest(name, known):
    """Return ``" Did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f' Did you mean {close[0]!r}?' if close else ''


class Registry:
    """A table from name to class that refuses duplicates and suggests close names.

    Parameters
    ----------
    kind : str
        What is registered, for the error messages: ``'quantizer'``, ``'observer'``.
    """

    def __init__(self, kind):
        self.kind = kind
        self._table = {}

    def register(self, name):
        """Class decorator: enter the class under ``name``."""
        def enter(value):
            if name in self._table:
                raise ValueError(f'{self.kind} {name!r} is already registered as {self._table[name]!r}')
            self._table[name] = value
            return value
        return enter

    def get(self, name):
        """The class registered under ``name``; ValueError lists the known names and the nearest."""
        if not isinstance(name, str) or name not in self._table:
            raise ValueError(f'unknown {self.kind} {name!r}.{nearest(name, self._table)} '
                             f'Known {self.kind}s: {", ".join(self.names())}')
        return self._table[name]

    def names(self):
        """All registered names, sorted."""
        return sorted(self._table)
