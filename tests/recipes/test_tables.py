"""Sweeps run what their file says, and the pages of results say what the runs say."""
import json
from pathlib import Path

import pytest

import ssd_options
import sweep
import tables
from options import parse_args

ROOT = Path(__file__).parents[2]
SWEEPS = sorted(ROOT.glob('results/*/sweep.json'))
FILE = {'title': 'Small', 'options': {'--float-params': 'f', '--batch-size': 8},
        'rows': {'w4': {'title': 'W4', '--bits': 4, 'published': {'a': 0.5, 'b': 0.1}},
                 'w2': {'title': 'W2', '--bits': 2, 'start': 'w4', 'columns': ['a']}},
        'columns': {'a': {'title': 'A', '--method': 'lsq'},
                    'b': {'title': 'B', '--graph': True, '--batch-size': False}},
        'cells': {'w4_b': {'--start-from': 'other/{cell}'}}}


def write(folder, float_accuracy=0.9, **accuracies):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / 'sweep.json').write_text(json.dumps(FILE))
    for name, accuracy in accuracies.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / 'results.json').write_text(json.dumps(
            {'accuracy': {'float': float_accuracy, 'calibrated only': 0.5, 'fine-tuned': accuracy}, 'epochs': 5,
             'options': {'num_epochs': 2, 'seed': 0}}))
    return folder


def test_a_sweep_runs_every_cell_and_starts_fewer_bits_from_more():
    assert sweep.cells(FILE) == [('w4', 'a'), ('w2', 'a'), ('w4', 'b')]
    assert sweep.command(FILE, 'w2', 'a', 'out', ['--seed', '1']) == [
        '--float-params', 'f', '--batch-size', '8', '--method', 'lsq', '--bits', '2', '--start-from', 'out/w4_a',
        '--save-dir', 'out/w2_a', '--seed', '1']
    assert sweep.command(FILE, 'w4', 'b', 'out', []) == [
        '--float-params', 'f', '--graph', '--bits', '4', '--start-from', 'other/w4_b', '--save-dir', 'out/w4_b']
    first = {**FILE, 'rows': {'w4': {**FILE['rows']['w4'], 'columns': ['b']}, 'w2': FILE['rows']['w2']}}
    assert '--start-from' not in sweep.command(first, 'w2', 'a', 'out', [])     # its column has no row to start from


def test_a_row_that_starts_from_a_later_one_is_refused(tmp_path):
    wrong = {**FILE, 'rows': dict(reversed(FILE['rows'].items()))}
    (tmp_path / 'sweep.json').write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match='row w2 starts from w4'):
        sweep.read(tmp_path / 'sweep.json')


def test_a_row_that_lists_an_unknown_column_is_refused(tmp_path):
    (tmp_path / 'sweep.json').write_text(json.dumps({**FILE, 'columns': {'b': FILE['columns']['b']}}))
    with pytest.raises(ValueError, match='row w2 lists a, which is no column'):
        sweep.read(tmp_path / 'sweep.json')


@pytest.mark.parametrize('path', SWEEPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_option_of_a_sweep_is_one_of_the_recipe(path, tmp_path):
    found = sweep.read(path)
    for row, column in sweep.cells(found):
        words = sweep.command(found, row, column, 'out', [])
        start = words.index('--start-from') if '--start-from' in words else len(words)
        words = [*words[:start], *words[start + 2:]]
        if found.get('recipe') == 'train_ssd.py':
            ssd_options.parse_args([*words, '--epochs', '1'])
        else:
            parse_args([*words, '--data-dir', 'DATA', '--float-epochs', '1'])


def test_the_page_says_what_the_runs_say(tmp_path, monkeypatch):
    folder = write(tmp_path / 'results' / 'small', w4_a=0.896, w2_a=0.75, w4_b=0.899)
    (tmp_path / 'README.md').write_text('# Page\n<!-- table small gaps -->\nold\n<!-- end -->\nrest\n')
    (tmp_path / 'results' / 'README.md').write_text('<!-- table small -->\n<!-- end -->\n')
    monkeypatch.setattr(tables, 'ROOT', tmp_path)
    assert tables.disagreements() == ['README.md', 'results/README.md', 'results/small/gaps.png']
    monkeypatch.setattr('sys.argv', ['tables.py'])
    tables.main()
    assert tables.disagreements() == []
    text = (tmp_path / 'README.md').read_text()
    assert '| W4 | [0.40 (0.5)](results/small/w4_a/train.log) | [0.10 (0.1)](results/small/w4_b/train.log) |' in text
    assert '| W2 | [15.00](results/small/w2_a/train.log) |  |' in text and text.endswith('rest\n')
    text = (tmp_path / 'results' / 'README.md').read_text()
    assert '| float: 90.00 |' in text and '| W4 | [89.60](small/w4_a/train.log) |' in text
    assert '| W4 | [50.00]' in tables.rows_of('calibrated', tables.Results(folder), 'README.md')
    write(folder, w2_a=0.76)
    assert tables.disagreements() == ['README.md', 'results/README.md', 'results/small/gaps.png']
    tables.main()
    (folder / 'sweep.json').write_text(json.dumps({**FILE, 'title': 'Renamed'}))
    assert tables.disagreements() == ['results/small/gaps.png']


def test_seeds_have_a_mean_and_a_spread_and_may_stand_in_another_folder(tmp_path):
    write(tmp_path / 'main', w4_a=0.896)
    folder = write(tmp_path / 'seeds', one_a=0.898)
    (folder / 'sweep.json').write_text(json.dumps({**FILE, 'spread': True, 'cells': {}, 'rows': {
        'zero': {'title': 'seed 0', 'from': '../main/w4'}, 'one': {'title': 'seed 1', '--seed': 1}}}))
    results = tables.Results(folder)
    assert sweep.cells(results.sweep) == [('one', 'a'), ('one', 'b')]
    text = tables.rows_of('accuracy', results, 'README.md')
    assert 'main/w4_a/train.log' in text and text.endswith('| mean, standard deviation | 89.70, 0.14 |\n')


def test_a_gap_that_is_not_reached_says_so_and_other_float_nets_are_an_error(tmp_path):
    assert tables._against(0.61, 0.6) == '0.61 (not 0.6)' and tables._against(0.6, 0.6) == '0.60 (0.6)'
    folder = write(tmp_path / 'small', w4_a=0.896)
    write(folder, float_accuracy=0.8, w4_b=0.7)
    with pytest.raises(ValueError, match=r'float nets of \[0.8, 0.9\]'):
        tables.Results(folder).gap('w4', 'a')


def test_finished_runs_are_collected_without_their_weights(tmp_path):
    source = write(tmp_path / 'small', w4_a=0.896)
    for name in ('train.log', 'curves.png', 'quantized.params'):
        (source / 'w4_a' / name).write_text(name)
    (source / 'w4_b').mkdir()
    tables.collect(source, tmp_path / 'target')
    assert sorted(path.name for path in (tmp_path / 'target').rglob('*')) == [
        'curves.png', 'results.json', 'train.log', 'w4_a']


def test_the_results_of_this_checkout_are_what_its_pages_say():
    assert tables.disagreements() == []
