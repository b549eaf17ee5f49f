"""`combine`: a new adapter that is a weighted sum of others.

products   adapters with `low_rank` (adapter.py), module by module; an adapter adds nothing where it is not attached
tensors    adapters whose change is linear in their tensors (`neutral`), and trained parameters of the base:
           t = t0 + Σ w_i (t_i - t0), where t0 is the value at which the adapter changes nothing

The weighted sums come from the literature on model merging:

task arithmetic   Σ w_i t_i                                            (Ilharco et al. 2023, arXiv 2212.04089)
ties              trim, elect a sign, average the values that have it   (Yadav et al. 2023, arXiv 2306.01708)
dare              drop at random, scale the rest by 1 / density        (Yu et al. 2024, arXiv 2311.03099)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.composing import low_rank
from peftcore.engine.composing.compatibility import difference
from peftcore.engine.composing.low_rank import dense, nearest_to_matrix, nearest_to_product
from peftcore.engine.merging.merged_layers import is_mergeable
from peftcore.engine.trained_parameters import TrainedParameters, base_tensors
from peftcore.errors import PeftcoreError, nearest, with_argument_hints
from peftcore.plugin import sharded
from peftcore.plugin.adapter import LowRank, neutral_of
from peftcore.plugin.method import Method, Model
from peftcore.plugin.modules import own_tensors
from peftcore.plugin.registry import registry
from peftcore.plugin.validation import positive_whole

Majority = Literal["total", "frequency"]


@dataclass(frozen=True)
class Pruning:
    """Options of `pruned_sum`.

    Args:
        random: drop random entries and rescale the rest; otherwise keep the entries with the largest magnitudes.
        elects: average, for each entry, only the tensors with the majority sign.
        density: fraction of entries kept, in (0, 1].
        majority: how the majority sign is determined: "total" sums values, "frequency" sums signs.
        generator: random generator for dropping entries; None for PyTorch's default.
    """

    random: bool
    elects: bool
    density: float
    majority: Majority = "total"
    generator: torch.Generator | None = None


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w_i t_i of tensors of equal shape."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def pruned_sum(tensors: Sequence[Tensor], weights: Sequence[float], pruning: Pruning) -> Tensor:
    """Return the weighted sum of pruned tensors. Signs are elected before the weights are applied."""
    prune: Callable[[Tensor, Pruning], Tensor] = _drop if pruning.random else _trim
    pruned = [prune(tensor, pruning) for tensor in tensors]
    if not pruning.elects:
        return weighted_sum(pruned, weights)
    signs = torch.stack([tensor.sign() for tensor in pruned])
    total = signs.sum(0) if pruning.majority == "frequency" else torch.stack(pruned).sum(0)
    agrees = signs == torch.where(total >= 0, 1.0, -1.0)
    agreeing = [tensor * mask for tensor, mask in zip(pruned, agrees, strict=True)]
    return weighted_sum(agreeing, weights) / agrees.sum(0).clamp(min=1)


def _trim(tensor: Tensor, pruning: Pruning) -> Tensor:
    """Keep the fraction `density` of entries with the largest magnitude; zero the rest."""
    if pruning.density == 1:
        return tensor
    flat = tensor.reshape(-1)
    indices = torch.topk(flat.abs(), int(pruning.density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, indices, flat[indices]).view_as(tensor)


def _drop(tensor: Tensor, pruning: Pruning) -> Tensor:
    """Keep each entry with probability `density` and divide it by `density`; zero the rest."""
    if pruning.density == 1:
        return tensor
    mask = torch.bernoulli(torch.full_like(tensor, pruning.density), generator=pruning.generator)
    return tensor * mask / pruning.density


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


@with_argument_hints
@engine.exclusive("combine adapters", base=True)
def combine(
    model: Model,
    adapters: Sequence[str],
    *,
    adapter: str,
    weights: Sequence[float] | None = None,
    how: How = "cat",
    density: float | None = None,
    majority_sign_method: Majority = "total",
    r: int | None = None,
    generator: torch.Generator | None = None,
) -> Model:
    """Add a new, inactive adapter that is a weighted sum of existing ones, like PEFT's `add_weighted_adapter`.

    If adapter i adds ΔW_i = s_i B_i A_i to a weight, with scale s_i and weight w_i, the new adapter adds

        "cat"     Σ w_i ΔW_i, exactly, by concatenating the factors. The rank is the sum of the ranks.
        "svd"     the nearest matrix of rank `r` to that sum; exact if the sum's rank is at most `r`.
        "linear"  (Σ c_i B_i) (Σ ±c_i A_i), c_i = sqrt|w_i s_i|, with the sign of w_i s_i, as in PEFT. This is *not*
                  the sum: it contains products of one adapter's B and another's A. Needs equal ranks.
        "ties", "dare_linear", "dare_ties", "magnitude_prune"
                  like "linear", on factors that are pruned first (`pruned_sum`). Needs `density`.
        "ties_svd", ...
                  prunes and sums the ΔW_i themselves, then takes the nearest matrix of rank `r`.

    "cat" and "linear" sum trained base parameters, and adapters whose change is linear in their tensors, directly; the
    result is exact.

    Args:
        model: a model with the adapters.
        adapters: names of applied adapters, active or not. In a module that only some of them change, these are summed.
        adapter: name of the new adapter.
        weights: one number per adapter, of any sign; 1 by default.
        how: the method of summing, see above.
        density: fraction of entries that pruning keeps, in (0, 1].
        majority_sign_method: "total" (of values) or "frequency" (of signs), for "ties".
        r: rank for "svd" and "..._svd"; by default the largest rank among the adapters.
        generator: random generator for "dare"; None for PyTorch's default.

    Returns:
        The model.

    Raises:
        PeftcoreError: an adapter cannot be combined in this way. The model is left unchanged.

    Examples:
        >>> peftcore.combine(model, ["style", "domain"], weights=[0.7, 0.3], adapter="both")
        >>> peftcore.activate(model, "both")            # the exact sum as one adapter
    """
    state = engine.require_state(model)
    engine.refuse_merged(state, "combine adapters")
    engine.refuse_changed(model)
    sharded.refuse_sharded(model, "combine adapters")
    names, source_weights = _sources(model, adapters, weights)
    pruning = _pruning(how, density, majority_sign_method, generator)
    if r is not None:
        positive_whole(r=r)
        if not how.endswith("svd"):
            raise PeftcoreError(
                f"r={r} has no effect with how='{how}', where the ranks of the adapters determine the rank. Leave r out"
            )
    # A method without `low_rank` cannot make an adapter from products, but the sum of its tensors may be one.
    methods = [registry.method(engine.applied(model, name).method) for name in names]
    made_of_products = any(method.low_rank is not None for method in methods)
    if any(low_rank.has_factors(model, name) for name in names) and (
        made_of_products or how not in ("cat", "linear") or not all(_is_linear(model, name) for name in names)
    ):
        _combine_products(model, names, source_weights, adapter, how, pruning, r)
    elif how in ("cat", "linear"):
        _combine_tensors(model, names, source_weights, adapter)
    else:
        for name in names:  # raises with the reason
            low_rank.factors_of(model, name, f"be combined by '{how}'")
    return model


def _combine_products(
    model: nn.Module,
    names: list[str],
    weights: list[float],
    adapter: str,
    how: str,
    pruning: Pruning | None,
    r: int | None,
) -> None:
    sources = [low_rank.factors_of(model, name, "be combined") for name in names]
    method, template = _method_of_products(model, names)
    if r is None:
        r = max(factors.a.shape[0] for source in sources for pairs in source.values() for factors in pairs)
    products: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path in dict.fromkeys(path for source in sources for path in source):
        with_factors = [i for i, source in enumerate(sources) if path in source]
        factors = [sources[i][path] for i in with_factors]
        if len(set(map(_shapes_of_factors, factors))) > 1:
            raise PeftcoreError(
                f"cannot combine {names}: their factors for '{path}' have different shapes. Combine adapters that "
                "were trained on the same base"
            )
        source_weights = [weights[i] for i in with_factors]
        products[path] = []
        for product_factors in zip(*factors, strict=True):
            products[path].append(_product(path, product_factors, source_weights, how, pruning, r))
    dtype = next(iter(sources[0].values()))[0].a.dtype
    low_rank.add(model, adapter, method, template, products, dtype)


def _method_of_products(model: nn.Module, names: Sequence[str]) -> tuple[Method, Any]:
    """Return (method, config) of the first adapter whose method makes low-rank adapters."""
    entries = [engine.applied(model, name) for name in names]
    for entry in entries:
        method = registry.method(entry.method)
        if method.low_rank is not None:
            return method, entry.config
    first_method = entries[0].method
    raise PeftcoreError(
        f"cannot combine these adapters: the sum of {first_method} adapters is not a {first_method} adapter. "
        + low_rank.conversion_hint(f"peftcore.convert(model, '{names[0]}', method=...)")
    )


def _shapes_of_factors(factors: Sequence[LowRank]) -> tuple[tuple[torch.Size, int, bool], ...]:
    """Return the shapes of low-rank products, without the rank."""
    return tuple((f.a.shape[1:], f.b.shape[0], f.transposed) for f in factors)


@torch.no_grad()
def _product(
    path: str, factors: Sequence[LowRank], weights: Sequence[float], how: str, pruning: Pruning | None, r: int
) -> tuple[Tensor, Tensor]:
    """Return the combined factors (b, a) of one weight in fp32, in the shapes of the given factors."""
    template = factors[0]
    a, b = [f.a.float().flatten(1) for f in factors], [f.b.float().flatten(1) for f in factors]
    coefficients = [weight * f.scale for f, weight in zip(factors, weights, strict=True)]
    scaled_a = [coefficient * factor for coefficient, factor in zip(coefficients, a, strict=True)]
    if how.endswith("svd"):
        if pruning is None:
            product = nearest_to_product(torch.cat(b, 1), torch.cat(scaled_a), r).product
        else:
            product = nearest_to_matrix(pruned_sum([dense(f) for f in factors], weights, pruning), r).product
        b_factor, a_factor = product.b, product.a
    elif how == "cat":
        b_factor, a_factor = torch.cat(b, 1), torch.cat(scaled_a)
    else:
        ranks_found = sorted({t.shape[0] for t in a})
        if len(ranks_found) > 1:
            raise PeftcoreError(
                f"how='{how}' sums the factors A and B separately, which needs equal ranks, but the ranks at "
                f"'{path}' are {ranks_found}. For different ranks use how='cat' (exact; the ranks add up) or "
                "how='svd'"
            )
        with_sign = [math.copysign(math.sqrt(abs(c)), c) for c in coefficients]
        roots = [abs(c) for c in with_sign]
        if pruning is None:
            a_factor, b_factor = weighted_sum(a, with_sign), weighted_sum(b, roots)
        else:
            a_factor, b_factor = pruned_sum(a, with_sign, pruning), pruned_sum(b, roots, pruning)
    rank = a_factor.shape[0]
    return b_factor.reshape(-1, rank, *template.b.shape[2:]), a_factor.reshape(rank, *template.a.shape[1:])


def _combine_tensors(model: nn.Module, names: list[str], weights: list[float], adapter: str) -> None:
    entries = [engine.applied(model, each) for each in names]
    parts = [_linear_parts(model, each) for each in names]
    first_modules = dict(engine.adapter_modules(model, names[0]))
    constants = _constants(model, names[0])
    for other_name, entry, other_parts in zip(names[1:], entries[1:], parts[1:], strict=True):
        reason = "other methods, adapted modules, or shapes of tensors"
        if entry.method == entries[0].method and _shapes(other_parts) == _shapes(parts[0]):
            differences = (
                difference(first_modules[path], each) for path, each in engine.adapter_modules(model, other_name)
            )
            reason = next(filter(None, differences), "") or _different_constant(
                _constants(model, other_name), constants
            )
        if reason:
            raise PeftcoreError(
                f"cannot combine '{names[0]}' ({entries[0].method}) and '{other_name}' ({entry.method}), since they "
                f"differ: {reason}"
            )
    sums: dict[tuple[str, str], Tensor] = {}
    for key, (_, neutral) in parts[0].items():
        changes = [adapter_parts[key][0].float() - neutral.float() for adapter_parts in parts]
        sums[key] = neutral.float() + weighted_sum(changes, weights)
    dtype = next((tensor.dtype for (kind, _), (tensor, _) in parts[0].items() if kind), None)
    with low_rank.inactive(model, adapter, entries[0].config, dtype):
        new_parts = _linear_parts(model, adapter)
        if _shapes(new_parts) != _shapes(parts[0]):
            raise PeftcoreError(
                f"{entries[0].method} placed the new adapter '{adapter}' on other modules than '{names[0]}'"
            )
        with torch.no_grad():
            for place, buffer in _constants(model, adapter).items():
                buffer.copy_(constants[place])
            for key, (tensor, _) in new_parts.items():
                tensor.copy_(sums[key])
                if not bool(tensor.isfinite().all()):
                    raise PeftcoreError(f"'{adapter}' would contain NaN or Inf in '{key[1]}'. Use smaller weights")


def _different_constant(constants: Mapping[tuple[str, str], Tensor], expected: Mapping[tuple[str, str], Tensor]) -> str:
    """Describe how the buffers of two adapters differ; return an empty string if they do not."""
    for (path, name), tensor in constants.items():
        if (path, name) not in expected or not torch.equal(tensor, expected[path, name].to(tensor.device)):
            return f"different values of the buffer '{name}' at '{path}'"
    return ""


def _is_linear(model: nn.Module, adapter: str) -> bool:
    """Return whether the adapter's change is linear in its parameters at every module."""
    for _, module in engine.adapter_modules(model, adapter):
        neutral = neutral_of(module)
        if neutral is None or neutral.keys() != dict(module.named_parameters()).keys():
            return False
    return True


