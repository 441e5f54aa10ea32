"""Run every cell of a table of results, one after the other: finished ones are skipped, others continued.

    python recipes/sweep.py results/cifar10_methods/sweep.json --save-dir outputs/cifar10_methods \
        --data-dir DIR --float-params FILE [--only lsq pact]

The sweep file has options for all cells, for columns (methods), rows (bits, epochs) and single cells; later ones win,
{cell} stands for the cell's name, and false takes an option back. Cell ROW_COLUMN starts from the weights of the
cell of the row's "start" in the same column, if there is one: fewer bits start from more. A row that not all columns
have lists its "columns". Rows with "from" show cells of another sweep; "hidden" ones are stages on the way, which no
table shows. "recipe" is the script, by default image_classification.py, and "inputs" what its commands need besides, as
pages show it. Options that this one does not know go to every run.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('sweep', help='JSON file')
    parser.add_argument('--save-dir', required=True, help='folder that gets a folder for each cell')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='rows, columns or cells; default: all')
    parser.add_argument('--dry-run', action='store_true', help='print the commands that remain')
    return parser.parse_known_args(argv)


def read(path):
    """The sweep as a dict; ValueError names what is wrong in it."""
    with open(path) as file:
        sweep = json.load(file)
    for row, options in sweep['rows'].items():
        start = options.get('start')
        if start is not None and start not in list(sweep['rows'])[:list(sweep['rows']).index(row)]:
            raise ValueError(f'{path}: row {row} starts from {start}, which is no row before it')
        unknown = [column for column in options.get('columns', ()) if column not in sweep['columns']]
        if unknown:
            raise ValueError(f'{path}: row {row} lists {unknown[0]}, which is no column')
    return sweep


def cells(sweep):
    """[(row, column)] in the order in which they run."""
    return [(row, column) for column in sweep['columns'] for row, options in sweep['rows'].items()
            if column in options.get('columns', sweep['columns']) and 'from' not in options]


def name(row, column):
    """The name of a cell's folder."""
    return f'{row}_{column}'


def command(sweep, row, column, save_dir, more):
    """The command line of one cell."""
    merged = {**sweep['options'], **sweep['columns'][column], **sweep['rows'][row],
              **sweep.get('cells', {}).get(name(row, column), {})}
    start = merged.get('start')
    words = []
    for option, value in merged.items():
        if option.startswith('--') and value is not False:
            words += [option] if value is True else [option, str(value).replace('{cell}', name(row, column))]
    if (start, column) in cells(sweep):
        words += ['--start-from', os.path.join(save_dir, name(start, column))]
    return [*words, '--save-dir', os.path.join(save_dir, name(row, column)), *more]


def main():
    args, more = parse_args()
    sweep = read(args.sweep)
    failed = []
    for row, column in cells(sweep):
        folder = os.path.join(args.save_dir, name(row, column))
        if args.only and not {row, column, name(row, column)} & set(args.only):
            continue
        if os.path.exists(os.path.join(folder, 'results.json')):
            continue
        words = [sys.executable, os.path.relpath(HERE / sweep.get('recipe', 'image_classification.py')),
                 *command(sweep, row, column, args.save_dir, more), '--resume']
        print(shlex.join(words), flush=True)
        if not args.dry_run and subprocess.run(words).returncode:
            failed.append(name(row, column))
    if failed:
        sys.exit(f'these cells failed: {", ".join(failed)}. Their logs say why.')


if __name__ == '__main__':
    main()
