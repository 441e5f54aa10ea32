"""`explain`: why each tensor of an attached net is quantized or not."""
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Tuple

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
