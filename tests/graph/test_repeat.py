"""`runs`: what repeats, and nothing else."""
import sys
from collections import Counter
from dataclasses import dataclass, field

from gluonquant.graph.repeat import runs


@dataclass(eq=False)
class Item:
    key: str
    inputs: list = field(default_factory=list)
    group: str = None


def chain(keys, nodes=None):
    """Items of these keys, each of which reads the one before."""
    nodes = [Item('data')] if nodes is None else nodes
    for key in keys:
        nodes.append(Item(key, [(nodes[-1], 0)]))
    return nodes


def residual(nodes, swapped=False, group=None):
    """A block of three items behind the last one: 'conv', 'conv', and their sum with what the first reads."""
    start = nodes[-1]
    chain(['conv', 'conv'], nodes)
    inputs = [(nodes[-1], 0), (start, 0)]
    nodes.append(Item('add', inputs[::-1] if swapped else inputs))
    for node in nodes[-3:-1]:
        node.group = group
    return nodes


def found(nodes):
    """[(how often, what)] of the runs."""
    return [(len(copies), ''.join(node.key[0] for node in copies[0])) for copies in runs(nodes)]


def test_equal_items_in_a_row_are_one_run():
    assert found(chain('xaaaaay')) == [(5, 'a')]


def test_a_pattern_of_several_items_repeats_as_a_whole():
    assert found(chain('xabcabcabcy')) == [(3, 'abc')]


def test_the_shortest_pattern_is_taken_and_begins_as_early_as_it_can():
    assert found(chain('abababab')) == [(4, 'ab')]
    assert found(chain('xbabababy')) == [(3, 'ba')]


def test_runs_that_follow_each_other_are_all_found():
    assert sorted(found(chain('xaaaaybbbbzcdcdcd'))) == [(3, 'cd'), (4, 'a'), (4, 'b')]


def test_two_single_items_are_not_worth_a_frame():
    assert found(chain('xaay')) == []
    assert found(chain('xaaay')) == [(3, 'a')]


def test_blocks_with_a_shortcut_repeat_and_the_copies_stand_in_the_same_order():
    nodes = chain('x')
    for _ in range(4):
        residual(nodes)
    (copies,) = runs(chain('y', nodes))
    assert copies == [nodes[2 + 3 * number:5 + 3 * number] for number in range(4)]


def test_blocks_of_the_same_items_that_are_wired_differently_are_not_equal():
    assert found(residual(residual(chain('x')), swapped=True)) == []
    assert found(residual(residual(chain('x')))) == [(2, 'cca')]


def test_other_outputs_of_an_item_are_other_tensors():
    nodes = residual(residual(chain('x')))
    nodes[-1].inputs[0] = (nodes[-1].inputs[0][0], 1)
    assert found(nodes) == []


def test_blocks_that_share_something_inside_are_equal_and_those_that_share_it_outside_are_not():
    assert found(residual(residual(chain('x'), group='p'), group='q')) == [(2, 'cca')]
    nodes = residual(residual(chain('x'), group='p'), group='q')
    nodes.append(Item('y', [(nodes[-1], 0)], 'q'))
    assert found(nodes) == []


def test_blocks_that_all_share_one_thing_are_equal():
    assert found(residual(residual(chain('x'), group='p'), group='p')) == [(2, 'cca')]


def test_an_item_that_is_read_from_elsewhere_ends_a_run_and_another_begins_behind_it():
    nodes = chain('xaaaaaay')
    nodes[-1].inputs.append((nodes[4], 0))
    assert sorted([nodes.index(copy[0]) for copy in copies] for copies in runs(nodes)) == [[2, 3, 4], [5, 6, 7]]


def test_a_block_behind_which_something_inside_is_read_belongs_to_no_run():
    nodes = residual(residual(residual(chain('x'))))
    nodes.append(Item('y', [(nodes[-1], 0), (nodes[2], 0)]))
    (copies,) = runs(nodes)
    assert [copy[0] for copy in copies] == [nodes[5], nodes[8]]


def test_a_block_of_which_an_output_is_made_inside_belongs_to_no_run():
    nodes = residual(residual(residual(chain('x'))))
    nodes.append(Item('y', [(nodes[5], 0)]))
    assert found(nodes) == []


def test_a_run_inside_of_a_branch_is_found():
    nodes = chain('xaaa')
    nodes.append(Item('join', [(nodes[-1], 0), (nodes[1], 0)]))
    assert found(nodes) == [(3, 'a')]


def test_what_repeats_inside_of_repeated_blocks_stays_whole():
    nodes = chain('x')
    for _ in range(3):
        start = nodes[-1]
        chain('aaa', nodes)
        nodes.append(Item('join', [(nodes[-1], 0), (start, 0)]))
    assert found(nodes) == [(3, 'aaaj')]


def test_inputs_and_outputs_beside_the_chain_do_no_harm():
    nodes = [Item('mask'), *chain('xaaaa')]
    nodes += [Item('join', [(nodes[-1], 0), (nodes[0], 0)]), Item('constant')]
    assert found(nodes) == [(4, 'a')]


def test_work_grows_with_the_number_of_items_only():
    def steps(count):
        nodes = chain('x')
        for number in range(count):
            residual(nodes)[-1].key = f'add{number}'
        lines, before = Counter(), sys.gettrace()

        def trace(frame, event, _):
            lines[event] += 1
            return trace
        sys.settrace(trace)
        try:
            assert runs(nodes) == []
        finally:
            sys.settrace(before)
        return lines['line']
    # Linear: 4 times as many. Quadratic: 16 times.
    assert steps(800) < 5 * steps(200)
