"""GPTQ's rounding of linear layers to affine4 (Frantar et al. 2022, arXiv 2210.17323).

For inputs X of a layer with weight W, columns of W are rounded one after the other. With H = Xᵀ X + damp and U the
upper Cholesky factor of H⁻¹, the error of column i, e = (w_i - rounded(w_i)) / U_ii, is made up for by the columns that
are not rounded yet: w_j -= e U_ij for j > i. A group's scale and zero point are those of its values when it begins.

Layers are rounded in the order in which the model calls them, each with inputs that the layers before it, rounded
already, give it.
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

_DAMP = 0.01  # of the mean of H's diagonal
Convert: TypeAlias = "Callable[[nn.Module, PackedWeight], object]"

_AT_ONCE = 32  # columns whose errors reach the columns behind them together


@torch.no_grad()
def rounded(weight: Tensor, upper: Tensor, blocksize: int) -> PackedWeight:
    """Round a weight to affine4 by GPTQ.

    Args:
        weight: fp32, fp16 or bf16 `[out, in]`; `in` is a multiple of `blocksize`.
        upper: fp64 `[in, in]`, see `inverse_factor`.
        blocksize: number of inputs in a group.
    """
    remaining, width = weight.double(), weight.shape[1]
    codes = torch.empty(weight.T.shape, dtype=torch.uint8, device=weight.device)
    scales, zeros = [], []
    step = min(blocksize, _AT_ONCE)
    for first in range(0, width, step):
        last = first + step
        if first % blocksize == 0:
            group = ops.quantize_affine4(remaining[:, first : first + blocksize].float(), blocksize)
            assert group.zeros is not None
            scales.append(group.absmax)
            zeros.append(group.zeros)
            scale, zero = scales[-1].double(), zeros[-1].double()
            inverse = (1 / scale).masked_fill_(scale == 0, 0)
        part, factor = remaining[:, first:last].T.contiguous(), upper[first:last, first:last]  # a row is a column of W
        errors = torch.empty_like(part)
        for i in range(step):
            code = (part[i] * inverse).round_().add_(zero).clamp_(0, 15)
            codes[first + i] = code.to(torch.uint8)
            errors[i] = (part[i] - scale * (code - zero)) / factor[i, i]
            part[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        remaining[:, last:].addmm_(errors.T, upper[first:last, last:], alpha=-1)
    return ops.affine4_weight(codes.T, torch.stack(scales, 1), torch.stack(zeros, 1), dtype=weight.dtype)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of Xᵀ X, fp64 `[in, in]`, with dampening.

    Raises:
        PeftcoreError: it is not finite.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # inputs that are always zero: their columns are rounded to nearest
    diagonal += _DAMP * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed or not lower.isfinite().all():
        raise PeftcoreError("the inputs are not finite")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


@dataclass
class _Group:
    """Weights that are rounded together, because their layers get the same inputs.

    Args:
        weights: paths of the layers of each weight: several if they share it.
        calls: number of calls of these layers in one forward pass.
    """

    weights: list[list[str]]
    calls: int = 0

    @property
    def paths(self) -> list[str]:
        """Paths of the layers to watch."""
        return self.weights[0]


class _Enough(BaseException):
    """Signal that ends a forward pass whose rest is not needed. No `except Exception` of a model catches it."""


def round_layers(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], blocksize: int, convert: Convert
) -> list[str]:
    """Convert linear layers to affine4 in place, one after the other, so that each dense weight is freed at once.

    Args:
        model: the model.
        layers: the layers, by path.
        batches: what the model is called with. Rows that an `attention_mask` excludes are left out.
        blocksize: number of inputs in a group.
        convert: (layer, packed weight) -> None: convert one layer in place.

    Returns:
        Paths of layers that no batch reaches, which are not converted.

    Raises:
        PeftcoreError: there is no batch, or inputs are not finite. Layers before those with such inputs are converted.
    """
    if not batches:
        raise PeftcoreError("`batches` is empty. If it is an iterator that has been read, pass a list or a DataLoader")
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        groups, unreached = _in_order(model, layers, batches)
        for group in groups:
            hessian = _hessian(model, group, batches)
            if hessian is None:  # routing has changed
                unreached += chain.from_iterable(group.weights)
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
    return unreached


def _convert(layers: Mapping[str, Any], paths: list[str], upper: Tensor, blocksize: int, convert: Convert) -> None:
    first = layers[paths[0]]
    weight = first.weight.detach()
    packed = rounded(weight.T if is_conv1d(first) else weight, upper, blocksize)
    for path in paths:
        convert(layers[path], packed if layers[path] is first else first.packed)


@dataclass(frozen=True)
class _Call:
    """Call of a layer: its input with the version that in-place operators raise, and the leader of the layer's weight.

    The leader of weights that get one input in consecutive calls, such as query, key and value, is the first of them.
    """

    x: Tensor
    version: int | None
    leader: int


def _in_order(model: nn.Module, layers: Mapping[str, Any], batches: Sequence[Any]) -> tuple[list[_Group], list[str]]:
    """Return the weights, grouped by their input, in the order of first calls, and the paths that no batch reaches."""
    weights = {path: id(layer.weight) for path, layer in layers.items()}
    paths_of: dict[int, list[str]] = {}  # by weight
    for path, weight in weights.items():
        paths_of.setdefault(weight, []).append(path)
    groups: dict[int, _Group] = {}
    leaders: dict[int, int] = {}
    counts: Counter[int] = Counter()
    latest: _Call | None = None

    def see(weight: int, x: Tensor) -> None:
        nonlocal latest
        counts[weight] += 1
        groups.setdefault(weight, _Group([paths_of[weight]]))
        version = None if x.is_inference() else x._version
        again = latest is not None and latest.x is x and latest.version == version
        leader = latest.leader if latest is not None and again else weight
        if leaders.setdefault(weight, leader) != leader:  # the inputs are not the same in all calls
            leaders[weight] = leader = weight
        latest = _Call(x, version, leader)

    for batch in batches:
        counts.clear()
        latest = None
        _forward(model, weights, batch, see)
        for weight, count in counts.items():
            groups[weight].calls = max(groups[weight].calls, count)
    ordered: list[_Group] = []
    for weight, group in groups.items():
        leading = groups[leaders[weight]]
        if leading is not group and leading.calls == group.calls == 1:
            leading.weights += group.weights
        else:
            ordered.append(group)
    return ordered, [path for path, weight in weights.items() if weight not in groups]


def _forward(model: nn.Module, keys: Mapping[str, Any], batch: Any, see: Callable[[Any, Tensor], object]) -> None:
    """Run the model on a batch, and pass (key, input) of each call of the modules at `keys` to `see`."""

    def look(key: Any, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            see(key, x)

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(look, key), with_kwargs=True)
        for path, key in keys.items()
    ]
    try:
        with torch.no_grad():
            run(model, batch)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _hessian(model: nn.Module, group: _Group, batches: Sequence[Any]) -> Tensor | None:
    """Return Xᵀ X of a group's inputs in all batches, fp64; None without inputs."""
    total: Tensor | None = None
    for batch in batches:
        remaining = group.calls

        def see(_key: str, x: Tensor, batch: Any = batch) -> None:
            nonlocal total, remaining
            mask = batch.get("attention_mask") if hasattr(batch, "get") else None
            if isinstance(mask, Tensor) and mask.shape == x.shape[:-1]:
                x = x[mask.to(x.device).bool()]
            rows = x.reshape(-1, x.shape[-1]).float()
            product = (rows.T @ rows).double()
            total = product if total is None else total.add_(product)
            remaining -= 1
            if remaining == 0:
                raise _Enough

        _forward(model, dict.fromkeys(group.paths, ""), batch, see)
    return total


def warn_of_nearest(unreached: Sequence[str], experts: Sequence[str]) -> None:
    """Warn of weights that are rounded to nearest, since GPTQ has no inputs of theirs."""
    for names, reason in ((unreached, "no batch reaches them"), (experts, "they are weights of experts")):
        if names:
            warn(f"{len(names)} weights ('{names[0]}') are rounded to nearest and not by GPTQ, because {reason}")