def _constants(model: nn.Module, adapter: str) -> dict[tuple[str, str], Tensor]:
    """Return {(path, name): persistent buffer}, which a sum of adapters cannot change."""
    constants: dict[tuple[str, str], Tensor] = {}
    for path, module in engine.adapter_modules(model, adapter):
        parameters = dict(module.named_parameters())
        for name, tensor in own_tensors(module).items():
            if name not in parameters:
                constants[path, name] = tensor
    return constants


Parts = Mapping[tuple[str, str], tuple[Tensor, Tensor]]


def _linear_parts(model: nn.Module, adapter: str) -> Parts:
    """Return {(adapter type, name): (tensor, neutral value)}; the adapter type of base parameters is ""."""
    entry, action = engine.applied(model, adapter), "be combined"
    low_rank.refuse_saved(model, adapter, action)
    parts: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    module: Any
    for path, module in engine.adapter_modules(model, adapter):
        parameters = dict(module.named_parameters())
        neutral = neutral_of(module)
        if neutral is None or parameters.keys() != neutral.keys():
            raise PeftcoreError(
                f"'{adapter}' ({entry.method}) cannot {action}: its change at '{path}' is not linear in its tensors. "
                + low_rank.conversion_hint(
                    f"peftcore.convert(model, '{adapter}', method=...)",
                    is_mergeable(model.get_submodule(path), adapter),
                )
            )
        for key, tensor in parameters.items():
            parts[type(module).__qualname__, f"{path}.{key}"] = tensor.detach(), neutral[key].to(tensor.device)
    tensors = TrainedParameters.of(model, adapter)
    if tensors is not None:
        if tensors.differs_from_base(model):
            low_rank.refuse_trained(model, adapter, action)
        base = base_tensors(model)
        for key, value in tensors.values(model):
            parts["", key] = value.detach(), base[key].detach()
    return parts


