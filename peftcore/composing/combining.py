"""`combine`: a new adapter that is a weighted sum of others.

products   adapters with `factors` (method.py), module by module; where one does not stand it adds nothing
tensors    of adapters whose change is linear in them (`neutral`), and of parameters of the base that are trained:
           t = t0 + Σ w_i (t_i - t0), with t0 the value at which nothing is changed
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from peftcore import engine, ranks
from peftcore.adaptation.light import own_tensors
from peftcore.composing import low_rank
from peftcore.composing.arithmetic import Majority, Pruning, pruned_sum, weighted_sum
from peftcore.composing.likeness import difference
from peftcore.composing.products import dense, of_matrix, of_product
from peftcore.engine.trained import TrainedParameters, base_tensors
from peftcore.errors import PeftcoreError, nearest
from peftcore.merging.merged_layers import is_mergeable
from peftcore.method import Factors, Model
from peftcore.registry import registry
from peftcore.validation import positive_whole

How = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]


@engine.alone("combine adapters", base=True)
def combine(
    model: Model,
    adapters: Sequence[str],
    *,
    name: str,
    weights: Sequence[float] | None = None,
    method: How = "cat",
    density: float | None = None,
    majority_sign_method: Majority = "total",
    r: int | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """Give `model` the new adapter `name`, made of others, as PEFT's `add_weighted_adapter` makes it. It rests.

    With ΔW_i = s_i B_i A_i what adapter i adds to a weight, s_i its scale and w_i its weight, the new one adds

        "cat"     Σ w_i ΔW_i, exactly: the factors one beside the other. Its rank is the sum of theirs.
        "svd"     of all of rank `r` the nearest to that sum: exact where its rank is no larger.
        "linear"  (Σ c_i B_i) (Σ ±c_i A_i), c_i = sqrt|w_i s_i|, with the sign of w_i s_i, as in PEFT. This is *not*
                  the sum: products of one adapter's B with another's A are in it. Of equal ranks only.
        "ties", "dare_linear", "dare_ties", "magnitude_prune"
                  the same, of factors that are thinned out first (arithmetic.py): needs `density`.
        "ties_svd", ...
                  ΔW_i are thinned out themselves and summed, and the nearest of rank `r` is taken.

    Adapters whose change is linear in their tensors, and parameters of the base that they train, are summed as they
    are with "cat" or "linear", which are then both exact.

    Args:
        adapters: names of applied adapters, active or not. A module that only some of them stand at gets theirs.
        weights: one for each, of any sign; by default 1.
        density: the share of entries that is kept, more than 0, at most 1.
        majority_sign_method: "total" (of values) or "frequency" (of signs), for ties.
        r: rank for "svd" and those that end so; by default the largest of the given adapters.
        generator: of what is dropped at random; by default PyTorch's own.

    Raises:
        PeftcoreError: an adapter cannot be combined, or not so. The model is then as it was.
    """
    state = engine.require_state(model)
    engine.refuse_merged(state, "combine adapters")
    engine.refuse_changed(model)
    ranks.refuse_sharded(model, "combine adapters")
    names, given = _sources(model, adapters, weights)
    pruning = _pruning(method, density, majority_sign_method, generator)
    if r is not None:
        positive_whole(r=r)
        if not method.endswith("svd"):
            raise PeftcoreError(f"r={r} says nothing to '{method}', whose rank is that of what it sums")
    if any(low_rank.has_factors(model, each) for each in names):
        _combine_products(model, names, given, name, method, pruning, r)
    elif method in ("cat", "linear"):
        _combine_tensors(model, names, given, name)
    else:
        for each in names:  # says what is in the way
            low_rank.factors_of(model, each, f"be combined by '{method}'")
    return model


def _combine_products(
    model: nn.Module, names: list[str], weights: list[float], name: str, method: str, how: Pruning | None, r: int | None
) -> None:
    sources = [low_rank.factors_of(model, each, "be combined") for each in names]
    makers = [(registry.method(entry.method), entry.config) for entry in (engine.applied(model, n) for n in names)]
    maker = next((each for each in makers if each[0].low_rank is not None), None)
    if maker is None:
        raise PeftcoreError(
            f"no adapter is made of a sum of those of {makers[0][0].name}. "
            + low_rank.ways(f"peftcore.convert(model, '{names[0]}', to=...)")
        )
    largest = max(f.a.shape[0] for source in sources for pairs in source.values() for f in pairs)
    products: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path in dict.fromkeys(path for source in sources for path in source):
        here = [(source[path], w) for source, w in zip(sources, weights, strict=True) if path in source]
        lists, own = [pairs for pairs, _ in here], [w for _, w in here]
        if len({tuple((f.a.shape[1:], f.b.shape[0], f.transposed) for f in pairs) for pairs in lists}) > 1:
            raise PeftcoreError(f"the adapters {names} change the weight of '{path}' in products of different shapes")
        products[path] = [_product(path, each, own, method, how, r or largest) for each in zip(*lists, strict=True)]
    first = next(iter(sources[0].values()))[0].a
    low_rank.add(model, name, *maker, products, first.dtype)


@torch.no_grad()
def _product(
    path: str, factors: Sequence[Factors], weights: Sequence[float], method: str, how: Pruning | None, r: int
) -> tuple[Tensor, Tensor]:
    """(b, a) of what stands at one weight, fp32, in the shapes of its factors."""
    first = factors[0]
    a, b = [f.a.float().flatten(1) for f in factors], [f.b.float().flatten(1) for f in factors]
    scaled = [weight * f.scale for f, weight in zip(factors, weights, strict=True)]
    if method.endswith("svd"):
        if how is None:
            product = of_product(torch.cat(b, 1), torch.cat([c * t for c, t in zip(scaled, a, strict=True)]), r)
        else:
            product = of_matrix(pruned_sum([dense(f) for f in factors], weights, how), r)
        left, right = product.b, product.a
    elif method == "cat":
        left, right = torch.cat(b, 1), torch.cat([c * t for c, t in zip(scaled, a, strict=True)])
    else:
        found = sorted({t.shape[0] for t in a})
        if len(found) > 1:
            raise PeftcoreError(
                f"'{method}' adds A to A and B to B, which needs equal ranks, and at '{path}' they are {found}. "
                "Of different ranks: method='cat' (exact, its rank is their sum) or 'svd'"
            )
        with_sign = [math.copysign(math.sqrt(abs(c)), c) for c in scaled]
        roots = [abs(c) for c in with_sign]
        if how is None:
            right, left = weighted_sum(a, with_sign), weighted_sum(b, roots)
        else:
            right, left = pruned_sum(a, with_sign, how), pruned_sum(b, roots, how)
    rank = right.shape[0]
    return left.reshape(-1, rank, *first.b.shape[2:]), right.reshape(rank, *first.a.shape[1:])


def _combine_tensors(model: nn.Module, names: list[str], weights: list[float], name: str) -> None:
    entries = [engine.applied(model, each) for each in names]
    parts = [_linear_parts(model, each) for each in names]
    first = dict(engine.adapter_modules(model, names[0]))
    for other, entry, there in zip(names[1:], entries[1:], parts[1:], strict=True):
        why = "their tensors are not of the same modules and shapes"
        if entry.method == entries[0].method and _shapes(there) == _shapes(parts[0]):
            unlike = (difference(first[path], each) for path, each in engine.adapter_modules(model, other))
            why = next(filter(None, unlike), "")
        if why:
            raise PeftcoreError(
                f"'{names[0]}' ({entries[0].method}) and '{other}' ({entry.method}) cannot be combined: {why}"
            )
    sums = {
        key: neutral.float() + weighted_sum([there[key][0].float() - neutral.float() for there in parts], weights)
        for key, (_, neutral) in parts[0].items()
    }
    dtype = next((tensor.dtype for (kind, _), (tensor, _) in parts[0].items() if kind), None)
    with low_rank.resting(model, name, entries[0].config, dtype):
        made = _linear_parts(model, name)
        if _shapes(made) != _shapes(parts[0]):
            raise PeftcoreError(f"{entries[0].method} places something else than at '{names[0]}'")
        with torch.no_grad():
            for key, (tensor, _) in made.items():
                tensor.copy_(sums[key])
                if not bool(tensor.isfinite().all()):
                    raise PeftcoreError(f"'{name}' would hold values in '{key[1]}' that are not finite")


Parts = Mapping[tuple[str, str], tuple[Tensor, Tensor]]


def _linear_parts(model: nn.Module, adapter: str) -> Parts:
    """{(type of the adapter, name): (tensor, its value where it changes nothing)}; no type: a parameter of the base."""
    entry, what = engine.applied(model, adapter), "be combined"
    low_rank.refuse_saved(model, adapter, what)
    parts: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    placed: Any
    for path, placed in engine.adapter_modules(model, adapter):
        own = own_tensors(placed)
        neutral = placed.neutral() if hasattr(placed, "neutral") else None
        if neutral is None or own.keys() != neutral.keys():
            raise PeftcoreError(
                f"'{adapter}' ({entry.method}) cannot {what}: what it does at '{path}' is no sum, for it does not "
                f"follow its tensors in proportion. "
                + low_rank.ways(f"peftcore.convert(model, '{adapter}', to=...)", is_mergeable(placed))
            )
        for key, tensor in own.items():
            parts[type(placed).__qualname__, f"{path}.{key}"] = tensor.detach(), neutral[key].to(tensor.device)
    owned = TrainedParameters.of(model, adapter)
    if owned is not None:
        if owned.has_moved(model):
            low_rank.refuse_trained(model, adapter, what)
        base = base_tensors(model)
        parts |= {("", key): (value.detach(), base[key].detach()) for key, value in owned.values(model)}
    return parts


def _shapes(parts: Parts) -> dict[tuple[str, str], torch.Size]:
    return {key: tensor.shape for key, (tensor, _) in parts.items()}


def _sources(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float] | None
) -> tuple[list[str], list[float]]:
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise PeftcoreError(f"combine takes a list of names of adapters, found {adapters!r}")
    engine.call_in(model, *adapters)
    for name in adapters:
        engine.applied(model, name)
    given = [1.0] * len(adapters) if weights is None else list(weights)
    wrong = [w for w in given if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w)]
    if wrong or len(given) != len(adapters):
        raise PeftcoreError(f"weights must be {len(adapters)} finite numbers, one for each adapter, found {weights!r}")
    return list(adapters), [float(w) for w in given]


def _pruning(
    method: str, density: float | None, majority: Majority, generator: torch.Generator | None
) -> Pruning | None:
    """How tensors are thinned out by `method`, or None where they are not."""
    if method not in get_args(How):
        raise PeftcoreError(
            f"method={method!r} is not known{nearest(str(method), get_args(How))}. Known: {', '.join(get_args(How))}"
        )
    if majority not in get_args(Majority):
        raise PeftcoreError(f"majority_sign_method must be one of {list(get_args(Majority))}, found {majority!r}")
    kind = method.removesuffix("_svd")
    if kind in ("cat", "svd", "linear"):
        if density is not None:
            raise PeftcoreError(f"density={density} says nothing to '{method}', which keeps every entry")
        return None
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise PeftcoreError(
            f"'{method}' needs density, the share of entries that it keeps, above 0 and at most 1, found {density!r}"
        )
    random, elects = kind.startswith("dare"), kind.endswith("ties")
    return Pruning(random, elects, float(density), majority, generator)
