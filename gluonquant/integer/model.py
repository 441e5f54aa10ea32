"""A graph of ONNX operators, as plain Python values."""
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import numpy as np


@dataclass
class Node:
    """One operator of the standard ONNX domain. A missing optional input is ''."""
    op: str
    inputs: List[str]
    outputs: List[str]
    attrs: Dict[str, Any] = field(default_factory=dict)
    name: str = ''


@dataclass
class Model:
    """Nodes in the order in which they run.

    Attributes
    ----------
    nodes : list of Node
    constants : dict, {name: array}
    inputs, outputs : dict, {name: shape}
        float32 tensors; None stands for a size that is free, as the batch is.
    opset : int, the version of the operators
    metadata : dict, {str: str}
    types : dict, {name of a constant: 'int4' or 'uint4'}
        Constants that a file stores in four bits each; here they are int8 or uint8.
    """
    nodes: List[Node]
    constants: Dict[str, np.ndarray]
    inputs: Dict[str, Tuple[Optional[int], ...]]
    outputs: Dict[str, Tuple[Optional[int], ...]]
    opset: int = 13
    metadata: Dict[str, str] = field(default_factory=dict)
    types: Dict[str, str] = field(default_factory=dict)

    def maker(self):
        """{tensor: the node that makes it}."""
        return {name: node for node in self.nodes for name in node.outputs}

    def readers(self):
        """{tensor: nodes that read it}."""
        found = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return found
