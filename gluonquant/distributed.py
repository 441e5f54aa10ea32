"""What no gradient moves, kept equal on all workers and contexts of data-parallel training."""
import numpy as np
from mxnet import nd
from mxnet.kvstore import KVStoreBase

_FIRST_KEY = 2 ** 30        # a Trainer numbers its Parameters from 0
_HERE = ('local', 'device', 'nccl')     # kinds of stores for the contexts of one process
_MERGES = {'mean': np.mean, 'max': np.max, 'min': np.min}


class StateSync:
    """Merges running statistics and the state of quantizers over workers and contexts.

    A `gluon.Trainer` adds up gradients. BatchNorm's running statistics and what quantizers observe (moving averages,
    thresholds, counters) follow the images that each worker, or each context of a list, sees: without merging, every
    one of them would train another net. ::

        sync = gq.StateSync(mx.kv.create('dist_sync'))
        trainer = gluon.Trainer(net.collect_params(), 'sgd', options, kvstore=sync.store(net), update_on_kvstore=False)
        for data, label in shard:
            ...
            trainer.step(len(data) * sync.workers)
            sync(net)

    Means are averaged; largest and smallest values are those of all. Ranges then are what one worker with the joint
    batch would have observed, to rounding; percentiles (fqn) and variances are the mean of the workers'. In the very
    step that changes a moving average each worker still quantizes by its own one.
    ``update_on_kvstore=False`` matters: a server would not keep learned ranges within their bounds.

    Parameters
    ----------
    kvstore : KVStore, optional
        One StateSync for each. None: a single context. 'local', 'device' and 'nccl': contexts of this process only.

    Raises
    ------
    TypeError
        ``kvstore`` is no KVStore: a name has to go through `mxnet.kv.create`.
    ValueError
        Its type adds up in another way than the above or 'dist_sync', 'dist_device_sync'.
    """

    def __init__(self, kvstore=None):
        if not (kvstore is None or isinstance(kvstore, KVStoreBase)):
            raise TypeError(f'kvstore={kvstore!r} is no KVStore: pass mx.kv.create({str(kvstore)!r})')
        kind = kvstore.type if kvstore is not None else 'local'
        if kind not in _HERE and not ('dist' in kind and 'sync' in kind and 'async' not in kind):
            raise ValueError(f'a KVStore of type {kind!r} cannot share state: use {", ".join(_HERE)}, dist_sync or '
                             'dist_device_sync')
        self._given = kvstore
        self._store = None if kind in _HERE else kvstore
        self._keys = {}         # shape -> key of the store
        self._trained = 0       # keys that Trainers have

    @property
    def rank(self):
        """Number of this worker, 0 if there is only one."""
        return self._store.rank if self._store else 0

    @property
    def workers(self):
        """How many workers there are."""
        return self._store.num_workers if self._store else 1

    def __call__(self, net):
        """Merge the state of ``net``; all workers call it equally often, after each `Trainer.step`.

        ValueError names a Parameter that has no value yet.
        """
        found = [parameter for parameter in _parameters(net) if _is_state(parameter)]
        if not found or self.workers * len(found[0].list_ctx()) == 1:
            return
        rows = self.gather(_rows(found))
        merged, start = [], 0
        for parameter in found:
            part = rows[:, start:start + _size(parameter)]
            merged.append(_MERGES[getattr(parameter, 'merge', 'mean')](part, axis=0))
            start += _size(parameter)
        _write(found, merged)

    def store(self, net):
        """The store for a Trainer of ``net``, a new one for each; ``net`` first gets the values of worker 0 everywhere.

        A plain KVStore would give a second Trainer the keys of the first, and would replace the values after the first
        step, while gradients may overtake them.
        """
        if self._given is None:
            return None
        self.broadcast(net)
        first, self._trained = self._trained, self._trained + len(_parameters(net))
        return _TrainerStore(self._given, first)

    def broadcast(self, net):
        """Give every Parameter of ``net`` the value it has on the first context of worker 0."""
        found = _parameters(net)
        nd.waitall()
        row = np.concatenate([parameter.list_data()[0].asnumpy().ravel() for parameter in found])
        if self._store is not None:     # which adds up: the others have nothing to add
            row = self._summed(row if self.rank == 0 else np.zeros_like(row))
        for parameter in found:     # new arrays: inference leaves weights in a layout that a store cannot send
            parameter.reset_ctx(parameter.list_ctx())
        _write(found, np.split(row, np.cumsum([_size(parameter) for parameter in found])[:-1]))

    def gather(self, rows):
        """The rows of all workers, in the order of their ranks; all call it with arrays of one shape.

        rows : float array (m, n) -> float64 array (workers * m, n); values pass as float32
        """
        if self._store is None:
            return np.asarray(rows, dtype='float64')
        rows = np.asarray(rows, dtype='float32')
        # A store of this kind adds up what workers push: each one fills in its own rows.
        everything = np.zeros((self.workers,) + rows.shape, 'float32')
        everything[self.rank] = rows
        return self._summed(everything).reshape(-1, *rows.shape[1:]).astype('float64')

    def _summed(self, array):
        """The sum of the workers' arrays, float32 of one shape."""
        if array.shape not in self._keys:
            self._keys[array.shape] = _FIRST_KEY + len(self._keys)
            self._store.init(self._keys[array.shape], nd.zeros(array.shape))
        shared = nd.array(array, dtype='float32')
        self._store.push(self._keys[array.shape], shared)
        self._store.pull(self._keys[array.shape], out=shared)
        return shared.asnumpy()


class _TrainerStore(KVStoreBase):
    """Adds up gradients under keys from ``first`` on."""

    def __init__(self, store, first):
        self._store, self._first = store, first

    def broadcast(self, key, value, out, priority=0):
        self._store.init(self._first + key, value)      # all have this value already

    def pushpull(self, key, value, out=None, priority=0):
        self._store.pushpull(self._first + key, value, out, priority)

    @staticmethod
    def is_capable(capability):
        return False

    type = property(lambda self: self._store.type)
    rank = property(lambda self: self._store.rank)
    num_workers = property(lambda self: self._store.num_workers)


def _parameters(net):
    found = net._collect_params_with_prefix()
    for name, parameter in found.items():
        if parameter._data is None and not hasattr(parameter, 'prepare'):
            raise ValueError(f'Parameter {name!r} has no value yet: load or initialize the net first, and run one '
                             'batch through it if shapes are unknown')
    return list({id(parameter): parameter for parameter in found.values()}.values())


def _rows(parameters):
    """One row for each context: the values of ``parameters``, one behind the other."""
    nd.waitall()        # reading does not wait for what a static graph still writes
    columns = [[array.asnumpy().ravel() for array in parameter.list_data()] for parameter in parameters]
    return np.stack([np.concatenate(row) for row in zip(*columns)])


def _is_state(parameter):
    if hasattr(parameter, 'trainable'):
        return not parameter.trainable
    # To Gluon the running statistics of a SymbolBlock are differentiable, and only not wanted. Vectors that a user has
    # frozen are the same everywhere and stay it.
    return not parameter._differentiable or parameter.grad_req == 'null' and len(parameter.shape) == 1


def _size(parameter):
    return int(np.prod(parameter.shape))


def _write(parameters, values):
    for parameter, value in zip(parameters, values):
        value = nd.array(value.reshape(parameter.shape), dtype=parameter.dtype)
        for array in parameter.list_data():
            value.copyto(array)
