"""Share of a model's weight that a method reaches, and what is left out and why.

The matrices of linear layers, convolutions and experts count. Embeddings and heads do not, since methods adapt them
only if they are named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from peftcore.model import bypassed, without_gradients
from peftcore.model.base_modules import base_modules, original_class
from peftcore.model.experts.in_model import read_elsewhere
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.layers import is_unknown_linear, shape_of, sizes

LITTLE = 0.5  # share of the weight; a selection of everything that reaches less is warned about


@dataclass(frozen=True)
class Coverage:
    """Weights reached and in total; `left_out` is {what, with the reason: weights}."""

    reached: int
    total: int
    left_out: dict[str, int]

    @property
    def share(self) -> float:
        return self.reached / self.total if self.total else 1.0

    def __str__(self) -> str:
        if not self.left_out:
            return "reaches all of the weight in layers"
        largest_first = sorted(self.left_out.items(), key=lambda item: -item[1])
        rest = ", ".join(f"{what} ({percent(count, self.total)})" for what, count in largest_first)
        return f"reaches {percent(self.reached, self.total)} of the weight in layers; left out: {rest}"


def coverage(
    model: nn.Module, architecture: Architecture, reached: Collection[str], *, lacking: str = "not selected"
) -> Coverage:
    """Return how much of the weight in layers is in the modules `reached`.

    Args:
        reached: paths of modules and full names of parameters. A module includes what is inside it; a path that ends in
            `.` means its own weight alone.
        lacking: the default reason for a linear layer that is left out.
    """
    heads = tuple([f"{head}." for head in (architecture.output_head, *architecture.task_heads) if head])
    past, wanted = dict(bypassed(model)), set(reached)
    idle = without_gradients(model)
    counted, total = 0, 0
    left: Counter[str] = Counter()
    seen: set[int] = set()
    for path, module in base_modules(model):
        if isinstance(module, nn.Embedding) or f"{path}.".startswith(heads):
            continue
        if issubclass(original_class(module), nn.MultiheadAttention):
            past[f"{path}.out_proj" if path else "out_proj"] = "read by the attention"
        for name, what, identity, count in _matrices(model, path, module):
            if identity in seen:
                continue
            seen.add(identity)
            total += count
            if not wanted.isdisjoint((f"{path}.", f"{path}.{name}" if path else name, *_ways_to(path))):
                counted += count
            else:
                left[_reason(what, lacking, path in past, path in idle)] += count
    return Coverage(counted, total, dict(left))


def _matrices(model: nn.Module, path: str, module: nn.Module) -> list[tuple[str, str, int, int]]:
    """Return (name, description, identity, number of weights) of each of a module's own matrices."""
    if is_unknown_linear(module):
        unread = f"layers of {type(module).__name__}, whose weight cannot be read"
        return [("", unread, id(module), math.prod(sizes(module)))]
    found: list[tuple[str, str, int, int]] = []
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        is_linear, shape = name == "weight" and isinstance(module, nn.Linear), shape_of(module, name)
        if not is_linear and (len(shape) < 2 or math.prod(shape) == max(shape)):
            continue  # a vector, such as a class token
        if isinstance(module, _ConvNd):
            what = "convolutions"
        elif is_linear or (name == "weight" and len(shape) == 2):
            what = "linear layers"
        elif len(shape) == 3 and min(shape) > 1:
            what = "experts' stacked weights"
        elif not read_elsewhere(model, path, [name]):
            what = "other parameters"
        else:  # DBRX's experts
            what = "parameters that other modules read past their own"
        found.append((name, what, id(parameter), math.prod(shape)))
    return found


def _reason(what: str, lacking: str, is_bypassed: bool, is_idle: bool) -> str:
    if is_bypassed:
        return f"{what} that are read and not called"
    if is_idle:
        return f"{what} that the model runs without gradients"
    return f"{what} {lacking}" if what == "linear layers" else what


def _ways_to(path: str) -> list[str]:
    """Return `path` and the paths of all its ancestors."""
    found = [path]
    while path:
        path = path.rpartition(".")[0]
        found.append(path)
    return found


def percent(part: int, whole: int) -> str:
    """Return a share with three digits, such as `1.23 %`."""
    return f"{100 * part / whole:.3g} %" if whole else "0 %"
