"""gluonquant: quantization-aware training for Apache MXNet Gluon.

    gq.convert(net, bits=4)                  # in place, before hybridizing
    gq.calibrate(net, loader, batches=10)    # ranges from data
    net.hybridize(static_alloc=True, static_shape=True)
    ...                                      # train with gluon.Trainer as ever
    gq.save(net, path); gq.load(path, net)
    gq.export_onnx(net, 'net.onnx', (1, 3, 224, 224))

Names are imported when they are first used, so that `gluonquant.integer` runs where MXNet is not installed.
"""
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

__version__ = '0.1.0'

_PLACES = {
    'calibrate': ('calibrate',), 'checkpoint': ('load', 'load_weights', 'save'),
    'config': ('LayerConfig', 'QuantizerSpec', 'Rule'), 'convert': ('convert',), 'distributed': ('StateSync',),
    'export': ('export_onnx', 'export_tensorrt_ranges', 'lint_tensorrt'), 'finalize': ('finalize',), 'fold': ('fold',),
    'fuse': ('fuse',), 'graph': ('attach', 'draw', 'explain'),
    'grid': ('Grid',), 'mxnet_int8': ('to_mxnet_int8',), 'packed': ('load_packed', 'save_packed'),
    'ranges': ('clipped', 'ranges'), 'reestimate': ('reestimate_batchnorm',), 'summary': ('summary',),
    'switches': ('freeze', 'freeze_batchnorm', 'set_mode', 'set_phase', 'unfreeze'),
    'torch_weights': ('like_torch', 'load_torch'), 'verify': ('verify',)}
_MODULES = ('graph', 'integer', 'layers', 'mxnet_int8', 'observers', 'ops', 'quantizers', 'training')
_HOME = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted([*_HOME, *_MODULES])


class _Package(ModuleType):
    """This package. Several of its functions are called like the modules in which they are written."""

    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, ModuleType)):       # an import of the module hides no function
            super().__setattr__(name, value)

    def __getattr__(self, name):
        if name in _HOME:
            value = getattr(import_module(f'.{_HOME[name]}', __name__), name)
            setattr(self, name, value)
            return value
        if name in _MODULES:
            return import_module(f'.{name}', __name__)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def __dir__(self):
        return sorted({*self.__dict__, *__all__})


class _WithMXNet:
    """Loads our operators when MXNet is imported, so that an exported net runs where gluonquant has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != 'mxnet':
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            run = spec.loader.exec_module

            def run_and_load(module):
                run(module)
                import_module('.ops', __name__)
            spec.loader.exec_module = run_and_load
        return spec


sys.modules[__name__].__class__ = _Package
if sys.modules.get('mxnet') is not None:
    import_module('.ops', __name__)
else:
    sys.meta_path.insert(0, _WithMXNet())
