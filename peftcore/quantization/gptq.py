"""GPTQ's rounding of linear layers to affine4 (Frantar et al. 2022, arXiv 2210.17323).

For inputs X of a layer with weight W, columns of W are rounded one after the other. With H = Xᵀ X + damp and U the
upper Cholesky factor of H⁻¹, the error of column i, e = (w_i - round(w_i)) / U_ii, is compensated by the columns that
are not rounded yet: w_j -= e U_ij for j > i. A group's scale and zero point are computed when its first column is
reached.

Layers are rounded in the order in which the model calls them, each with the inputs that the already rounded layers
before it produce.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.errors import PeftcoreError, warn
from peftcore.model.batches import run
from peftcore.ops import PackedWeight
from peftcore.plugin.layers import is_conv1d

_DAMP = 0.01  # damping, relative to the mean of H's diagonal
Convert: TypeAlias = "Callable[[nn.Module, PackedWeight], object]"

_COLUMNS_AT_ONCE = 32  # number of columns whose errors are applied to the remaining columns in one product


@torch.no_grad()
def round_weight(weight: Tensor, upper: Tensor, blocksize: int) -> PackedWeight:
    """Round a weight to affine4 by GPTQ.

    Args:
        weight: fp32, fp16 or bf16 `[out, in]`; `in` is a multiple of `blocksize`.
        upper: fp64 `[in, in]`, see `inverse_factor`.
        blocksize: number of inputs in a group.
    """
    remaining, width = weight.double(), weight.shape[1]
    codes = torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device)
    scales, zeros = [], []
    step = min(blocksize, _COLUMNS_AT_ONCE)
    for start in range(0, width, step):
        stop = start + step
        if start % blocksize == 0:
            group = ops.quantize_affine4(remaining[:, start : start + blocksize].float(), blocksize)
            assert group.zeros is not None
            scales.append(group.absmax)
            zeros.append(group.zeros)
            scale, zero = scales[-1].double(), zeros[-1].double()
            inverse = (1 / scale).masked_fill_(scale == 0, 0)
        columns = remaining[:, start:stop].T.contiguous()  # transposed: columns[i] is a column of W
        factor = upper[start:stop, start:stop]
        errors = torch.empty_like(columns)
        for i in range(step):
            code = (columns[i] * inverse).round_().add_(zero).clamp_(0, 15)
            codes[start + i] = code.to(torch.uint8)
            errors[i] = (columns[i] - scale * (code - zero)) / factor[i, i]
            columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        remaining[:, stop:].addmm_(errors.T, upper[start:stop, stop:], alpha=-1)
    return ops.affine4_weight(codes.T, torch.stack(scales, 1), torch.stack(zeros, 1), dtype=weight.dtype)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of Xᵀ X, fp64 `[in, in]`, with damping.

    Raises:
        PeftcoreError: Xᵀ X is not finite.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    # Inputs that are always zero would make H singular. With 1 on the diagonal, their columns are rounded to nearest.
    diagonal[diagonal == 0] = 1
    diagonal += _DAMP * diagonal.mean()
    lower, info = torch.linalg.cholesky_ex(hessian)
    if info or not lower.isfinite().all():
        raise PeftcoreError("the inputs are not finite")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


@dataclass
class _Group:
    """Weights that are rounded together because their layers get the same input.

    Args:
        weights: for each weight, the paths of the layers that use it; several if the weight is shared.
        calls: number of calls of these layers in one forward pass.
    """

    weights: list[list[str]]
    calls: int = 0

    @property
    def paths(self) -> list[str]:
        """Paths of the layers to watch."""
        return self.weights[0]


class _StopForward(BaseException):
    """Ends a forward pass early. A BaseException, so that no `except Exception` in a model catches it."""


def round_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], blocksize: int, convert: Convert
) -> list[str]:
    """Convert linear layers to affine4 in place, one by one, so that each dense weight is freed before the next.

    Args:
        model: the model.
        layers: the layers, by path.
        batches: calibration batches, passed to the model. Tokens that an `attention_mask` excludes are ignored.
        blocksize: number of inputs in a group.
        convert: (layer, packed weight) -> None, converts one layer in place.

    Returns:
        Paths of layers that no batch reaches, which are not converted.

    Raises:
        PeftcoreError: `batches` is empty, or a layer's inputs are not finite. The layers before it have been converted.
    """
    if not batches:
        raise PeftcoreError(
            "`batches` is empty. If it is an iterator that has already been consumed, pass a list or a DataLoader"
        )
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        groups, unreached_paths = _groups_in_call_order(model, layers, batches)
        for group in groups:
            hessian = _hessian(model, group, batches)
            if hessian is None:  # rounding earlier layers changed the routing, and no token reaches this expert now
                unreached_paths += chain.from_iterable(group.weights)
                continue
            try:
                upper = inverse_factor(hessian)
            except PeftcoreError as error:
                raise PeftcoreError(
                    f"'{group.paths[0]}' cannot be rounded by GPTQ: {error}. Check the batches"
                ) from error
            for paths in group.weights:
                _convert(layers, paths, upper, blocksize, convert)
    finally:
        for module in training:
            module.training = True
    return unreached_paths


def _convert(layers: Mapping[str, Any], paths: list[str], upper: Tensor, blocksize: int, convert: Convert) -> None:
    owner = layers[paths[0]]
    weight = owner.weight.detach()
    packed = round_weight(weight.T if is_conv1d(owner) else weight, upper, blocksize)
    for path in paths:
        convert(layers[path], packed if layers[path] is owner else owner.packed)


@dataclass(frozen=True)
class _Call:
    """Last call of a layer: the input, the input's version counter (incremented by in-place operators), and the leader.

    The leader is the first of several weights that get the same input in consecutive calls, such as query, key and
    value.
    """

    x: Tensor
    version: int | None
    leader: int


def _groups_in_call_order(
    model: nn.Module, layers: Mapping[str, Any], batches: Sequence[Any]
) -> tuple[list[_Group], list[str]]:
    """Group weights by their input, in the order of their first calls.

    Returns:
        The groups, and the paths of layers that no batch reaches.
    """
    weights = {path: id(layer.weight) for path, layer in layers.items()}
    paths_of: dict[int, list[str]] = {}  # by weight
    for path, weight in weights.items():
        paths_of.setdefault(weight, []).append(path)
    groups: dict[int, _Group] = {}
    leaders: dict[int, int] = {}
    counts: Counter[int] = Counter()
    last_call: _Call | None = None

    def record_call(weight: int, x: Tensor) -> None:
        nonlocal last_call
        counts[weight] += 1
        groups.setdefault(weight, _Group([paths_of[weight]]))
        version = None if x.is_inference() else x._version
        is_same_input = last_call is not None and last_call.x is x and last_call.version == version
        leader = last_call.leader if last_call is not None and is_same_input else weight
        # A weight that shares another layer's input only in some calls forms its own group.
        if leaders.setdefault(weight, leader) != leader:
            leaders[weight] = leader = weight
        last_call = _Call(x, version, leader)

    for batch in batches:
        counts.clear()
        last_call = None
        _forward(model, weights, batch, record_call)
        for weight, count in counts.items():
            groups[weight].calls = max(groups[weight].calls, count)
    ordered_groups: list[_Group] = []
    for weight, group in groups.items():
        leader_group = groups[leaders[weight]]
        if leader_group is not group and leader_group.calls == group.calls == 1:
            leader_group.weights += group.weights
        else:
            ordered_groups.append(group)
    return ordered_groups, [path for path, weight in weights.items() if weight not in groups]


def _forward(model: nn.Module, keys: Mapping[str, Any], batch: Any, on_call: Callable[[Any, Tensor], object]) -> None:
    """Run the model on a batch, and pass (key, input) of each call of the modules at `keys` to `see`."""

    def hook(key: Any, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            on_call(key, x)

    handles = [
        model.get_submodule(path).register_forward_pre_hook(partial(hook, key), with_kwargs=True)
        for path, key in keys.items()
    ]
    try:
        with torch.no_grad():
            run(model, batch)
    except _StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _hessian(model: nn.Module, group: _Group, batches: Sequence[Any]) -> Tensor | None:
    """Return Xᵀ X of a group's inputs in all batches, fp64 `[in, in]`; None if no batch reaches the group."""
    total: Tensor | None = None
    for batch in batches:
        remaining = group.calls

        def record_call(_key: str, x: Tensor, batch: Any = batch) -> None:
            nonlocal total, remaining
            mask = batch.get("attention_mask") if hasattr(batch, "get") else None
            if isinstance(mask, Tensor) and mask.shape == x.shape[:-1]:
                x = x[mask.to(x.device).bool()]
            rows = x.reshape(-1, x.shape[-1]).float()
            product = (rows.T @ rows).double()
            total = product if total is None else total.add_(product)
            remaining -= 1
            if remaining == 0:
                raise _StopForward

        _forward(model, dict.fromkeys(group.paths, ""), batch, record_call)
    return total


def warn_of_nearest(unreached: Sequence[str], experts: Sequence[str]) -> None:
    """Warn about weights that are rounded to nearest because GPTQ has no calibration inputs for them."""
    for names, reason in ((unreached, "no batch reaches them"), (experts, "GPTQ does not support weights of experts")):
        if names:
            warn(f"{len(names)} weights ('{names[0]}') are rounded to nearest instead of by GPTQ, because {reason}")
