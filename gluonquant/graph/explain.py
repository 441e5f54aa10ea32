"""`explain`: why each tensor of an attached net is quantized or not."""
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Tuple

from ..symbol_graph import Entry
from ..table import aligned
from .net import Decision, GraphNet


@dataclass(frozen=True)
class Explanation:
    """What was decided for the inputs of each operator; ``print`` it, or take ``rows``."""
    rows: Tuple[Decision, ...]

    def __str__(self):
        header = [name.replace('_', ' ') for name in Decision._fields]
        return aligned(header, [[value or '-' for value in row] for row in self.rows])


def explain(net, pattern='*'):
    """Say for every operator of ``net`` why its inputs are quantized or not, and which rule or argument decided.

    Parameters
    ----------
    net : GraphNet, from `attach`
    pattern : str
        Shell pattern: only operators (``'stage1_*'``, ``'features.4.*'``) or kinds of them (``'elemwise_add'``) that
        match.

    Returns
    -------
    Explanation
        One `Decision` for every input of a quantized operator, one for each operator that stays float.

    Raises
    ------
    TypeError
        The net is none of `attach`.
    """
    if not isinstance(net, GraphNet):
        raise TypeError(f'{type(net).__name__} is no net of gq.attach. For a converted net, see gq.summary')
    return Explanation(tuple(row for row in net.decisions
                             if fnmatchcase(row.node, pattern) or fnmatchcase(row.op, pattern)))


def decisions_about(plan, placed, refused, passed):
    """The decisions about all operators.

    Parameters
    ----------
    plan : Plan
    placed : dict, {(reader, slot): Placed}
    refused, passed : dict, as `place_for` returns them
    """
    own = {(wish.reader, wish.slot): wish for wish in [*plan.weights, *plan.wishes]}
    groups = {found.group: found.path for found in placed.values()}
    refusals = {row.node: row.reason for row in plan.decisions if not row.input}
    found, quantized = [], set()

    def note(reader, entry, path, reason):
        if path is not None and plan.paths[reader] in refusals:
            reason = f'{refusals[plan.paths[reader]]}, but reads what is stored quantized: {reason}'
            quantized.add(plan.paths[reader])
        found.append(Decision(plan.paths[reader], reader.op, plan.tensor(entry), path, reason))
    for edge, made in placed.items():
        reason = made.reason
        if edge in own:
            shared = '' if own[edge].spec == made.spec else f'; one quantizer for the tensor: {reason}'
            reason = own[edge].reason + shared
        note(edge[0], made.entry, made.path, reason)
    behind = {made.entry: made.path for made in placed.values()}
    behind.update((entry, groups[group]) for entry, group in passed.items())
    for wish in plan.wishes:
        entry, out = wish.entry._replace(version=0), Entry(wish.reader)
        if (wish.reader, wish.slot) in placed:
            continue
        if entry in refused:
            note(wish.reader, entry, None, refused[entry])
        elif entry in passed:
            note(wish.reader, entry, behind[entry], f'{wish.reason}; {entry.node.op} passes it through')
        else:
            note(wish.reader, entry, behind.get(out), f'{wish.reason}; {wish.reader.op} runs on codes as on values, so '
                 'the quantizer stands behind it')
    return [row for row in plan.decisions if row.input or row.node not in quantized] + found
