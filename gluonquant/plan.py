"""What `convert` and `attach` decide alike: methods, bits, the ends of a net, signs, patterns."""
from dataclasses import replace

from . import quantizers
from .config import LayerConfig, QuantizerSpec, Rule, matches
from .grid import check_bits
from .registry import nearest

# method -> methods of weights and of activations
PRESETS = {'int8': ('int8', 'int8'), 'fqn': ('fqn', 'fqn'), 'pact': ('sawb', 'pact'), 'dorefa': ('dorefa', 'dorefa'),
           'qil': ('qil', 'qil'), 'gdrq': ('gdrq', 'gdrq'), 'lsq': ('lsq', 'lsq')}
DEFAULT_METHOD = 'lsq'
# What suits pre-trained nets better than a method's own default. Found without training, on training images of CIFAR-10
# with a resnet20: activations' steps of least squared error start LSQ at W3A3 from 76 % instead of 23 %; GDRQ's
# thresholds for reshaping cut a trained net down to chance, these leave 87 % at W4A4.
_PRETRAINED = {('weight', 'lsq'): {'per_channel': True},
               ('activation', 'lsq'): {'options': {'init': 'mse'}},
               ('weight', 'lsqplus'): {'per_channel': True},
               ('weight', 'dorefa'): {'options': {'rescale': 'max'}},
               ('weight', 'gdrq'): {'options': {'ktimes': 4.0, 'group_size': 1}},
               ('activation', 'gdrq'): {'options': {'ktimes': 12.0, 'lam': 0.01}}}
_AT_BITS = {('weight', 'gdrq', 2): {'ktimes': 2.5}, ('weight', 'gdrq', 3): {'ktimes': 3.5},
            ('activation', 'gdrq', 2): {'ktimes': 8.0}, ('activation', 'gdrq', 3): {'ktimes': 10.0}}
_SIGNED_FALLBACK = 'int8'       # for inputs below zero, where the method is for ReLU outputs only


def base_config(bits, method, weight, activation, per_channel, signed, gradient_bits):
    if method is not None and method not in PRESETS:
        raise ValueError(f'unknown method {method!r}.{nearest(method, PRESETS)} Known methods: '
                         f'{", ".join(sorted(PRESETS))}')
    if gradient_bits is not None:
        check_bits(gradient_bits, 'gradient_bits')
    specs = []
    for role, (name, own_bits, options), preset in zip(('weight', 'activation'), (weight, activation),
                                                       PRESETS[method or DEFAULT_METHOD]):
        name = preset if name is None else name
        own_bits = bits if own_bits is None else check_bits(own_bits, f'{role}_bits')
        spec = start(role, name, own_bits)
        specs.append(replace(spec, options={**spec.options, **(options or {})}))
    if per_channel is not None:
        specs[0] = replace(specs[0], per_channel=per_channel)
    return LayerConfig(specs[0], replace(specs[1], signed=signed), gradient_bits)


def start(role, method, bits):
    """What a method starts with before anything else is asked for."""
    quantizers.find(method, role)
    spec = QuantizerSpec(method, bits, **_PRETRAINED.get((role, method), {}))
    return replace(spec, options={**spec.options, **_AT_BITS.get((role, method, bits), {})})


def end_config(base, bits):
    """First and last layers: method int8, but affine methods and float tensors stay what they are."""
    def end(spec):
        if spec.method in ('fqn', 'affine', 'none', 'int8'):
            return replace(spec, bits=bits)
        return replace(spec, method='int8', bits=bits, options={})
    return replace(base, weight=end(base.weight), activation=end(base.activation))


def settle_sign(spec, nonnegative):
    """``spec`` of an activation with its sign, where that is open, and another method if its own cannot do signs.

    Parameters
    ----------
    nonnegative : bool
        Whether the tensor is provably never negative.
    """
    if spec.signed is not None or spec.method == 'none':
        return spec
    if not nonnegative and not quantizers.find(spec.method, 'activation').signed_supported:
        spec = replace(spec, method=_SIGNED_FALLBACK, options={})
    return replace(spec, signed=not nonnegative)


def read_patterns(exclude, rules):
    """The arguments ``exclude`` and ``rules`` as lists of str and of Rule."""
    return ([exclude] if isinstance(exclude, str) else list(exclude),
            [rule if isinstance(rule, Rule) else Rule(**rule) for rule in rules])


def check_patterns(exclude, rules, names, kind):
    """ValueError for a pattern of these lists that fits none of ``names``."""
    for pattern in [*exclude, *(rule.pattern for rule in rules)]:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(f'pattern {pattern!r} matches no {kind}.{nearest(pattern, names)} '
                             f'{kind.capitalize()}s: {_shortened(list(names))}')


def _shortened(names, most=8):
    text = ', '.join(map(repr, names[:most]))
    return text if len(names) <= most else f'{text} and {len(names) - most} more'
