"""`convert`: the change of weights that any adapter makes, as thin products of a given rank.

B A = the nearest to W' - W of rank r, where (W', b) = merged(W, b)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcore import engine, ranks
from peftcore.adaptation.chain import WeightChanges
from peftcore.composing import low_rank
from peftcore.composing.products import Product, of_matrix, of_product
from peftcore.errors import PeftcoreError
from peftcore.merging.layers import is_mergeable, worked_in
from peftcore.registry import registry
from peftcore.validation import positive_whole
from peftcore.weight_formats import DENSE, weight_format


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
        The share of each layer's change that its rank keeps, |B A| / |W' - W| (Frobenius), by path: where it is k, the
        error is sqrt(1 - k²) of the change. 1 where nothing is changed.

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
    placed, seen = dict(engine.adapter_modules(model, adapter)), set[Any]()
    found = {path: _nearest(model, adapter, path, each, r, seen) for path, each in placed.items()}
    template = entry.config if entry.method == to else None
    like = next((p.dtype for _, p in engine.adapter_parameters(model, adapter) if p.is_floating_point()), None)
    new = f"{adapter}-{to}" if name is None else name
    products = {path: [(product.b, product.a)] for path, product in found.items()}
    low_rank.add(model, new, method, template, products, like, of_weights=True)
    return {path: product.kept for path, product in found.items()}


@torch.no_grad()
def _nearest(model: nn.Module, adapter: str, path: str, placed: Any, r: int | None, seen: set[Any]) -> Product:
    """The product for the weight at `path`, laid out as that is."""
    module, entry = model.get_submodule(path), engine.applied(model, adapter)

    def refuse(why: str) -> PeftcoreError:
        return PeftcoreError(f"'{adapter}' ({entry.method}) cannot be converted: what it does at '{path}' {why}")

    if not is_mergeable(placed):
        raise refuse("is no change of a weight")
    if isinstance(placed, WeightChanges) and "weight" not in placed.changes:
        raise refuse(
            f"changes parameters by name ({', '.join(placed.changes)}), and products are made of a layer's weight. "
            "Of such adapters peftcore.combine makes sums, with method='svd' of smaller rank"
        )
    if not low_rank.why_not(low_rank.Site(module), placed, seen):
        factors = placed.factors()
        if len(factors) == 1:
            (f,) = factors
            b, a = f.scale * f.b.float().flatten(1), f.a.float().flatten(1)
            return of_product(a.T, b.T, r) if f.transposed else of_product(b, a, r)
    form = weight_format(module)
    worked = worked_in(path, module, [adapter], form)
    dense = form if form.decode is None else DENSE  # what is kept in few bits is dense in the copies
    before, after = dense.read(worked.base).float(), dense.read(worked.merged).float()
    biases = [dense.read_bias(copy) for copy in (worked.base, worked.merged)]
    if biases[0] is not None and not torch.equal(*cast(list[Tensor], biases)):
        raise refuse("changes the bias, too, which products of weights cannot. Combine or merge it as it is")
    others = worked.changed.keys() - dense.write(worked.merged, after).keys() - {"bias"}
    if others:
        raise refuse(f"changes '{min(others)}', too, which is not the weight that products are added to")
    change = after - before
    if not bool(change.isfinite().all()):
        raise refuse("gives a weight that is not finite")
    return of_matrix(change.flatten(1), r)
