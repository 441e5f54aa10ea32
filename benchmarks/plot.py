"""A picture of what train_step.py measured: time and memory over the float net, by net, method and tier.

    python benchmarks/plot.py results/train_step.json results/train_step.png
"""
import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')           # before pyplot, which would look for a display
import matplotlib.pyplot as plt  # noqa: E402

COLORS = {'pure': '#b8c4d6', 'portable': '#5b8db8', 'layout': '#d9822b'}
WIDTH = 0.28        # of a bar; there are up to three for a method
BEHIND_NUMBER = {'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.8, 'pad': 0.5}


def draw(axes, rows, field):
    """Bars for the methods of one net, a color for each tier; returns {label: what the legend shows}."""
    found = {(row['method'], row['tier']): row[field] for row in rows}
    methods = list(dict.fromkeys(method for method, _ in found if method != 'float'))
    tiers = [tier for tier in COLORS if any(tier == other for _, other in found)]
    shown = {}
    for number, tier in enumerate(tiers):
        places = [place + WIDTH * (number - (len(tiers) - 1) / 2) for place in range(len(methods))]
        values = [found.get((method, tier), 0) for method in methods]
        shown[tier] = axes.bar(places, values, 0.93 * WIDTH, color=COLORS[tier])
        axes.bar_label(shown[tier], fmt='%.2f', fontsize=8, padding=1, bbox=BEHIND_NUMBER)
    shown['float net, tuned'] = axes.axhline(1, color='black', linewidth=1)
    if field == 'time_per_tuned':
        shown['float net, stock'] = axes.axhline(found['float', 'stock'], color='gray', linestyle='--', linewidth=1)
    axes.set_xticks(range(len(methods)))
    axes.set_xticklabels(methods)
    axes.tick_params(axis='x', length=0)
    axes.spines[['top', 'right']].set_visible(False)
    axes.margins(y=0.08)
    return shown


def plot(figures, path):
    """A column of panels for each net; rows for the time with each number of threads and for memory."""
    rows = figures['rows']
    nets = {row['net']: f'{row["model"]}, batch {row["batch"]}' for row in rows}
    panels = [(f'time, {threads} thread{"s" * (threads > 1)}', 'time_per_tuned',
               [row for row in rows if row['threads'] == threads])
              for threads in sorted({row['threads'] for row in rows})]
    measured = [row for row in rows if 'memory_per_tuned' in row]
    panels += [('peak memory', 'memory_per_tuned', measured)] * bool(measured)
    figure, all_axes = plt.subplots(len(panels), len(nets), sharey='row', squeeze=False, constrained_layout=True,
                                    figsize=(max(7, 1 + 3.2 * len(nets)), 0.8 + 2.6 * len(panels)))
    shown = {}
    for line, (title, field, found) in zip(all_axes, panels):
        line[0].set_ylabel(f'{title}\n/ float net, tuned')
        for axes, net in zip(line, nets):
            shown.update(draw(axes, [row for row in found if row['net'] == net], field))
    for axes, name in zip(all_axes[0], nets.values()):
        axes.set_title(name, fontsize=11)
    figure.legend(shown.values(), shown.keys(), loc='outside lower center', ncol=len(shown), frameon=False)
    figure.suptitle(f'One training step at {rows[0]["bits"]} bits ({figures["machine"]["cpu"]})', fontweight='bold')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('figures', type=Path, help='JSON file that train_step.py wrote')
    parser.add_argument('picture', type=Path, help='PNG file to write')
    args = parser.parse_args()
    plot(json.loads(args.figures.read_text(encoding='utf8')), args.picture)


if __name__ == '__main__':
    main()
