"""`draw`: a picture of a graph, with what is quantized and how, laid out by graphviz."""
import os
import shutil
import subprocess
from contextlib import suppress
from html import escape

import mxnet as mx

from .picture import collapsed, make_picture
from .source import inference_graph

FORMATS = ('.dot', '.pdf', '.png', '.svg')
# Paul Tol's light scheme, told apart by colour-blind people too, and a shade more for methods that are related.
COLORS = {'lsq': '#77AADD', 'lsqplus': '#99DDFF', 'pact': '#EE8866', 'cliprelu': '#F7C4AE', 'sawb': '#EEDD88',
          'int8': '#44BB99', 'affine': '#BBCC33', 'fqn': '#AAAA00', 'dorefa': '#C7A8E0', 'qil': '#FFAABB',
          'gdrq': '#C9A27E'}
OTHER_METHOD, PLAIN, RED = '#DDDDDD', '#F4F4F4', '#CC0022'
LIGHTER = '99'        # opacity


def draw(net, path, *, inputs='data', collapse=True, title=''):
    """Write a picture of the graph of ``net``.

    Small boxes are quantizers of tensors, in the colour of their method, as in ``lsq 4u``: method, bits, and u for
    unsigned, s for signed codes. Behind them stand range and scale. Those that share their range have a number. A layer
    has the colour of its weight's quantizer; once something is quantized, layers that have a float input or weight
    have a thick red frame. BatchNorm and activations stand in the box of what they follow.

    Parameters
    ----------
    net : GraphNet, HybridBlock, Symbol or str
        A net of `attach`, or a float one; a str is the path of a ``*-symbol.json`` file. It does not change.
    path : str
        The file to write: .svg, .png, .pdf, or .dot, the text that the others are made of. An existing file stays
        until the new one is complete.
    inputs : str or sequence of str
        Names of the inputs, as for `attach`; a GraphNet knows its own.
    collapse : bool
        Draw equal blocks in a row as one, with the span of their ranges.
    title : str

    Returns
    -------
    str, the path

    Raises
    ------
    ValueError
        Another extension; the net has no graph that can be read, see `attach`.
    RuntimeError
        Graphviz is not installed, or fails.
    """
    path = os.fspath(path)
    extension = os.path.splitext(path)[1].lower()
    if extension not in FORMATS:
        raise ValueError(f'{path!r} has the extension {extension!r}: known are {", ".join(FORMATS)}')
    mx.nd.waitall()         # reading does not wait for ranges that a static graph still writes
    picture = make_picture(inference_graph(net, inputs))
    if collapse:
        picture = collapsed(picture)
    text = dot_text(picture, title).encode()
    content = text if extension == '.dot' else _rendered(text, extension[1:])
    unfinished = f'{path}.part{os.getpid()}'
    try:
        with open(unfinished, 'wb') as file:
            file.write(content)
        os.replace(unfinished, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(unfinished)
    return path


def _rendered(text, kind):
    program = shutil.which('dot')
    if program is None:
        raise RuntimeError(f'graphviz draws .{kind} files, but its program dot is not installed (apt-get install '
                           'graphviz). Install it, or write a .dot file')
    done = subprocess.run([program, f'-T{kind}'], input=text, capture_output=True)
    if done.returncode:
        raise RuntimeError(f'dot failed with code {done.returncode}: {done.stderr.decode(errors="replace").strip()}')
    return done.stdout


def dot_text(picture, title=''):
    """The picture in the language of graphviz."""
    names = {box: f'n{number}' for number, box in enumerate(picture.boxes)}
    lines = ['digraph net {',
             'graph [rankdir=TB nodesep=0.25 ranksep=0.18 fontname="Arial" fontsize=11 labelloc=t '
             f'label={_legend(picture, title)}]',
             'node [shape=box style="rounded,filled" fontname="Arial" fontsize=11 height=0.25 margin="0.12,0.05" '
             'color="#555555"]',
             'edge [fontname="Arial" fontsize=9 fontcolor="#333333" color="#555555" arrowsize=0.6]']
    lines += [f'{names[box]} [{_look(box)}]' for box in picture.boxes]
    for number, cluster in enumerate(picture.clusters):
        label = f'<B>× {cluster.count}</B>  ' + '<BR ALIGN="LEFT"/>to '.join(_font(name, '#222222', 8) for name in
                                                                             (cluster.first, cluster.last))
        lines += [f'subgraph cluster_{number} {{', f'label=<{label}<BR ALIGN="LEFT"/>> labeljust=l color="#555555" '
                  'style="rounded,dashed"', *(names[box] for box in cluster.boxes), '}']
    told = set()
    for box in picture.boxes:
        for maker, _ in box.inputs:
            text = '' if maker in told else _range(maker)
            told.add(maker)
            lines.append(f'{names[maker]} -> {names[box]}' + (f' [label=" {_escaped(text)}"]' if text else ''))
    return '\n'.join([*lines, '}', ''])


def _look(box):
    lines = [*box.lines, ', '.join(box.after)] if box.kind == 'layer' else [', '.join(box.lines + box.after)]
    rows = [_escaped(line) for line in lines if line]
    if box.alarm:
        rows.append(f'<B>{_font(box.alarm, RED)}</B>')
    if box.kind == 'layer':
        rows[0] = f'{_font(box.name, "#222222", 8)}<BR/><B>{rows[0]}</B>'
    look = {'end': 'shape=ellipse fillcolor=white', 'quantizer': 'style=filled margin="0.06,0.02" height=0.2'}
    about = [f'label=<{"<BR/>".join(rows)}>', f'tooltip="{_escaped(box.name)}"', look.get(box.kind, '')]
    if box.kind != 'end':
        about.append(f'fillcolor="{_color(box.method)}{LIGHTER if box.kind == "layer" and box.method else ""}"')
    if box.alarm:
        about.append(f'color="{RED}" penwidth=3')
    return ' '.join(part for part in about if part)


def _color(method):
    return PLAIN if method is None else COLORS.get(method, OTHER_METHOD)


def _range(box):
    """What stands behind a quantizer: its range and scale, their spans if it stands for several."""
    if not box.quantizers:
        return ''
    if not all(quantizer.calibrated for quantizer in box.quantizers):
        return 'not calibrated'
    lows, highs = zip(*(quantizer.affine_bounds() for quantizer in box.quantizers))
    scales = [float(quantizer.qparams().scale[0]) for quantizer in box.quantizers]
    return f'[{_span(lows)}, {_span(highs)}]  scale {_span(scales)}'


def _span(values):
    return '…'.join(dict.fromkeys(f'{value:.3g}' for value in (min(values), max(values))))


def _legend(picture, title):
    methods = sorted({box.method for box in picture.boxes} - {None})
    cells = [f'<TD BGCOLOR="{_color(method)}">{_escaped(method)}</TD>' for method in methods]
    if methods:
        cells.append('<TD BORDER="0">4u: 4 bits, unsigned; s: signed</TD>')
    if any(box.alarm for box in picture.boxes):
        cells.append(f'<TD COLOR="{RED}" BORDER="3">{_font("float", RED)}</TD>')
    rows = [f'<TR>{"".join(cells)}</TR>'] if cells else []
    if title:
        rows.insert(0, f'<TR><TD BORDER="0" COLSPAN="{max(1, len(cells))}">{_font(title, "black", 14)}</TD></TR>')
    if not rows:
        return '""'
    return f'<<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="4" CELLPADDING="3">{"".join(rows)}</TABLE>>'


def _font(text, color, size=11):
    return f'<FONT COLOR="{color}" POINT-SIZE="{size}">{_escaped(text)}</FONT>'


def _escaped(text, most=60):
    """For labels in the manner of HTML, and for strings in quotes; what cannot be printed, as its number."""
    text = text if len(text) <= most else f'{text[:most - 1]}…'
    text = ''.join(sign if sign.isprintable() else f'\\x{ord(sign):02x}' for sign in text)
    # Graphviz gives backslashes a meaning, in labels and in tooltips, that escaping undoes in one of them only.
    return escape(text).replace('\\', '\N{SET MINUS}')
