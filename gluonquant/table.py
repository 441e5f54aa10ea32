"""Text in columns."""


def aligned(header, rows, total=None, right=()):
    """Lines of text: a header, a rule, rows; another rule and a last row if ``total`` is given.

    Parameters
    ----------
    header, total : sequence of str
    rows : sequence of sequences of str
    right : numbers of the columns that are aligned on the right
    """
    table = [header, *rows, *([total] if total else [])]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ['  '.join(cell.rjust(width) if place in right else cell.ljust(width)
                       for place, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in table]
    rule = '-' * max(map(len, lines))
    lines.insert(1, rule)
    if total:
        lines.insert(-1, rule)
    return '\n'.join(lines)
