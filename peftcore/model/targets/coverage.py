"""Compute the fraction of a model's weights that a method reaches, and the reasons for the rest.

Only matrices of linear layers, convolutions and experts count. Embeddings and heads do not, since methods adapt them
only on request.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from peftcore.model import bypassed_layers, modules_without_gradients
from peftcore.model.base_modules import base_modules, original_class
from peftcore.model.experts.in_model import is_read_elsewhere
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.layers import is_unknown_linear, shape_of, sizes

LOW_COVERAGE = 0.5  # fraction of the weights below which a selection of all layers gives a warning


@dataclass(frozen=True)
class Coverage:
    """Number of weights reached and in total. `left_out` is {kind of layer and reason: number of weights}."""

    reached: int
    total: int
    left_out: dict[str, int]

    @property
    def share(self) -> float:
        return self.reached / self.total if self.total else 1.0

    def __str__(self) -> str:
        if not self.left_out:
            return "reaches all weights in layers"
        largest_first = sorted(self.left_out.items(), key=lambda item: -item[1])
        left_out = ", ".join(f"{description} ({percent(count, self.total)})" for description, count in largest_first)
        return f"reaches {percent(self.reached, self.total)} of the weights in layers; left out: {left_out}"


def coverage(
    model: nn.Module, architecture: Architecture, reached: Collection[str], *, lacking: str = "not selected"
) -> Coverage:
    """Return the coverage of the layer weights by the modules `reached`.

    Args:
        model: the model.
        architecture: its architecture.
        reached: paths of modules and full names of parameters. A path includes all submodules; a path that ends in `.`
            includes only the module's own parameters.
        lacking: the default reason for linear layers that are not covered.
    """
    heads = tuple([f"{head}." for head in (architecture.output_head, *architecture.task_heads) if head])
    bypass_reasons, reached_names = dict(bypassed_layers(model)), set(reached)
    paths_without_gradients = modules_without_gradients(model)
    reached_weights, total = 0, 0
    left_out: Counter[str] = Counter()
    counted_ids: set[int] = set()
    for path, module in base_modules(model):
        if isinstance(module, nn.Embedding) or f"{path}.".startswith(heads):
            continue
        if issubclass(original_class(module), nn.MultiheadAttention):
            bypass_reasons[f"{path}.out_proj" if path else "out_proj"] = "read by the attention"
        for name, description, identity, count in _matrices(model, path, module):
            if identity in counted_ids:
                continue
            counted_ids.add(identity)
            total += count
            if not reached_names.isdisjoint(
                (f"{path}.", f"{path}.{name}" if path else name, *_path_and_ancestors(path))
            ):
                reached_weights += count
            else:
                left_out[_reason(description, lacking, path in bypass_reasons, path in paths_without_gradients)] += (
                    count
                )
    return Coverage(reached_weights, total, dict(left_out))


def _matrices(model: nn.Module, path: str, module: nn.Module) -> list[tuple[str, str, int, int]]:
    """Return (name, description, identity, number of weights) for each matrix of the module itself."""
    if is_unknown_linear(module):
        unread = f"layers of {type(module).__name__}, whose weights cannot be read"
        return [("", unread, id(module), math.prod(sizes(module)))]
    matrices: list[tuple[str, str, int, int]] = []
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        is_linear, shape = name == "weight" and isinstance(module, nn.Linear), shape_of(module, name)
        if not is_linear and (len(shape) < 2 or math.prod(shape) == max(shape)):
            continue  # a vector, possibly with dimensions of size 1, such as a class token
        if isinstance(module, _ConvNd):
            label = "convolutions"
        elif is_linear or (name == "weight" and len(shape) == 2):
            label = "linear layers"
        elif len(shape) == 3 and min(shape) > 1:
            label = "experts' stacked weights"
        elif not is_read_elsewhere(model, path, [name]):
            label = "other parameters"
        else:  # DBRX's experts
            label = "parameters that are only read by other modules"
        matrices.append((name, label, id(parameter), math.prod(shape)))
    return matrices


def _reason(label: str, lacking: str, is_bypassed: bool, is_idle: bool) -> str:
    if is_bypassed:
        return f"{label} that are read without being called"
    if is_idle:
        return f"{label} that the model runs without gradients"
    return f"{label} {lacking}" if label == "linear layers" else label


def _path_and_ancestors(path: str) -> list[str]:
    """Return `path` and the paths of all its ancestors."""
    paths = [path]
    while path:
        path = path.rpartition(".")[0]
        paths.append(path)
    return paths


def percent(part: int, total: int) -> str:
    """Format a fraction with three digits, such as `1.23 %`."""
    return f"{100 * part / total:.3g} %" if total else "0 %"
