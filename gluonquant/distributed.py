"""What no gradient moves, kept equal on all workers and contexts of data-parallel training."""
import numpy as np
from mxnet import nd

_FIRST_KEY = 2 ** 30        # a Trainer numbers its Parameters from 0
_MERGES = {'mean': np.mean, 'max': np.max, 'min': np.min}


class StateSync:
    """Merges running statistics and the state of quantizers over workers and contexts.

    A `gluon.Trainer` adds up gradients. BatchNorm's running statistics and what quantizers observe (moving averages,
    thresholds, counters) follow the images that each worker, or each context of a list, sees: without merging, every
    one of them would train another net. ::

        store = mx.kv.create('dist_sync')
        sync = gq.StateSync(net, store)
        sync.broadcast()                                # after calibration, or loading
        trainer = gluon.Trainer(net.collect_params(), 'sgd', options, kvstore=store, update_on_kvstore=False)
        trainer.allreduce_grads()                       # starts it now: it gives all what worker 0 has
        for data, label in shard:
            ...
            trainer.step(len(data) * store.num_workers)
            sync()

    Means are averaged; largest and smallest values are those of all. Ranges then are what one worker with the joint
    batch would have observed, to rounding; percentiles (fqn) and variances are the mean of the workers'. In the very
    step that changes a moving average each worker still quantizes by its own one.
    ``update_on_kvstore=False`` matters: a server would not keep learned ranges within their bounds.

    Parameters
    ----------
    net : Block, whose Parameters have values
    kvstore : KVStore, optional
        The one given to the Trainer. None, or one that is not distributed: contexts are merged only.

    Raises
    ------
    ValueError
        Some Parameter has no value yet.
    """

    def __init__(self, net, kvstore=None):
        self._net = net
        self._store = kvstore if kvstore is not None and 'dist' in kvstore.type else None
        self._keys = {}         # length of a row -> key of the store
        for name, parameter in net._collect_params_with_prefix().items():
            if parameter._data is None and not hasattr(parameter, 'prepare'):
                raise ValueError(f'Parameter {name!r} has no value yet: load or initialize the net first, and run one '
                                 'batch through it if shapes are unknown')

    @property
    def rank(self):
        """Number of this worker, 0 if there is only one."""
        return self._store.rank if self._store else 0

    @property
    def workers(self):
        """How many workers there are."""
        return self._store.num_workers if self._store else 1

    def __call__(self):
        """Merge the state; all workers call it equally often, after each `Trainer.step`."""
        found = [parameter for parameter in self._parameters() if _is_state(parameter)]
        if not found or self.workers * len(found[0].list_ctx()) == 1:
            return
        rows = self.gather(self._rows(found))
        merged, start = [], 0
        for parameter in found:
            part = rows[:, start:start + _size(parameter)]
            merged.append(_MERGES[getattr(parameter, 'merge', 'mean')](part, axis=0))
            start += _size(parameter)
        _write(found, merged)

    def broadcast(self):
        """Give every Parameter the value it has on the first context of worker 0."""
        found = self._parameters()
        row = self.gather(self._rows(found))[0]
        _write(found, np.split(row, np.cumsum([_size(parameter) for parameter in found])[:-1]))

    def gather(self, rows):
        """The rows of all workers, in the order of their ranks; all call it with arrays of one shape.

        rows : float array (m, n) -> float64 array (workers * m, n); values pass as float32
        """
        rows = np.asarray(rows, dtype='float32')
        if self._store is None:
            return rows.astype('float64')
        # A store of this kind adds up what workers push: each one fills in its own rows.
        everything = np.zeros((self.workers,) + rows.shape, 'float32')
        if rows.shape not in self._keys:
            self._keys[rows.shape] = _FIRST_KEY + len(self._keys)
            self._store.init(self._keys[rows.shape], nd.array(everything))
        everything[self.rank] = rows
        shared = nd.array(everything)
        self._store.push(self._keys[rows.shape], shared)
        self._store.pull(self._keys[rows.shape], out=shared)
        return shared.asnumpy().reshape(-1, *rows.shape[1:]).astype('float64')

    def _parameters(self):
        return list(self._net.collect_params().values())

    def _rows(self, parameters):
        """One row for each context: the values of ``parameters``, one behind the other."""
        nd.waitall()        # reading does not wait for what a static graph still writes
        columns = [[array.reshape(-1).astype('float32') for array in parameter.list_data()] for parameter in parameters]
        return np.stack([nd.concat(*row, dim=0).asnumpy() for row in zip(*columns)])


def _is_state(parameter):
    return not getattr(parameter, 'trainable', parameter._differentiable)


def _size(parameter):
    return int(np.prod(parameter.shape))


def _write(parameters, values):
    for parameter, value in zip(parameters, values):
        value = nd.array(value.reshape(parameter.shape), dtype=parameter.dtype)
        for array in parameter.list_data():
            value.copyto(array)
