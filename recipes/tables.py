"""Write the tables of results, and their picture, from the results.json of every run.

    python recipes/tables.py                          # README.md and results/README.md; what is there is replaced
    python recipes/tables.py --check                  # only says what disagrees
    python recipes/tables.py --collect outputs/x results/x      # first copy the results and logs of finished runs

A table stands between two comments, `<!-- table NAME -->` and `<!-- end -->`; NAME is a folder of results/ that has a
sweep.json (see sweep.py), and after a space what to show: accuracy (default), calibrated (the same before training),
gaps, epochs, commands.
"""
import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import statistics
import sys
from pathlib import Path

import sweep

ROOT = Path(__file__).resolve().parents[1]
PAGES = ('README.md', 'results/README.md')
COPIED = ('results.json', 'train.log', 'curves.png')
PICTURE = 'gaps.png'
_PLACE = re.compile(r'(<!-- table (\S+)(?: (\w+))? -->\n).*?(<!-- end -->)', re.S)


class Results:
    """The runs of one sweep: what its file says, and each cell's results.json."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.sweep = sweep.read(self.folder / 'sweep.json')
        self.rows = {row: options for row, options in self.sweep['rows'].items() if not options.get('hidden')}
        self.measure = self.sweep.get('measure', 'top-1, %')
        self.cells = {}
        for row, column in itertools.product(self.rows, self.sweep['columns']):
            path = self.place(row, column) / 'results.json'
            if path.exists():
                with open(path) as file:
                    cell = self.cells[row, column] = json.load(file)
                if 'mean_ap' in cell:       # of a detector
                    cell['accuracy'] = {stage: found['mAP'] for stage, found in cell['mean_ap'].items()}

    def place(self, row, column):
        """The folder of a cell, which may be one of another sweep."""
        source = self.sweep['rows'][row].get('from')
        return self.folder / (sweep.name(row, column) if source is None else sweep.name(source, column))

    @property
    def float_accuracy(self):
        """Top-1, or of detectors mAP, in 0..1; ValueError if the cells started from different float nets."""
        found = {cell['accuracy']['float'] for cell in self.cells.values()}
        if not found:
            raise ValueError(f'{self.folder}: no run has finished yet. Run sweep.py, then tables.py --collect')
        if len(found) != 1:
            raise ValueError(f'{self.folder}: the runs start from float nets of {sorted(found)}')
        return found.pop()

    def accuracy(self, row, column):
        """That of the cell in percent after the last epoch (without any: calibrated only), or None."""
        cell = self.cells.get((row, column))
        return cell and 100 * list(cell['accuracy'].values())[-1]

    def gap(self, row, column):
        """Float minus quantized in points, or None; rounded, so that it is what the table's accuracies give."""
        cell = self.accuracy(row, column)
        return None if cell is None else round(100 * self.float_accuracy - cell, 2)


def rows_of(what, results, page):
    """The lines of one table."""
    rows, columns = results.rows, results.sweep['columns']
    columns = {name: options for name, options in columns.items() if any((row, name) in results.cells for row in rows)}
    first = {'accuracy': results.measure, 'calibrated': results.measure, 'gaps': 'points below float',
             'epochs': 'epochs'}[what]
    lines = [[first, *(options['title'] for options in columns.values())], ['---'] * (1 + len(columns))]
    if what == 'accuracy':
        lines.append([f'float: {100 * results.float_accuracy:.2f}', *[''] * len(columns)])
    for row, options in rows.items():
        line = [options['title']]
        for column in columns:
            text = ''
            if (row, column) in results.cells:
                text = _entry(what, results, row, column)
                if what != 'epochs':
                    text = f'[{text}]({os.path.relpath(results.place(row, column), (ROOT / page).parent)}/train.log)'
            line.append(text)
        lines.append(line)
    if what == 'accuracy' and results.sweep.get('spread'):
        lines.append(['mean, standard deviation', *(_spread(results, column) for column in columns)])
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def _entry(what, results, row, column):
    cell = results.cells[row, column]
    if what == 'accuracy':
        return f'{results.accuracy(row, column):.2f}'
    if what == 'calibrated':
        return f"{100 * cell['accuracy']['calibrated only']:.2f}"
    if what == 'gaps':
        return _against(results.gap(row, column), results.rows[row].get('published', {}).get(column))
    here = cell['options']['num_epochs']
    return str(here) if here == cell['epochs'] else f"{here} ({cell['epochs']})"


def _spread(results, column):
    values = [results.accuracy(row, column) for row in results.rows if (row, column) in results.cells]
    return f'{statistics.mean(values):.2f}, {statistics.stdev(values):.2f}' if len(values) > 1 else ''


