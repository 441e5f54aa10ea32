"""Symbols from files: checked before MXNet sees them, since it does not survive all of them."""
import json
import re
from collections import Counter

import mxnet as mx
from mxnet.base import MXNetError

from .nodes import OURS, VARIABLE, Entry, Node, ancestors
from .operators import input_names, operator, signature

# What the attributes of a node have been called, in MXNet 1.0 and later and before.
ATTRIBUTES = ('attrs', 'attr', 'param')
_KEYS = {'op', 'name', 'inputs', 'subgraphs', 'backward_source_id', 'control_deps', *ATTRIBUTES}
_LARGEST = 2 ** 31 - 1
# What old versions note about an input at the operator that reads it: bias_lr_mult.
_NOTES = re.compile(r'_*(\w+?)_+(lr_mult|wd_mult|ctx_group|force_mirroring|mirror_stage)_*')


def parsed(text):
    """The content of the JSON of a symbol, whose nodes and edges make sense; ValueError names what does not."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'not the JSON of a symbol: {error}') from None
    _check(content)
    return content


def _check(content):
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ('nodes', 'heads')):
        raise ValueError("not the JSON of a symbol: it has no lists 'nodes' and 'heads'")
    if not isinstance(content.get('arg_nodes'), list):
        raise ValueError("the symbol has no list 'arg_nodes'")
    if not content['heads']:
        raise ValueError("the symbol returns nothing: 'heads' is empty")
    nodes = content['nodes']
    for place, node in enumerate(nodes):
        _check_node(place, node)
    for node in nodes:
        _check_notes(node)
        _check_edges(f"node {node['name']!r}", node['inputs'], nodes)
        if node['op'] == VARIABLE and node['inputs']:
            raise ValueError(f"node {node['name']!r} is a variable, but reads {len(node['inputs'])} tensors")
    _check_edges('the graph', content['heads'], nodes)
    _check_order(nodes)
    names = Counter(node['name'] for node in nodes if node['op'] == VARIABLE)
    if names and names.most_common(1)[0][1] > 1:
        raise ValueError(f'two variables are called {names.most_common(1)[0][0]!r}')
    for node in nodes:
        for body in node.get('subgraphs', []):
            try:
                _check(body)
            except ValueError as error:
                raise ValueError(f"node {node['name']!r} ({node['op']}), its body: {error}") from None


def _check_node(place, node):
    if not isinstance(node, dict) or not isinstance(node.get('name'), str) or not isinstance(node.get('op'), str):
        raise ValueError(f"node number {place} has no 'name' or no 'op'")
    name = f"node {node['name']!r}"
    if not isinstance(node.get('inputs'), list):
        raise ValueError(f"{name} has no list 'inputs'")
    if not isinstance(node.get('subgraphs', []), list):
        raise ValueError(f"{name}: 'subgraphs' is {node['subgraphs']!r}, not a list")
    for key in set(node) - _KEYS:
        raise ValueError(f'{name} has {key!r}, which no version of MXNet writes')
    for key in ATTRIBUTES:
        attrs = node.get(key, {})
        if not isinstance(attrs, dict) or not all(isinstance(value, str) for value in attrs.values()):
            raise ValueError(f'{name}: {key} is {attrs!r}, not names with texts')
    if node['op'] not in (VARIABLE, *OURS):
        try:
            operator(node['op'])
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from None


def _check_notes(node):
    """ValueError for a note about an input that the node does not have: MXNet would look for it behind the last."""
    attrs = {name: value for key in ATTRIBUTES for name, value in node.get(key, {}).items()}
    notes = [(name, found.group(1)) for name, found in ((name, _NOTES.fullmatch(name)) for name in attrs) if found]
    if node['op'] in (VARIABLE, *OURS) or node.get('subgraphs') or not notes:
        return
    settings = {name: value for name, value in attrs.items() if name not in dict(notes)}
    known = input_names(Node(node['op'], node['name'], settings, [], []))
    for name, about in notes:
        if about in known[len(node['inputs']):]:
            raise ValueError(f"node {node['name']!r} ({node['op']}) has {name!r}, but no input {about!r}")


def _check_edges(reader, edges, nodes):
    for edge in edges:
        if not isinstance(edge, list) or len(edge) not in (2, 3) or not all(type(part) is int for part in edge):
            raise ValueError(f'{reader} reads {edge!r}: an edge is [node, output, version]')
        if not 0 <= edge[0] < len(nodes):
            raise ValueError(f'{reader} reads node number {edge[0]}, but there are {len(nodes)}')
        if not 0 <= edge[1] <= _LARGEST or not 0 <= edge[-1] <= _LARGEST:
            raise ValueError(f"{reader} reads output {edge[1]} of {nodes[edge[0]]['name']!r}: {edge}")


def _check_order(nodes):
    """ValueError if nodes read each other in a circle."""
    made = [Node(node['op'], node['name'], {}, [], []) for node in nodes]
    for node, described in zip(made, nodes):
        node.inputs = [Entry(made[number]) for number, *_ in described['inputs']]
    ancestors([Entry(node) for node in made])


def up_to_date(content):
    """JSON as this MXNet writes it, from checked content; ours, with quantizers in it, is already."""
    text = json.dumps(content, ensure_ascii=False)      # MXNet cannot read JSON's \\u escapes
    if any(node['op'] in OURS for node in content['nodes']):
        return text
    try:
        return mx.sym.load_json(text).tojson(remove_amp_cast=False)
    except MXNetError as error:
        for node in content['nodes']:
            if node['op'] != VARIABLE and not node.get('subgraphs'):
                attrs = next((node[key] for key in ATTRIBUTES if key in node), {})
                signature(Node(node['op'], node['name'], attrs, [], []))
        raise ValueError(f'MXNet cannot read the symbol: {str(error).strip().splitlines()[-1]}') from None
