"""Names: registration, lookup, and the help a wrong name gets."""
import pytest

from gluonquant import quantizers
from gluonquant.quantizers.registry import TABLES
from gluonquant.registry import Registry, nearest


@pytest.fixture
def shapes():
    registry = Registry('shape')
    registry.register('square')(int)
    registry.register('circle')(float)
    return registry


def test_a_registered_class_is_found_by_name(shapes):
    assert shapes.get('circle') is float


def test_names_are_sorted(shapes):
    assert shapes.names() == ['circle', 'square']


def test_registering_returns_the_class_itself(shapes):
    assert shapes.register('line')(str) is str


def test_a_duplicate_is_refused_and_changes_nothing(shapes):
    with pytest.raises(ValueError, match=r"shape 'square' is already registered as <class 'int'>"):
        shapes.register('square')(str)
    assert shapes.get('square') is int


def test_an_unknown_name_shows_the_nearest_and_all(shapes):
    with pytest.raises(ValueError, match="unknown shape 'cirle'. Did you mean 'circle'. Known shapes: circle, square"):
        shapes.get('cirle')


def test_a_name_that_is_close_to_none_gets_no_suggestion(shapes):
    with pytest.raises(ValueError, match="unknown shape 'xyz'. Known shapes: circle, square"):
        shapes.get('xyz')


@pytest.mark.parametrize('name', [None, 3, ['circle'], {}])
def test_a_name_that_is_no_string_is_a_value_error(shapes, name):
    with pytest.raises(ValueError, match='unknown shape'):
        shapes.get(name)


def test_nearest_prefers_the_closest():
    assert nearest('lsq+', ['lsq', 'lsqplus', 'pact']) == " Did you mean 'lsq'?"
    assert nearest('', ['lsq']) == ''


# quantizers


def test_all_methods_are_available():
    assert quantizers.available() == ['affine', 'cliprelu', 'dorefa', 'fqn', 'gdrq', 'int8', 'lsq', 'lsqplus', 'none',
                                      'pact', 'qil', 'sawb']
    assert set(quantizers.available()) - set(quantizers.available('weight')) == {'cliprelu', 'pact'}
    assert set(quantizers.available()) - set(quantizers.available('activation')) == {'sawb'}


@pytest.mark.parametrize('wrong, right', [('lsqq', 'lsq'), ('LSQ', None), ('dorfa', 'dorefa'), ('int-8', 'int8')])
def test_create_suggests_the_nearest_method(wrong, right):
    suggestion = rf"\. Did you mean '{right}'\?" if right else ''
    with pytest.raises(ValueError, match=rf"unknown weight quantizer '{wrong}'{suggestion}.*Known weight quanti"):
        quantizers.create(wrong, 4)


def test_an_activation_method_for_weights_says_so():
    with pytest.raises(ValueError, match="'pact' quantizes activations only. For a weight use one of: affine, dorefa"):
        quantizers.create('pact', 4, 'weight')


def test_a_weight_method_for_activations_says_so():
    with pytest.raises(ValueError, match="'sawb' quantizes weights only. For an? activation use one of: aff"):
        quantizers.create('sawb', 4, 'activation')


@pytest.mark.parametrize('role', ['weights', None, 'bias'])
def test_an_unknown_role_is_an_error(role):
    with pytest.raises(ValueError, match=rf"role={role!r}: pass 'weight' or 'activation'"):
        quantizers.create('lsq', 4, role)


def test_a_class_registers_beside_its_name():
    with pytest.raises(ValueError, match="weight quantizer 'lsq' is already registered"):
        TABLES['weight'].register('lsq')(object)
    assert quantizers.LSQWeight is TABLES['weight'].get('lsq')
