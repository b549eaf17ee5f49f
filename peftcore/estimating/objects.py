"""Bytes of PyTorch's objects beside a tensor's values, as requests to malloc: seen in traces of PyTorch 2.13.

An operator that needs a gradient makes a node of autograd, which notes the tensors that it has, and for some their
sizes; it stays until the backward has ended.
"""

from __future__ import annotations

STORAGE, TENSOR, VERSION = 96, 176, 24  # StorageImpl, TensorImpl and VariableVersion
META, VIEW_META = 184, 312  # AutogradMeta and DifferentiableViewMeta
_EDGE, _LEAF = 16, 472  # of a node, and AccumulateGrad
_NODE, _SIZES = 544, 16  # a node, and sizes of a tensor that it notes
_NODES = {  # of an operator: its node, and how many sizes it notes
    "_scaled_dot_product_flash_attention_for_cpu": (976, 0),
    "_softmax": (560, 0),
    "_log_softmax": (560, 0),
    "_to_copy": (472, 0),
    "_unsafe_view": (488, 1),
    "add": (512, 0),
    "addmm": (800, 3),
    "baddbmm": (688, 0),
    "bmm": (624, 0),
    "cat": (528, 4),
    "clone": (464, 0),
    "convolution": (768, 5),
    "copy": (472, 0),
    "cumsum": (480, 0),
    "div": (632, 0),
    "embedding": (568, 1),
    "expand": (488, 1),
    "gather": (640, 1),
    "gelu": (576, 0),
    "index": (528, 2),
    "linalg_vector_norm": (704, 1),
    "mean": (536, 2),
    "mm": (736, 3),
    "mul": (640, 0),
    "native_layer_norm": (888, 1),
    "neg": (464, 0),
    "nll_loss_forward": (800, 0),
    "permute": (488, 1),
    "pow": (576, 0),
    "repeat": (512, 2),
    "select": (504, 1),
    "slice": (536, 1),
    "split": (512, 1),
    "squeeze": (496, 1),
    "stack": (504, 0),
    "sub": (512, 0),
    "sum": (528, 2),
    "t": (464, 0),
    "transpose": (480, 0),
    "unbind": (472, 1),
    "unsqueeze": (472, 0),
    "view": (488, 1),
}
_OURS, _SAVED, _INPUT = 464, 112, 160  # of an autograd.Function: its node, and for each tensor that it has


def node(operator: str, edges: int, leaves: int) -> list[int]:
    """What the node of this operator takes, in the order in which it is made.

    Args:
        edges: tensors that it has. leaves: those of them that are parameters and need a gradient.
    """
    whose, _, name = operator.partition("::")
    size, sizes = (_OURS, 4) if whose == "peftcore" else _NODES.get(name.removesuffix("_"), (_NODE, 0))
    found = [size, *[_LEAF] * leaves, _edges(edges), *[_SIZES] * sizes]
    return [*found, _SAVED * edges, _INPUT * edges] if whose == "peftcore" else found


def _edges(count: int) -> int:
    """Bytes of a vector that grew by one edge after the other."""
    return _EDGE << (count - 1).bit_length()
