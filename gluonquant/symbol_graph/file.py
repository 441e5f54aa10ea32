"""Symbols from files: checked before MXNet sees them, since it does not survive all of them."""
import json
from collections import Counter

import mxnet as mx
from mxnet.base import MXNetError

from .nodes import OURS, VARIABLE, Entry, Node, ancestors
from .operators import operator, signature


def parsed(text):
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f'not the JSON of a symbol: {error}') from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ('nodes', 'heads')):
        raise ValueError("not the JSON of a symbol: it has no lists 'nodes' and 'heads'")
    return content


def check_edges(content):
    """ValueError for nodes and edges that MXNet would not survive."""
    nodes = content['nodes']
    for place, node in enumerate(nodes):
        if not isinstance(node, dict) or not isinstance(node.get('name'), str) or not isinstance(node.get('op'), str):
            raise ValueError(f"node number {place} has no 'name' or no 'op'")
        if not isinstance(node.get('inputs'), list):
            raise ValueError(f"node {node['name']!r} has no list 'inputs'")
    readers = [*((f"node {node['name']!r}", node['inputs']) for node in nodes), ('the graph', content['heads'])]
    for reader, edges in readers:
        for edge in edges:
            if not isinstance(edge, list) or len(edge) < 2 or not all(type(part) is int for part in edge):
                raise ValueError(f'{reader} reads {edge!r}: an edge is [node, output, version]')
            if not 0 <= edge[0] < len(nodes):
                raise ValueError(f'{reader} reads node number {edge[0]}, but there are {len(nodes)}')
    made = [Node(node['op'], node['name'], {}, [], []) for node in nodes]
    for node, described in zip(made, nodes):
        node.inputs = [Entry(made[number]) for number, *_ in described['inputs']]
        if node.op not in (VARIABLE, *OURS):
            try:
                operator(node.op)
            except ValueError as error:
                raise ValueError(f'node {node.name!r}: {error}') from None
    ancestors([Entry(node) for node in made])


def up_to_date(text):
    """JSON as this MXNet writes it; ours, with quantizers in it, is already."""
    content = json.loads(text)
    if any(node['op'] in OURS for node in content['nodes']):
        return text
    if len({node['name'] for node in content['nodes'] if node['op'] == VARIABLE}) < sum(
            node['op'] == VARIABLE for node in content['nodes']):
        names = Counter(node['name'] for node in content['nodes'] if node['op'] == VARIABLE)
        raise ValueError(f'two variables are called {names.most_common(1)[0][0]!r}')
    try:
        return mx.sym.load_json(text).tojson(remove_amp_cast=False)
    except MXNetError as error:
        for node in content['nodes']:
            if node['op'] != VARIABLE and not node.get('subgraphs'):
                signature(Node(node['op'], node['name'], node.get('attrs', node.get('param', {})), [], []))
        raise ValueError(f'MXNet cannot read the symbol: {str(error).strip().splitlines()[-1]}') from None
