"""A fingerprint of the base: a few values of its weights, so that an adapter is not loaded onto another model.

Two dtypes of one model agree (values are compared within 2 %), another model of the same shape does
not. Quantized weights, which have no values to sample, are passed over.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from peftcore import ranks
from peftcore.errors import CheckpointError

_TENSORS = 16
_VALUES = 32
_TOLERANCE = 0.02


def fingerprint(parameters: dict[str, Tensor]) -> str:
    """JSON `{name: [shape, values]}` of up to 16 floating tensors spread over the model, 32 values each.

    Collective where they are sharded.
    """
    names = sorted(name for name, p in parameters.items() if p.is_floating_point() and p.dim() > 1 and not p.is_meta)
    chosen = [names[i * len(names) // _TENSORS] for i in range(_TENSORS)] if len(names) > _TENSORS else names
    return json.dumps({name: [list(parameters[name].shape), _sample(parameters[name]).tolist()] for name in chosen})


def difference(parameters: dict[str, Tensor], expected: str) -> str | None:
    """What shows that `parameters` are of another base than the fingerprint's, or None."""
    for name, shape, values in _told(expected):
        found = parameters.get(name)
        if found is None:
            return f"it has no parameter '{name}'"
        if not found.is_floating_point() or found.is_meta:
            continue
        if list(found.shape) != shape:
            return f"'{name}' has shape {list(found.shape)}, the adapter's base {shape}"
        wanted = torch.tensor(values, dtype=torch.float32, device="cpu")
        values = _sample(found)
        if values.shape != wanted.shape:
            return f"'{name}' has {len(values)} sampled values, the adapter's base {len(wanted)}"
        error = (values - wanted).norm() / wanted.norm().clamp(min=1e-12)
        if not error <= _TOLERANCE:  # NaN is no agreement
            return f"the values of '{name}' differ by {100 * error.item():.0f} %"
    return None


def _told(expected: str) -> list[tuple[str, list[int], list[float]]]:
    """(name, shape, values) of each tensor of a fingerprint, which may come from a stranger's file."""
    try:
        found = [
            (name, list(shape), [float(v) for v in values]) for name, (shape, values) in json.loads(expected).items()
        ]
        torch.tensor([value for _, _, values in found for value in values], dtype=torch.float32, device="cpu")
        return found
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise CheckpointError(f"the fingerprint of the base (peftcore_base) cannot be read: {error}") from error


def _sample(tensor: Tensor) -> Tensor:
    flat = ranks.whole(tensor.detach()).reshape(-1)
    steps = torch.arange(_VALUES, device=flat.device) * max(1, flat.numel() // _VALUES)
    return flat[steps[steps < flat.numel()]].float().cpu()
