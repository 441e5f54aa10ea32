"""Where the methods register, one table for each role."""
from ..registry import Registry

TABLES = {'weight': Registry('weight quantizer'), 'activation': Registry('activation quantizer')}


def _register(role, name):
    enter = TABLES[role].register(name)

    def named(cls):
        cls.method = name
        return enter(cls)
    return named


def weight(name):
    """Class decorator: a method for weights."""
    return _register('weight', name)


def activation(name):
    """Class decorator: a method for activations."""
    return _register('activation', name)
