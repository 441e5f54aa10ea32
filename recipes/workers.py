"""The devices that train one net: contexts of this process, and workers of a job."""
import mxnet as mx
import numpy as np
from mxnet import gluon

import gluonquant as gq


class Workers:
    """All devices that train a net together, seen from one worker.

    Parameters
    ----------
    kvstore : str, how gradients are added up: 'local', 'device' (contexts of this process), 'dist_sync' (workers).
    contexts : list of Context
    member : cluster.Member or None, this worker's connection to the others.
    """
    def __init__(self, kvstore='device', contexts=None, member=None):
        self.contexts = contexts or [mx.cpu()]
        distributed = 'dist' in kvstore
        if distributed != bool(member):
            raise SystemExit(f'--kvstore {kvstore} ' + (
                'needs a scheduler and servers: start with recipes/launch.py, or set the variables that '
                'recipes/cluster.py lists.' if distributed else
                'does not join the workers that DMLC_ROLE speaks of. Pass --kvstore dist_sync.'))
        self._sync = gq.StateSync(mx.kv.create(kvstore) if distributed or len(self.contexts) > 1 else None)
        self.rank, self.count, self._member = self._sync.rank, self._sync.workers, member
        if member:
            member.say(f'worker {self.rank} ({member.name})')

    @property
    def first(self):
        """Whether this worker writes files and talks."""
        return self.rank == 0

    def trainer(self, net, optimizer, options):
        """A Trainer that adds up the gradients of all; every device then holds the net of worker 0."""
        store = self._sync.store(net)
        return gluon.Trainer(net.collect_params(), optimizer, options, kvstore=store, update_on_kvstore=False)

    def step(self, trainer, net, images):
        """One update after the backward pass over `images` images here, as many everywhere."""
        trainer.step(images * self.count)
        if self.count * len(self.contexts) > 1:
            self._sync(net)

    def share(self, arrays):
        """The arrays of a batch as one tuple of arrays for each context."""
        return list(zip(*(gluon.utils.split_and_load(array, self.contexts, even_split=False) for array in arrays)))

    def total(self, *values):
        """Sums of numbers over all workers, who wait for each other here."""
        return self._sync.gather(np.array([values])).sum(axis=0).tolist()

    def same(self, number):
        """Whether all workers have this number."""
        return len(set(self._sync.gather(np.array([[number]])).ravel())) == 1

    def leave(self):
        """The job is done."""
        self.total(0)
        if self._member:
            self._member.leave()
