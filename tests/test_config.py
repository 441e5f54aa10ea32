"""Rules, specs and plans: frozen values, to and from plain dicts."""
import json
from dataclasses import FrozenInstanceError

import pytest

import gluonquant as gq
from gluonquant.config import matches

PLAN = gq.LayerConfig(gq.QuantizerSpec('lsq', 4, per_channel=True, options={'ewgs': 0.2}),
                      gq.QuantizerSpec('gdrq', 3, signed=False, options={'ktimes': 4.0, 'lam': 0.01}), 8, 'features.0')


@pytest.mark.parametrize('pattern, path', [
    ('features.4', 'features.4'), ('features.4', 'features.4.body.0'), ('features.*', 'features.4.body.0'),
    ('*.body.?', 'features.4.body.0'), ('feat*', 'features.4'), ('*', ''), ('', ''), ('[0-2]', '1'),
    ('[!0]', '1.body')])
def test_a_pattern_matches_a_layer_and_what_lies_below_its_block(pattern, path):
    assert matches(pattern, path)


@pytest.mark.parametrize('pattern, path', [
    ('features.4', 'features.41'), ('features.4', 'features'), ('body', 'features.4.body'),
    ('Features.*', 'features.4'), ('[0-2]', '3'), ('features.?', 'features.10'), ('', '0')])
def test_a_pattern_does_not_match_its_neighbours(pattern, path):
    assert not matches(pattern, path)


def test_a_rule_matches_as_its_pattern_does():
    assert gq.Rule('features.*').matches('features.1') and not gq.Rule('features.*').matches('output')


def test_an_empty_rule_changes_nothing():
    assert gq.Rule('*').apply(PLAN) == PLAN


def test_bits_set_both_roles():
    config = gq.Rule('*', bits=2).apply(PLAN)
    assert (config.weight.bits, config.activation.bits) == (2, 2)


@pytest.mark.parametrize('own, expected', [({'weight_bits': 5}, (5, 2)), ({'activation_bits': 5}, (2, 5))])
def test_bits_of_a_role_win_over_bits(own, expected):
    config = gq.Rule('*', bits=2, **own).apply(PLAN)
    assert (config.weight.bits, config.activation.bits) == expected


def test_options_merge_while_the_method_stays():
    config = gq.Rule('*', activation_options={'lam': 0.5}).apply(PLAN)
    assert config.activation.options == {'ktimes': 4.0, 'lam': 0.5} and config.weight == PLAN.weight


def test_naming_the_same_method_keeps_its_options():
    assert gq.Rule('*', activation='gdrq').apply(PLAN) == PLAN


def test_another_method_drops_the_options():
    config = gq.Rule('*', activation='pact', activation_options={'ewgs': 0.1}).apply(PLAN)
    assert (config.activation.method, config.activation.options) == ('pact', {'ewgs': 0.1})


def test_false_is_a_value_and_none_is_not():
    config = gq.Rule('*', per_channel=False, signed=None).apply(PLAN)
    assert config.weight.per_channel is False and config.activation.signed is False


def test_applying_a_rule_leaves_its_input_alone():
    gq.Rule('*', bits=2, activation_options={'lam': 0.5}).apply(PLAN)
    assert PLAN.activation.options == {'ktimes': 4.0, 'lam': 0.01} and PLAN.weight.bits == 4


def test_a_plan_survives_json():
    assert gq.LayerConfig.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


def test_plans_differ_if_any_value_does():
    assert gq.LayerConfig(PLAN.weight, PLAN.activation) != PLAN
    assert gq.Rule('*', activation_options={'lam': 0.02}).apply(PLAN) != PLAN


@pytest.mark.parametrize('value, field', [(PLAN, 'gradient_bits'), (PLAN.weight, 'bits'), (gq.Rule('*'), 'bits')])
def test_configuration_is_frozen(value, field):
    with pytest.raises(FrozenInstanceError, match=field):
        setattr(value, field, 3)


def test_a_plan_from_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match='colour'):
        gq.LayerConfig.from_dict({**PLAN.to_dict(), 'colour': 'red'})
