"""What `GraphNet` does to its own graph: BatchNorm folded and merged, biases on their grid, Parameters kept in step."""
import json
from typing import NamedTuple, Optional

import mxnet as mx
import numpy as np
from mxnet.gluon import ParameterDict

from ..batchnorm import pairs
from ..symbol_graph import BIAS, FOLDED, QUANTIZE, VARIABLE, Entry
from .fold import merge
from .names import bound_variable, layer_path, short_name
from .parameters import make_parameters

_NORMS = ('BatchNorm', '_contrib_SyncBatchNorm', '_contrib_BatchNormWithReLU')

class Decision(NamedTuple):
    """Why one input of a node is quantized, or not. ``quantizer`` is its path in the net; None: float."""
    node: str
    op: str
    input: str
    quantizer: Optional[str]
    reason: str


class Reworked:
    """The part of `GraphNet` that rewrites the graph while the net stays one that trains."""

    def quantize_biases(self):
        """Put the bias of each layer whose input and weight are quantized on the grid of their products.

        See `BiasQuantizer`. Returns the nodes of the new quantizers.
        """
        made = []
        with self.rewriting() as graph:
            for node in graph.nodes():
                bias = node.inputs[2] if node.op in ('Convolution', 'FullyConnected') and len(node.inputs) > 2 else None
                weight, factor = self.weight_parts(node) if bias is not None else (None, None)
                activation = self.quantizer(node.inputs[0]) if weight is not None else None
                floats = activation is None or None in (activation.grid, self._children[weight.attrs['quantizer']].grid)
                if floats or bias.node.op == BIAS:
                    continue
                inputs = [bias, weight.inputs[0], *([factor] if factor else [])]
                added = graph.add(BIAS, f'{self.label(node)}.bias_quantizer', inputs, weight=weight.attrs['quantizer'],
                                  activation=self._path(activation))
                added.attrs['bias_quantizer'] = added.name
                graph.connect(node, [*node.inputs[:2], Entry(added)])
                self._add_bias_quantizer(added)
                made.append(added)
        return made

    def add_factor(self, layer, bias):
        """Multiply the weight of a layer, behind its quantizer, by a new Parameter, 1 for each output channel.

        ``bias`` is the node of the layer's bias quantizer. Returns the Parameter's Entry.
        """
        with self.rewriting() as graph:
            factor = Entry(graph.add(VARIABLE, f'{layer.name}_factor', []))
            scaled = graph.add('broadcast_mul', f'{layer.name}_scaled', [layer.inputs[1], factor])
            graph.connect(layer, [layer.inputs[0], Entry(scaled), *layer.inputs[2:]])
            graph.connect(bias, [*bias.inputs, factor])
            weight = self.parameter(bound_variable(layer.inputs[1]))
            shape = (weight.shape[0],) + (1,) * (len(weight.shape) - 1)
            self._take({factor.node.name: np.ones(shape, weight.dtype)})
        return factor

    def freeze_batchnorm(self, frozen=True):
        """See `gluonquant.freeze_batchnorm`."""
        with self.rewriting() as graph:
            for node in graph.nodes():
                if node.op in _NORMS:
                    node.attrs['use_global_stats'] = str(bool(frozen))
                elif node.op == FOLDED:
                    _freeze_folded(node, frozen)

    def fold_batchnorm(self, frozen=True):
        """Fold each BatchNorm into the layer before it, for training; returns what became of each, {node: sentence}.

        ``frozen``: with running statistics; those that are folded already become so, too, or cease to be.
        """
        found, refused = pairs(self.graph)
        told = {norm.name: f'folded into {self.label(layer)!r}' for layer, norm in found}
        told.update((norm.name, f'stays: {reason}') for norm, reason in refused.items())
        with self.rewriting() as graph:
            for node in graph.nodes():
                if node.op == FOLDED:
                    told[node.name] = f'folded into {self.label(node)!r}'
                    _freeze_folded(node, frozen)
            for layer, norm in found:
                channels = int(layer.attrs.get('num_filter', layer.attrs.get('num_hidden', 0)))
                for entry in norm.inputs[1:]:
                    self.parameter(entry.node.name).shape = (channels,)     # which nothing else would tell any more
                node = graph.fold(layer, norm)
                _freeze_folded(node, frozen)
                if 'quantizer' in node.attrs:
                    quantizer = self._children[node.attrs['quantizer']]
                    self._bind(node, quantizer, quantizer.bound)
                    quantizer.renew()
        return self._told(told)

    def check_values(self):
        """RuntimeError if a Parameter has no value."""
        for parameter in self._reg_params.values():
            if parameter._data is None:
                raise RuntimeError(f'Parameter {parameter.name!r} has no value yet: run one batch through the net, or '
                                   'load its Parameters')

    def merge_batchnorm(self):
        """Merge each BatchNorm into new Parameters; returns what became of each, {node: sentence}."""
        self.check_values()
        mx.nd.waitall()     # a static graph does not tell that it writes running statistics
        with self.rewriting() as graph:
            arrays, told = merge(graph, {name: self.parameter(name)._reduce() for name in self.paths})
            self._take(arrays)
            for node in graph.nodes():
                if node.op == QUANTIZE and node.inputs[0].node.name in arrays:
                    self._bind(node, self.quantizer(Entry(node)), self.parameter(node.inputs[0].node.name))
        return self._told(told)

    def _told(self, told):
        """Note in the decisions what became of each BatchNorm; returns it by short name."""
        labels = {node.name: self.label(node) for node in self.graph.nodes()}
        told = {short_name(name, self.scope): _shortened(sentence, labels) for name, sentence in told.items()}
        rows = {name: Decision(name, 'BatchNorm', '', None, sentence) for name, sentence in told.items()}
        self.decisions = [rows.pop(row.node, row) if row.op == 'BatchNorm' else row for row in self.decisions]
        self.decisions += rows.values()
        return told

    def _take(self, arrays):
        """Give the variables in ``arrays`` Parameters of their own, and forget those that nothing reads any more."""
        contexts = next(iter(self.params.values())).list_ctx()
        variables = self.graph.variables()
        for name, parameter in make_parameters(self.graph, arrays, {name: mx.nd.array(array, dtype=array.dtype)
                                                             for name, array in arrays.items()}).items():
            parameter.reset_ctx(contexts)
            if name in self.paths:
                before = self.parameter(name)
                parameter.lr_mult, parameter.wd_mult = before.lr_mult, before.wd_mult
                parameter.grad_req = before.grad_req
            elif self.graph.readers(variables[name])[0].op == 'broadcast_mul':      # the factor of a merged BatchNorm
                parameter.grad_req = 'null'
            path = self.paths.get(name) or self._new_path(variables[name])
            self.paths[name], self._reg_params[path] = path, parameter
        self.paths = {name: path for name, path in self.paths.items() if name in variables}
        self._variables = {path: name for name, path in self.paths.items()}
        self._reg_params = {path: self._reg_params[path] for path in self._variables}
        self._params = ParameterDict('')
        for parameter in self._reg_params.values():
            self._params.update({parameter.name: parameter})

    def _new_path(self, variable):
        """Where a new Parameter stands: beside the weight of the layer that reads it, if that has a path."""
        reader = self.graph.readers(variable)[0]
        path = layer_path(reader, self.paths)
        is_bias = path and len(reader.inputs) > 2 and reader.inputs[2].node is variable
        return f'{path}.bias' if is_bias else variable.name


def _freeze_folded(node, frozen):
    norm = json.loads(node.attrs['norm'])
    norm['attrs']['use_global_stats'] = str(bool(frozen))
    node.attrs['norm'] = json.dumps(norm)


def _shortened(sentence, labels):
    """A sentence with labels in place of the names between its quotes."""
    parts = sentence.split("'")
    parts[1::2] = [labels.get(name, name) for name in parts[1::2]]
    return "'".join(parts)
