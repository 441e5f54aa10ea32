"""What repeats in a graph: runs of equal segments, one behind the other."""
from collections import Counter
from itertools import accumulate
from typing import Hashable, NamedTuple

LONGEST = 64        # segments in one block that repeats


class Segment(NamedTuple):
    """What stands between two gates, nodes through which everything passes, and the second of them."""
    nodes: list
    sign: Hashable


def runs(nodes):
    """Find what repeats, such as the equal blocks of a stage.

    Segments are equal if their nodes are, and are wired in the same way.

    Parameters
    ----------
    nodes : list of objects, each behind its inputs, with the attributes
        ``inputs``, a list of (node, output);
        ``key``, equal for nodes that are equal by themselves;
        ``group``, None or the name of something that is shared with other nodes.

    Returns
    -------
    list of list of list of node
        Runs of at least two copies. Of a copy, others read the last node only.
    """
    sizes = Counter(node.group for node in nodes)
    found, taken = [], set()
    for chain in sorted(_chains(nodes, sizes), key=lambda chain: -sum(len(part.nodes) for part in chain)):
        for start, period, count in _repetitions([part.sign for part in chain], [len(part.nodes) for part in chain]):
            copies = [[node for part in chain[at:at + period] for node in part.nodes]
                      for at in range(start, start + period * count, period)]
            if taken.isdisjoint(node for copy in copies for node in copy):      # not inside of what repeats as a whole
                found.append(copies)
                taken.update(node for copy in copies for node in copy)
    return found


def _chains(nodes, sizes):
    """Lists of the `Segment`s that follow each other, outer ones and those inside of a segment."""
    before = {node: {source for source, _ in node.inputs} for node in nodes}
    after = {node: set() for node in nodes}
    for node, sources in before.items():
        for source in sources:
            after[source].add(node)
    entrances, exits = _gates(nodes, before), _gates(nodes[::-1], after)
    following = {first: last for last, first in entrances.items() if first is not None and exits[first] is last}
    inner = set(following.values())
    for first in [node for node in following if node not in inner]:
        chain = []
        if entrances[first] is not None:        # its gate may be read from elsewhere, too
            lead = _segment(entrances[first], first, sizes)
            if set().union(*(after[node] for node in lead.nodes[:-1])) <= set(lead.nodes):
                chain.append(lead)
        while first in following:
            chain.append(_segment(first, following[first], sizes))
            first = following[first]
        yield chain


def _gates(nodes, before):
    """{node: the last node that every path to it passes, None if there is none}, for nodes behind those ``before``."""
    gates, depth = {}, {None: 0}
    for node in nodes:
        meeting = set(before[node]) or {None}
        while len(meeting) > 1:
            deepest = max(meeting, key=depth.get)
            meeting.remove(deepest)
            meeting.add(gates[deepest])
        gates[node] = meeting.pop()
        depth[node] = depth[gates[node]] + 1
    return gates


def _segment(first, last, sizes):
    """The `Segment` from a gate to the next."""
    order, stack, place = [], [(last, iter(last.inputs))], {first: -1, last: None}
    while stack:
        node, inputs = stack[-1]
        source = next((source for source, _ in inputs if source not in place), None)
        if source is None:
            place[node] = len(order)
            order.append(node)
            stack.pop()
        else:
            place[source] = None
            stack.append((source, iter(source.inputs)))
    inside = Counter(node.group for node in order)
    # What is shared among these nodes only has a name that other segments do not have.
    own = [group for group in inside if group is not None and inside[group] == sizes[group]]
    return Segment(order, tuple((node.key, own.index(node.group) if node.group in own else (node.group,),
                                 tuple((place[source], index) for source, index in node.inputs)) for node in order))


def _repetitions(signs, sizes, start=0):
    """(start, period, count) of repetitions, those that leave the least to draw."""
    total = [0, *accumulate(sizes)]
    best, saved = None, 1       # leaving out one node is not worth the frame
    for period in range(1, min(LONGEST, len(signs) // 2) + 1):
        length = 0              # of the stretch from here on that comes again, a period later
        for place in range(len(signs) - period - 1, -1, -1):
            length = length + 1 if signs[place] == signs[place + period] else 0
            count = length // period + 1
            saving = total[place + period * count] - total[place + period]
            if saving > saved or (best and saving == saved and period == best[1]):
                best, saved = (place, period, count), saving
    if best is None:
        return []
    place, period, count = best
    end = place + period * count
    return [*_repetitions(signs[:place], sizes[:place], start), (start + place, period, count),
            *_repetitions(signs[end:], sizes[end:], start + end)]