def _against(gap, published):
    """A gap and, if there is one, the published gap, with a mark where it is not reached."""
    if published is None:
        return f'{gap:.2f}'
    return f"{gap:.2f} ({'' if gap <= published else 'not '}{published:.1f})"


def commands(results):
    """How to run every cell again."""
    name = results.folder.name
    seeds = sorted({cell['options']['seed'] for cell in results.cells.values()})
    inputs = results.sweep.get('inputs', '--data-dir DATA --float-params FLOAT')
    return (f'```bash\npython recipes/sweep.py results/{name}/sweep.json --save-dir outputs/{name} {inputs}\n```\n'
            f'Seed {", ".join(map(str, seeds))}.\n')


def filled(page, text):
    """`text` of `page` with every table made anew."""
    def replace(match):
        results = Results(ROOT / 'results' / match[2])
        what = match[3] or 'accuracy'
        made = commands(results) if what == 'commands' else rows_of(what, results, page)
        return f'{match[1]}{made}{match[4]}'
    return _PLACE.sub(replace, text)


def folders():
    """The folders of results that pages show."""
    return sorted({match[2] for page in PAGES for match in _PLACE.finditer((ROOT / page).read_text())})


def fingerprint(results):
    """A hash of what the picture shows; it is written into the picture."""
    titles = [part['title'] for parts in (results.rows, results.sweep['columns']) for part in parts.values()]
    gaps = {sweep.name(*cell): results.gap(*cell) for cell in sorted(results.cells)}
    shown = [results.sweep['title'], results.float_accuracy, titles, gaps]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def draw(results):
    """Gaps to float by method, a group of bars for each row of the table."""
    import report  # for matplotlib without a display
    plt = report.plt
    rows, columns = results.rows, results.sweep['columns']
    shown = [column for column in columns if any((row, column) in results.cells for row in rows)]
    figure, axes = plt.subplots(figsize=(10, 4.5), constrained_layout=True)
    width = 0.8 / max(len(shown), 1)
    for place, column in enumerate(shown):
        cells = [(i, results.gap(row, column)) for i, row in enumerate(rows) if (row, column) in results.cells]
        axes.bar([i + (place - (len(shown) - 1) / 2) * width for i, _ in cells], [gap for _, gap in cells], width,
                 label=columns[column]['title'])
    axes.set_xticks(range(len(rows)), [options['title'] for options in rows.values()])
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_yscale('symlog', linthresh=1)
    axes.set_yticks([-0.5, 0, 0.5, 1, 2, 5, 10, 20, 50], ['-0.5', '0', '0.5', '1', '2', '5', '10', '20', '50'])
    gaps = [results.gap(*cell) for cell in results.cells]
    axes.set_ylim(min(-0.1, 1.2 * min(gaps)), max(0.5, 1.3 * max(gaps)))
    axes.axhline(0, color='black', linewidth=0.8)
    axes.grid(axis='y', alpha=0.3)
    axes.set(ylabel='points below float', title=f"{results.sweep['title']}, float {100 * results.float_accuracy:.2f} %")
    figure.legend(loc='outside lower center', ncol=5, fontsize=8)
    figure.savefig(results.folder / PICTURE, dpi=110, metadata={'Source': fingerprint(results)})
    plt.close(figure)


def drawn(results):
    """The fingerprint in the picture there is, or None."""
    from PIL import Image
    path = results.folder / PICTURE
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.text.get('Source')


def collect(source, target):
    """Copy what finished runs below `source` leave behind to `target`."""
    for path in sorted(Path(source).glob('*/results.json')):
        folder = Path(target) / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            if (path.parent / name).exists():
                shutil.copy(path.parent / name, folder / name)


def disagreements():
    """What a page or a picture says that the runs do not."""
    found = [page for page in PAGES if filled(page, (ROOT / page).read_text()) != (ROOT / page).read_text()]
    return found + [f'results/{name}/{PICTURE}' for name in folders()
                    if drawn(Results(ROOT / 'results' / name)) != fingerprint(Results(ROOT / 'results' / name))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--check', action='store_true', help='change nothing; status 1 if something disagrees')
    parser.add_argument('--collect', nargs=2, metavar=('FROM', 'TO'), help='copy finished runs first')
    args = parser.parse_args()
    if args.collect:
        collect(*args.collect)
    if args.check:
        found = disagreements()
        sys.exit(f'out of date: {", ".join(found)}. Run python recipes/tables.py' if found else 0)
    for page in PAGES:
        text = (ROOT / page).read_text()
        if filled(page, text) != text:
            (ROOT / page).write_text(filled(page, text))
    for name in folders():
        draw(Results(ROOT / 'results' / name))


if __name__ == '__main__':
    main()
