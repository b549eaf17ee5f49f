"""Each adapted weight with its adapters worked in, checked, and what its format loses of them.

lost = |stored - wanted| / |wanted - before|     (Frobenius norms)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.adaptation.adapted import adapters_at
from peftcore.engine.trained import TrainedParameters
from peftcore.errors import PeftcoreError
from peftcore.merging.formats import weight_format
from peftcore.merging.probe import refuse_inexact
from peftcore.method import WeightFormat


@dataclass
class MergedLayer:
    """One adapted weight, merged: what is to be stored, and what of the adapters that loses (None: nothing)."""

    path: str
    tensors: dict[str, Tensor]
    lost: float | None
    unpacked: WeightFormat | None = None  # its format, where a dense weight takes the place of what that stores

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for attribute, tensor in self.tensors.items():
            yield f"{self.path}.{attribute}" if self.path else attribute, tensor


def refuse_unmergeable(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raise a PeftcoreError if one of the adapters is no change of a weight."""
    cannot = {
        name: path
        for name in names
        for path, adapter in engine.adapter_modules(model, name)
        if not hasattr(adapter, "merged")
    }
    if not cannot:
        return
    method = {name: engine.applied(model, name).method for name in names}
    can = [name for name in names if name not in cannot]
    name, path = next(iter(cannot.items()))
    raise PeftcoreError(
        f"the adapter '{name}' ({method[name]}) cannot be merged: at '{path}' it is no change of a weight. "
        + (
            f"Of the active ones {', '.join(f'{other} ({method[other]})' for other in can)} can: "
            f"peftcore.activate(model, {can}), then merge"
            if can
            else "No active adapter can"
        )
    )


def merged_layers(
    model: nn.Module, names: tuple[str, ...], dtype: torch.dtype | None, checked: bool = False
) -> Iterator[MergedLayer]:
    """Every adapted weight, merged, and checked to be finite and to compute what its adapters do.

    Args:
        dtype: of a dense weight in place of one in few bits; None: it is stored in its format again.
        checked: what it computes was compared before.
    """
    paths = dict.fromkeys(path for name in names for path in engine.applied(model, name).paths)
    for path in paths:
        module = model.get_submodule(path)
        adapters = adapters_at(module)
        chosen = weight_format(module)
        stored = chosen.read(module)
        if stored.is_meta:
            raise PeftcoreError(f"the weight of '{path}' is on the meta device, so it has no values to merge into")
        with torch.no_grad(), torch.autocast(stored.device.type, enabled=False):
            before = stored.float()
            weight = before.clone()  # a plugin's `merged` may change what it is given
            acting = [name for name in names if name in adapters]
            for name in acting:
                adapter: Any = adapters[name]
                weight = adapter.merged(weight)
                if not isinstance(weight, Tensor) or weight.shape != before.shape:
                    found = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
                    raise PeftcoreError(
                        f"'merged' of the adapter '{name}' at '{path}' gives {found}, for a weight {list(before.shape)}"
                    )
            if chosen.decode is None:
                layer = MergedLayer(path, chosen.write(module, weight), None)
            elif dtype is not None:
                layer = MergedLayer(path, {"weight": weight.to(dtype)}, None, unpacked=chosen)
            elif torch.equal(weight, before):
                layer = MergedLayer(path, {}, None)  # quantizing again could only round the base anew
            else:
                tensors = chosen.write(module, weight)
                change = (weight - before).norm()
                layer = MergedLayer(path, tensors, ((chosen.decode(module, tensors) - weight).norm() / change).item())
            bad = [t.dtype for t in layer.tensors.values() if t.is_floating_point() and not _is_finite(t)]
            if bad or not math.isfinite(layer.lost or 0):
                where = bad[0] if bad else chosen.name
                raise PeftcoreError(
                    f"merging {list(names)} into '{path}' gives values that are not finite in {where}. "
                    "The adapter holds NaN or infinity, or the sum overflows; nothing was changed"
                )
            if not checked:
                refuse_inexact(path, module, acting, chosen, before, weight)
        yield layer


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.numel() or all(bound.isfinite() for bound in torch.aminmax(tensor))  # NaN passes through


def measured_loss(model: nn.Module, names: tuple[str, ...], dtype: torch.dtype | None) -> dict[str, float]:
    """What each layer that is stored in few bits loses of the adapters, by path."""
    return {layer.path: layer.lost for layer in merged_layers(model, names, dtype) if layer.lost is not None}


def changes_nothing(model: nn.Module, adapter: str) -> bool:
    """Is every weight, with `adapter` merged, what it was? False also where that cannot be known from weights."""
    own = TrainedParameters.of(model, adapter)
    if own is not None:
        pairs = zip(own.values(model), own.originals(model), strict=True)
        if own.has_moved(model) or not all(torch.equal(value, original) for (_, value), (_, original) in pairs):
            return False
    module: Any
    for path, module in engine.adapter_modules(model, adapter):
        if not hasattr(module, "merged"):
            return False
        adapted = model.get_submodule(path)
        with torch.no_grad():
            weight = weight_format(adapted).read(adapted).float()
            if not torch.equal(module.merged(weight), weight):
                return False
    return True
