"""Checkpoints are complete or invisible."""
import os

import pytest

import checkpoint


def write(directory, step, **more):
    checkpoint.write(str(directory), 'float', step, {'step': step}, {
        'net.params': lambda path: open(path, 'w').close(), **more})


def test_the_newest_is_found_and_two_are_kept(tmp_path):
    for step in (8, 9, 10, 11):
        write(tmp_path, step)
    path, state = checkpoint.latest(str(tmp_path))
    assert state == {'step': 11} and os.listdir(path)
    assert sorted(os.listdir(tmp_path)) == ['00010-float_10', '00011-float_11']


def test_a_checkpoint_that_was_not_finished_is_ignored_and_replaced(tmp_path):
    write(tmp_path, 1)

    def fail(path):
        with open(path, 'w') as file:
            file.write('half')
        raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'):
        write(tmp_path, 2, **{'trainer.states': fail})
    assert checkpoint.latest(str(tmp_path))[1] == {'step': 1}
    write(tmp_path, 2)
    path, state = checkpoint.latest(str(tmp_path))
    assert state == {'step': 2} and 'trainer.states' not in os.listdir(path)


def test_without_checkpoints_there_is_none(tmp_path):
    assert checkpoint.latest(str(tmp_path / 'missing')) == (None, None)
