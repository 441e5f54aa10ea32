"""Gigabytes per second of the compiled kernels, beside those of a triad, a[i] = b[i] + s * c[i], of the same size.

    python benchmarks/kernels.py --output results/kernels.json

One thread; tensors that fit the second-level cache and tensors that fit no cache; every instruction set of this
machine. A triad that moves as many bytes runs before each kernel, so that a slow spell of the machine hits both; the
share is that of the medians. Bytes are counted as kernels.cc says, which is compiled with the operators' own sources
and flags.
"""
import argparse
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from common import machine, save

from gluonquant.ops import build

HERE = Path(__file__).resolve().parent
ROW = 4096      # elements; sizes of tensors are multiples of it


def compile_program(folder):
    """The program of kernels.cc, made in ``folder``."""
    sources = [(build.SOURCES / 'kernels.cc', [f'-DGLUONQUANT_ISA={isa}', *flags])
               for isa, flags in build.INSTRUCTION_SETS.items()]
    sources += [(path, []) for path in (build.SOURCES / 'activation.cc', build.SOURCES / 'weight.cc',
                                        HERE / 'kernels.cc')]
    compiler = build.find_compiler()
    if compiler is None:
        raise build.BuildError('there is no C++ compiler: install g++, or set CXX')
    objects = [str(Path(folder, f'{number}.o')) for number in range(len(sources))]
    for (source, flags), target in zip(sources, objects):
        subprocess.run([*compiler, *build.FLAGS, '-w', f'-I{build.SOURCES}', *flags, '-c', str(source), '-o', target],
                       check=True)
    program = str(Path(folder, 'kernels'))
    subprocess.run([*compiler, *objects, '-ldl', '-lm', '-o', program], check=True)
    return program


def run(program, isa, *arguments):
    """What the program prints, limited to an instruction set."""
    environment = {**os.environ, 'GLUONQUANT_ISA': isa}
    done = subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True,
                          env=environment)
    return done.stdout.splitlines()


def measure(program, isa, megabytes, rounds):
    """A dict for each row of kernels.cc, for tensors of this size."""
    elements = max(1, round(megabytes * 2 ** 20 / 4 / ROW)) * ROW
    seconds = {}
    for line in run(program, isa, elements, rounds):
        *row, kernel, triad = line.split('\t')
        seconds.setdefault(tuple(row), []).append((float(kernel), float(triad)))
    for (name, moves, count), pairs in seconds.items():
        kernel, triad = map(statistics.median, zip(*pairs))
        bytes_moved = float(count) * elements
        yield {'isa': isa, 'kernel': name, 'moves': moves, 'elements': elements, 'megabytes': elements * 4 / 2 ** 20,
               'gb_per_s': bytes_moved / kernel / 1e9, 'triad_gb_per_s': bytes_moved / triad / 1e9,
               'share': triad / kernel}


def show(isa, rows):
    """A line for each kernel of an instruction set, a pair of columns for each size."""
    sizes = sorted({row['megabytes'] for row in rows})
    print(f'\n{isa:41}{"moves":27}' + ''.join(f'{size:7g} MB share' for size in sizes))
    for name, moves in dict.fromkeys((row['kernel'], row['moves']) for row in rows):
        found = {row['megabytes']: row for row in rows if row['kernel'] == name}
        print(f'{name:41}{moves:27}' + ''.join(f'{found[size]["gb_per_s"]:10.1f}{found[size]["share"]:6.2f}'
                                               for size in sizes))
    triads = {size: statistics.median(row['triad_gb_per_s'] for row in rows if row['megabytes'] == size)
              for size in sizes}
    print(f'{"triad":41}{"":27}' + ''.join(f'{triads[size]:10.1f}  1.00' for size in sizes), flush=True)


def caches():
    """Sizes of this machine's caches as Linux tells them, innermost first."""
    folders = sorted(Path('/sys/devices/system/cpu/cpu0/cache').glob('index*'))
    return [' '.join((folder / field).read_text(encoding='utf8').strip() for field in ('level', 'type', 'size'))
            for folder in folders]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--isa', nargs='+', choices=list(build.INSTRUCTION_SETS), default=list(build.INSTRUCTION_SETS))
    parser.add_argument('--megabytes', nargs='+', type=float, default=[0.125, 64, 256],
                        help='of a tensor; a row moves up to five')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--output', help='JSON file for the figures')
    args = parser.parse_args()
    rows = []
    print('GB/s, and the share of what a triad reaches')
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(folder)
        for isa in args.isa:
            if run(program, isa) != [isa]:
                print(f'\n{isa}: not on this machine')
                continue
            found = [row for size in args.megabytes for row in measure(program, isa, size, args.rounds)]
            show(isa, found)
            rows += found
    save(args.output, machine={**machine(1), 'caches': caches()}, rounds=args.rounds, rows=rows)


if __name__ == '__main__':
    main()
