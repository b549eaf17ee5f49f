"""`convert`: the change of weights that any adapter makes, as thin products of a given rank.

B A = the nearest to W' - W of rank r, where (W', b) = merged(W, b)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore import engine, ranks
from peftcore.adaptation.chain import WeightChanges
from peftcore.composing import low_rank
from peftcore.composing.products import Product, kept_of, of_matrix, of_product
from peftcore.errors import PeftcoreError
from peftcore.merging.merged_layers import Worked, is_mergeable, worked_in
from peftcore.registry import registry
from peftcore.validation import positive_whole
from peftcore.weight_formats import DENSE, find_weight_format, weight_format

Change = Tensor | tuple[Tensor, Tensor]  # of a weight as it lies, [rows, columns], or as b [rows, R] · a [R, columns]
Refusal = Callable[[str], PeftcoreError]


@engine.alone("convert an adapter", base=True)
def convert(
    model: nn.Module, adapter: str, *, to: str, r: int | None = 16, name: str | None = None
) -> dict[str, float]:
    """Give `model` a new adapter, of the method `to`, that is the nearest of rank `r` to what `adapter` does. It rests.

    A rank as large as the layer's smaller width is exact, as is one of at least its own for what is a thin product
    already. What the new adapter loses is said, not hidden: see what is returned.

    Args:
        to: a method whose adapters are thin products, such as those that `peftcore.methods()` lists with `low_rank`.
        r: None: in each layer the smallest that keeps 99 % of the change.
        name: of the new adapter; by default `adapter-to`.

    Returns:
        The share of each weight's change that its rank keeps, |B A| / |W' - W| (Frobenius; of experts over them all),
        by path: where it is k, the error is sqrt(1 - k²) of the change. 1 where nothing is changed.

    Raises:
        PeftcoreError: the adapter is no change of weights alone (prompts, bottlenecks, biases, modules trained whole).
            The model is then as it was.
    """
    engine.call_in(model, adapter)
    state, entry = engine.require_state(model), engine.applied(model, adapter)
    engine.refuse_merged(state, "convert an adapter")
    engine.refuse_changed(model)
    ranks.refuse_sharded(model, "convert an adapter")
    if r is not None:
        positive_whole(r=r)
    method = registry.method(to)
    if method.low_rank is None:
        able = [other for other, each in registry.methods().items() if each.low_rank is not None]
        raise PeftcoreError(f"to={to!r}: its adapters are no thin products. Those of {able} are")
    low_rank.refuse_trained(model, adapter, "be converted")
    found: dict[str, list[Product]] = {}
    seen: set[Any] = set()
    for path, placed in engine.adapter_modules(model, adapter):
        changes = _changes(model, adapter, path, placed, seen)
        found |= {weight: _nearest(each, r) for weight, each in changes.items()}
    template = entry.config if entry.method == to else None
    like = next((p.dtype for _, p in engine.adapter_parameters(model, adapter) if p.is_floating_point()), None)
    new = f"{adapter}-{to}" if name is None else name
    products = {path: [(each.b, each.a) for each in own] for path, own in found.items()}
    low_rank.add(model, new, method, template, products, like, of_weights=True)
    return {path: kept_of(own) for path, own in found.items()}


@torch.no_grad()
def _nearest(changes: Sequence[Change], r: int | None) -> list[Product]:
    """Of each a product, all of one rank: without `r`, of the largest that one of them needs."""

    def of(change: Change, r: int | None) -> Product:
        return of_matrix(change, r) if isinstance(change, Tensor) else of_product(*change, r)

    if r is None:
        r = max(of(change, None).b.shape[1] for change in changes)
    return [of(change, r) for change in changes]


@torch.no_grad()
def _changes(model: nn.Module, adapter: str, path: str, placed: Any, seen: set[Any]) -> dict[str, list[Change]]:
    """What `placed` changes of the weights at `path`, by the path of each: of experts one change for each."""
    module, method = model.get_submodule(path), engine.applied(model, adapter).method

    def refuse(why: str) -> PeftcoreError:
        return PeftcoreError(f"'{adapter}' ({method}) cannot be converted: what it does at '{path}' {why}")

    if not is_mergeable(placed):
        raise refuse("is no change of a weight")
    by_name = placed.changes if isinstance(placed, WeightChanges) and "weight" not in placed.changes else {}
    sites = {_joined(path, name): (low_rank.Site(module, name), each) for name, each in by_name.items()}
    sites = sites or {path: (low_rank.Site(module), placed)}
    if not any(low_rank.why_not(site, each, seen, method) for site, each in sites.values()):
        found = {weight: _products(each) for weight, (_, each) in sites.items()}
        if by_name or len(found[path]) == 1:
            return found
    chosen = find_weight_format(module) if by_name else weight_format(module)
    worked = worked_in(path, module, {adapter: method}, chosen)
    changes = _of_parameters(worked, list(by_name), refuse) if by_name else {"": _of_layer(module, worked, refuse)}
    if not all(bool(each.isfinite().all()) for each in changes.values()):
        raise refuse("gives a weight that is not finite")
    return {
        _joined(path, name): [*each] if name and each.ndim == 3 else [each.flatten(1)] for name, each in changes.items()
    }


def _joined(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))


def _products(adapter: Any) -> list[Change]:
    pairs = ((f.scale * f.b.float().flatten(1), f.a.float().flatten(1), f.transposed) for f in adapter.factors())
    return [(a.T, b.T) if transposed else (b, a) for b, a, transposed in pairs]


def _of_layer(module: nn.Module, worked: Worked, refuse: Refusal) -> Tensor:
    form = weight_format(module)
    dense = form if form.decode is None else DENSE  # what is kept in few bits is dense in the copies
    before, after = dense.read(worked.base).float(), dense.read(worked.merged).float()
    biases = [dense.read_bias(copy) for copy in (worked.base, worked.merged)]
    if biases[0] is not None and not torch.equal(*cast(list[Tensor], biases)):
        raise refuse("changes the bias, too, which products of weights cannot. Combine or merge it as it is")
    _refuse_more(worked, dense.write(worked.merged, after).keys() | {"bias"}, refuse)
    return after - before


def _of_parameters(worked: Worked, names: Sequence[str], refuse: Refusal) -> dict[str, Tensor]:
    _refuse_more(worked, set(names), refuse)
    return {name: (getattr(worked.merged, name) - getattr(worked.base, name)).float() for name in names}


def _refuse_more(worked: Worked, known: Set[str], refuse: Refusal) -> None:
    others = worked.changed.keys() - known
    if others:
        raise refuse(f"changes '{min(others)}', too, which is not a weight that products are added to")
