"""A Gluon Parameter that keeps itself usable between optimizer steps."""
from mxnet import autograd, cpu, gluon, nd

LARGEST = 3.4e38


class QuantizerParameter(gluon.Parameter):
    """A range, step or counter of a quantizer.

    Gluon asks a Parameter for its array at every forward pass, hybridized or not. Three things happen there that plain
    Parameters leave to the user's training loop:

    * a Parameter that nobody initialized takes its default (quantizers enter a net after ``net.initialize()``);
    * the value is projected to its bounds after an optimizer step, so that none makes a range zero or negative;
    * ``on_use`` is called, which is how an uncalibrated quantizer speaks up inside a hybridized net.

    ``on_change`` is called whenever a value is set from outside the graph: by loading, initializing or `set_data`.

    Parameters
    ----------
    lower : float or (Parameter, float), optional
        Lower bound: a number, or another Parameter times a factor, which gives way by half if it is learned, too.
    upper : float
        Upper bound where the lower one is a number; default: the largest float32.
    like : Parameter, optional
        Its contexts are taken when this Parameter initializes itself.
    merge : 'mean', 'max' or 'min'
        What `StateSync` makes of the values of several workers.
    """

    def __init__(self, name, lower=None, upper=LARGEST, like=None, merge='mean', **kwargs):
        super().__init__(name, allow_deferred_init=True, **kwargs)
        self.lower = lower
        self.upper = upper
        self._bounded = None                # the Parameter whose lower bound this one is, if both are learned
        self.like = like
        self.merge = merge
        self.trainable = self.grad_req != 'null'    # by design; freezing sets grad_req to 'null' for a while
        if isinstance(lower, tuple) and lower[0].trainable:
            lower[0]._bounded = self
        self.on_use = None
        self.on_change = None
        self._within_bounds = False

    def set_data(self, data):
        super().set_data(data)
        self._changed()

    def _init_impl(self, data, ctx_list):
        super()._init_impl(data, ctx_list)
        self._changed()

    def _changed(self):
        self._within_bounds = False
        if self.on_change is not None and self._data is not None:
            self.on_change()

    def data(self, ctx=None):
        self.prepare()
        if self.on_use is not None:
            self.on_use()
        return super().data(ctx)

    def list_data(self):
        self._initialize()
        return super().list_data()

    def grad(self, ctx=None):
        self._within_bounds = False         # who asks for the gradient is about to make a step
        return super().grad(ctx)

    def list_grad(self):
        self._within_bounds = False
        return super().list_grad()

    def list_ctx(self):
        self._initialize()
        return super().list_ctx()

    def reset_ctx(self, ctx):
        self._initialize()
        super().reset_ctx(ctx)

    def _reduce(self):
        # Saving reads the value without using it. A graph hybridized with static_alloc does not tell MXNet which of
        # its inputs it writes, so reading them would not wait for it.
        nd.waitall()
        return self.list_data()[0].copyto(cpu())    # contexts hold the same; a mean of three would be rounded

    def prepare(self):
        """Initialize if nobody did, and project to the bounds: together with the Parameter that this one bounds."""
        (self._bounded or self)._prepare()

    def _prepare(self):
        related = isinstance(self.lower, tuple)
        if related:
            self.lower[0]._prepare()
        self._initialize()
        if self._within_bounds or self.lower is None or self._data is None:
            return
        with autograd.pause():
            for i, array in enumerate(self._data):
                if related:
                    self._raise(array, i, *self.lower)
                else:
                    nd.clip(array, self.lower, self.upper, out=array)
        # A bound that is learned itself may move at any time.
        self._within_bounds = not related

    @staticmethod
    def _raise(array, i, parameter, factor):
        """Move ``array`` up to ``factor`` times another Parameter, which comes to meet it if it is learned, too.

        The nearest pair of valid values: to move only one of them would push both up, step by step.
        """
        bound = parameter.list_data()[i]
        if parameter.trainable:
            lack = nd.maximum(bound * factor - array, 0) / (1 + factor ** 2)
            nd.broadcast_sub(bound, lack * factor, out=bound)
            parameter._within_bounds = False
            parameter._prepare()
        nd.broadcast_maximum(array, bound * factor, out=array)

    def _initialize(self):
        if self._data is None and not self._deferred_init:
            initialized = self.like is not None and self.like._data is not None
            self.initialize(ctx=self.like.list_ctx() if initialized else None)
