"""Facts about a model's experts: how many there are, how they are stored, and how many a token uses."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from peftcore.model.base_modules import base_modules, original_class, original_forward
from peftcore.model.experts import why_not_fused
from peftcore.model.experts.in_model import expert_weights, experts_per_token
from peftcore.model.targets.coverage import percent
from peftcore.plugin.layers import shape_of


@dataclass(frozen=True)
class Mixture:
    """The experts of a model, whose weights are parameters `[experts, out, in]`.

    Args:
        modules: the number of modules of experts.
        count: experts in each module; the maximum if they differ.
        per_token: experts that a token passes through.
        weights, packed, adapted, idle: weights of all experts, in 4 bits, with an adapter, and unused for a token.
        unfused: why experts with an adapter or in 4 bits run on dense copies of their weights, if some do.
        one_by_one: whether some experts have their own adapters, and so run one after the other.
    """

    modules: int
    count: int
    per_token: int
    weights: int
    packed: int
    adapted: int
    idle: int
    unfused: str | None = None
    one_by_one: bool = False

    def described(self, base_parameters: int) -> str:
        """Return a line about the experts of a base with this many parameters."""
        way = ""
        if self.packed or self.adapted:
            way = "; one expert after the other" if self.one_by_one else "; fused"
            way = f"; on dense copies of all, without dropout: {self.unfused}" if self.unfused else way
        return (
            f"experts: {self.modules} modules of {self.count}, {percent(self.weights, base_parameters)} of the "
            f"parameters; {percent(self.adapted, self.weights)} with an adapter, "
            f"{percent(self.packed, self.weights)} in 4 bits; a token meets {self.per_token} of {self.count}, "
            f"{base_parameters - self.idle:,} parameters in all{way}"
        )


def mixture_of(
    model: nn.Module, reached: Collection[str] = (), copied: Collection[str] = (), one_by_one: bool = False
) -> Mixture | None:
    """Return facts about the experts of `model`; None if it has none.

    Args:
        reached: paths of modules and full names of parameters that have adapters.
        copied: names of parameters whose change is not a low-rank product.
        one_by_one: whether some experts have their own adapters.
    """
    found = expert_weights(model)
    if not found:
        return None
    modules, wanted = dict(base_modules(model)), set(reached)
    counts: list[int] = []
    used: list[int] = []
    weights = packed = adapted = idle = 0
    reasons: list[str] = []
    for path, names in found.items():
        module = modules[path]
        for name in names:
            shape = shape_of(module, name)
            size, taken = math.prod(shape), min(experts_per_token(module, model), shape[0])
            counts.append(shape[0])
            used.append(taken)
            weights += size
            idle += size // shape[0] * (shape[0] - taken)
            is_packed, is_adapted = name in bits_of(module), bool(wanted & {path, f"{path}.{name}"})
            packed += size if is_packed else 0
            adapted += size if is_adapted else 0
            reason = why_not_fused(module, original_forward(module)) if is_packed or is_adapted else None
            reason = "its adapter is not a low-rank product" if not reason and f"{path}.{name}" in copied else reason
            reasons += [f"{original_class(module).__name__}: {reason}"] if reason else []
    unfused = "; ".join(dict.fromkeys(reasons)) or None
    return Mixture(len(found), max(counts), max(used), weights, packed, adapted, idle, unfused, one_by_one)


def bits_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return {name: (weights, bytes with scales)} of the module's own parameters that are in 4 bits."""
    found: dict[str, tuple[int, int]] = {}
    for name, packing in getattr(module, "packings", {}).items():  # `quantization.parameters.PackedParameters`
        parameter = module._parameters[name]
        if parameter is not None and not parameter.is_floating_point():
            buffers = (module._buffers[buffer] for buffer in packing.buffers)
            buffer_bytes = sum(buffer.nbytes for buffer in buffers if buffer is not None)
            found[name] = math.prod(packing.shape), parameter.nbytes + buffer_bytes
    return found