def _shapes(parts: Parts) -> dict[tuple[str, str], torch.Size]:
    return {key: tensor.shape for key, (tensor, _) in parts.items()}


def _sources(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float] | None
) -> tuple[list[str], list[float]]:
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise PeftcoreError(f"combine takes a list of adapter names, found {adapters!r}")
    for name in adapters:
        engine.applied(model, name)
    numbers = [1.0] * len(adapters) if weights is None else list(weights)
    wrong = [w for w in numbers if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w)]
    if wrong or len(numbers) != len(adapters):
        raise PeftcoreError(f"weights must contain {len(adapters)} finite numbers, one per adapter, found {weights!r}")
    return list(adapters), [float(w) for w in numbers]


def _pruning(how: str, density: float | None, majority: Majority, generator: torch.Generator | None) -> Pruning | None:
    """Return the pruning that `how` asks for, or None."""
    if how not in get_args(How):
        raise PeftcoreError(
            f"how={how!r} is not supported{nearest(str(how), get_args(How))}. Choose one of: {', '.join(get_args(How))}"
        )
    if majority not in get_args(Majority):
        raise PeftcoreError(f"majority_sign_method must be one of {list(get_args(Majority))}, found {majority!r}")
    kind = how.removesuffix("_svd")
    if kind in ("cat", "svd", "linear"):
        if density is not None:
            raise PeftcoreError(
                f"density={density} has no effect with how='{how}', which keeps every entry. Leave density out"
            )
        return None
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise PeftcoreError(
            f"how='{how}' needs density, the fraction of entries to keep, as a number in (0, 1], found {density!r}"
        )
    return Pruning(
        random=kind.startswith("dare"),
        elects=kind.endswith("ties"),
        density=float(density),
        majority=majority,
        generator=generator,
    )
