"""`convert`: approximate the weight changes of any adapter by low-rank products.

B A = the matrix of rank r nearest to W' - W, where (W', b) = merged(W, b)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.adaptation.adapted import changes_at
from peftcore.engine.composing import low_rank
from peftcore.engine.composing.low_rank import Approximation, fraction_kept, nearest_to_matrix, nearest_to_product
from peftcore.engine.merging.merged_layers import MergedCopies, is_mergeable, merged_copies
from peftcore.errors import PeftcoreError, with_argument_hints
from peftcore.model.weight_formats import DENSE, find_weight_format, weight_format
from peftcore.plugin import sharded
from peftcore.plugin.registry import registry
from peftcore.plugin.validation import positive_whole

Change = Tensor | tuple[Tensor, Tensor]  # dense [rows, columns] as stored, or b [rows, R] · a [R, columns]
Refusal = Callable[[str], PeftcoreError]


@with_argument_hints
@engine.exclusive("convert an adapter", base=True)
def convert(
    model: nn.Module, source: str, *, method: str, r: int | None = 16, adapter: str | None = None
) -> dict[str, float]:
    """Add a new, inactive adapter of `method` that approximates `source` with rank `r`.

    The approximation is exact if `r` is at least the rank of the change; the smaller width of the layer always
    suffices.

    Args:
        model: a model with the adapter.
        source: name of the adapter to approximate.
        method: a method with low-rank adapters: one whose entry in `peftcore.methods()` has `low_rank`.
        r: rank; None for the smallest rank that keeps 99 % of the change, chosen per layer.
        adapter: name of the new adapter; by default `SOURCE-METHOD`.

    Returns:
        The fraction of each weight's change that is kept, |B A| / |W' - W| (Frobenius norm; over all experts of a
        layer), by path. A fraction k means a relative error of sqrt(1 - k²). It is 1 for a weight that the adapter does
        not change.

    Raises:
        PeftcoreError: the adapter does more than change weights (prompts, bottlenecks, biases, `modules_to_save`).
            The model is left unchanged.

    Examples:
        >>> peftcore.apply(model, "dora", r=8, adapter="style")
        >>> kept = peftcore.convert(model, "style", method="lora", r=16)    # adds "style-lora"
        >>> min(kept.values())                          # the smallest fraction kept of any change
    """
    state, entry = engine.require_state(model), engine.applied(model, source)
    engine.refuse_merged(state, "convert an adapter")
    engine.refuse_changed(model)
    sharded.refuse_sharded(model, "convert an adapter")
    if r is not None:
        positive_whole(r=r)
    target = registry.method(method)
    if target.low_rank is None:
        usable = [name for name, installed in registry.methods().items() if installed.low_rank is not None]
        raise PeftcoreError(f"method={method!r} does not make low-rank adapters. Choose one of: {usable}")
    low_rank.refuse_trained(model, source, "be converted")
    approximations: dict[str, list[Approximation]] = {}
    checked_kinds: set[Hashable] = set()
    for path, adapter_module in engine.adapter_modules(model, source):
        for weight, changes in _changes(model, source, path, adapter_module, checked_kinds).items():
            approximations[weight] = _nearest(changes, r)
    template = entry.config if entry.method == method else None
    like = next((p.dtype for _, p in engine.adapter_parameters(model, source) if p.is_floating_point()), None)
    name = f"{source}-{method}" if adapter is None else adapter
    products: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path, of_weight in approximations.items():
        products[path] = [(approximation.product.b, approximation.product.a) for approximation in of_weight]
    low_rank.add(model, name, target, template, products, like, of_weights=True)
    return {path: fraction_kept(of_weight) for path, of_weight in approximations.items()}


@torch.no_grad()
def _nearest(changes: Sequence[Change], r: int | None) -> list[Approximation]:
    """Return the nearest product to each change, all with the same rank: `r`, or the largest required rank."""

    def nearest(change: Change, r: int | None) -> Approximation:
        return nearest_to_matrix(change, r) if isinstance(change, Tensor) else nearest_to_product(*change, r)

    if r is None:
        r = max(nearest(change, None).product.b.shape[1] for change in changes)
    return [nearest(change, r) for change in changes]


@torch.no_grad()
def _changes(
    model: nn.Module, adapter: str, path: str, adapter_module: nn.Module, checked_kinds: set[Hashable]
) -> dict[str, list[Change]]:
    """Return {path: change} of the weights at `path`, with an entry per expert for stacked weights.

    Args:
        checked_kinds: kinds of adapters that were already checked; see `low_rank.why_not`.
    """
    module, method = model.get_submodule(path), engine.applied(model, adapter).method

    def refuse(reason: str) -> PeftcoreError:
        return PeftcoreError(f"'{adapter}' ({method}) cannot be converted: its change at '{path}' {reason}")

    if not is_mergeable(module, adapter):
        raise refuse("is not a change of a weight")
    changes = changes_at(module, adapter)
    by_name = {} if "weight" in changes else changes
    products = _exact_products(module, path, by_name, adapter_module, checked_kinds, method)
    if products is not None:
        return products
    stored_format = find_weight_format(module) if by_name else weight_format(module)
    copies = merged_copies(path, module, {adapter: method}, stored_format)
    tensors = _of_parameters(copies, list(by_name), refuse) if by_name else {"": _of_layer(module, copies, refuse)}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise refuse("results in a weight with NaN or Inf")
    # A change of stacked weights `[experts, rows, columns]` has one matrix per expert.
    dense_changes: dict[str, list[Change]] = {}
    for name, tensor in tensors.items():
        dense_changes[_joined(path, name)] = [*tensor] if name and tensor.ndim == 3 else [tensor.flatten(1)]
    return dense_changes


def _exact_products(
    module: nn.Module,
    path: str,
    by_name: Mapping[str, nn.Module],
    adapter_module: nn.Module,
    checked_kinds: set[Hashable],
    method: str,
) -> dict[str, list[Change]] | None:
    """Return {path: the adapter's own low-rank product}; None if the adapter does more than add products.

    Args:
        by_name: {name of a parameter: its adapter}; empty if the adapter acts on the whole layer.
    """
    sites = {_joined(path, name): (low_rank.Site(module, name), change) for name, change in by_name.items()}
    sites = sites or {path: (low_rank.Site(module), adapter_module)}
    if any(low_rank.why_not(site, adapter, checked_kinds, method) for site, adapter in sites.values()):
        return None
    products = {weight: _products(adapter) for weight, (_, adapter) in sites.items()}
    return products if by_name or len(products[path]) == 1 else None


def _joined(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))


def _products(adapter: Any) -> list[Change]:
    pairs = ((f.scale * f.b.float().flatten(1), f.a.float().flatten(1), f.transposed) for f in adapter.low_rank())
    return [(a.T, b.T) if transposed else (b, a) for b, a, transposed in pairs]


def _of_layer(module: nn.Module, copies: MergedCopies, refuse: Refusal) -> Tensor:
    form = weight_format(module)
    dense = form if form.decode is None else DENSE  # quantized weights are dense in the copies
    old_weight, new_weight = dense.read(copies.base).float(), dense.read(copies.merged).float()
    biases = [dense.read_bias(copy) for copy in (copies.base, copies.merged)]
    if biases[0] is not None and not torch.equal(*cast(list[Tensor], biases)):
        raise refuse(
            "includes the bias, which a low-rank product cannot change. Combine or merge the adapter without "
            "converting it"
        )
    _refuse_more(copies, dense.write(copies.merged, new_weight).keys() | {"bias"}, refuse)
    return new_weight - old_weight


def _of_parameters(copies: MergedCopies, names: Sequence[str], refuse: Refusal) -> dict[str, Tensor]:
    _refuse_more(copies, set(names), refuse)
    return {name: (getattr(copies.merged, name) - getattr(copies.base, name)).float() for name in names}


def _refuse_more(copies: MergedCopies, allowed_names: Set[str], refuse: Refusal) -> None:
    other_names = copies.changed.keys() - allowed_names
    if other_names:
        raise refuse(f"includes '{min(other_names)}', which is not a weight of the layer")
