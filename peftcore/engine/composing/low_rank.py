"""Read the factors of adapters that add low-rank products, check them, and make new adapters from factors.

The nearest product B A of rank r to a matrix M is its truncated SVD (Eckart and Young, 1936). It keeps

    kept = |B A| / |M|      (Frobenius), so |M - B A| / |M| = sqrt(1 - kept²)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.adaptation.adapted import changes_at
from peftcore.engine.trained_parameters import TrainedParameters
from peftcore.errors import PeftcoreError
from peftcore.model.weight_formats import weight_format
from peftcore.plugin.adapter import Adapter, LowRank, implements
from peftcore.plugin.layers import shape_of
from peftcore.plugin.method import Method
from peftcore.plugin.registry import registry

ENOUGH = 0.99  # fraction of a change to keep if no rank is given


class Approximation(NamedTuple):
    """Low-rank factors B `[out, r]` and A `[r, in]`, and the fraction of the original matrix that B A keeps."""

    product: LowRank
    kept: float


def dense(product: LowRank) -> Tensor:
    """Return the scaled product, fp32 `[out, in]`."""
    return (product.scale * product.b.detach().flatten(1).float()) @ product.a.detach().flatten(1).float()


def nearest_to_matrix(matrix: Tensor, r: int | None) -> Approximation:
    """Return the product of rank `r` nearest to an fp32 matrix `[out, in]`.

    If `r` is None, the rank is the smallest that keeps `ENOUGH`.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return _truncate(u, s, v, r)


def nearest_to_product(b: Tensor, a: Tensor, r: int | None) -> Approximation:
    """Return the product of rank `r` nearest to b `[out, R]` · a `[R, in]`, fp32, without computing their product."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _truncate(q_b @ u, s, v @ q_a.T, r)


def fraction_kept(approximations: Sequence[Approximation]) -> float:
    """Return the fraction of all original matrices, taken together, that the products keep."""
    pairs = [(approximation.product.a, approximation.product.b) for approximation in approximations]
    norms = [((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item() for a, b in pairs]
    original_norms = [norm / approximation.kept for norm, approximation in zip(norms, approximations, strict=True)]
    norm_of_originals = math.hypot(*original_norms)
    return math.hypot(*norms) / norm_of_originals if norm_of_originals else 1.0


def _truncate(u: Tensor, s: Tensor, v: Tensor, r: int | None) -> Approximation:
    energy = s.double().square().cumsum(0)
    if r is None:
        r = int(torch.searchsorted(energy, ENOUGH**2 * energy[-1]).item()) + 1
    r = min(r, len(s))
    root = s[:r].sqrt()
    kept_fraction = (energy[r - 1] / energy[-1]).sqrt().item() if energy[-1] else 1.0
    return Approximation(LowRank(root[:, None] * v[:r], u[:, :r] * root), kept_fraction)


class Site(NamedTuple):
    """A module with an adapter, and the name of the parameter if the adapter changes only one."""

    module: nn.Module
    name: str | None = None


def has_factors(model: nn.Module, adapter: str) -> bool:
    """Return whether the adapter defines `low_rank()` on all its modules."""
    adapters = [placed_adapter for _, _, placed_adapter in sites(model, adapter)]
    return bool(adapters) and all(implements(placed_adapter, Adapter.low_rank) for placed_adapter in adapters)


def sites(model: nn.Module, adapter: str) -> Iterator[tuple[str, Site, nn.Module]]:
    """Yield (path of the module or of the single changed parameter, site, adapter) for an applied adapter."""
    for path, module_adapter in engine.adapter_modules(model, adapter):
        module = model.get_submodule(path)
        changes = changes_at(module, adapter)
        for name, change in changes.items():
            yield (f"{path}.{name}" if path else name), Site(module, name), change
        if not changes:
            yield path, Site(module), module_adapter


def factors_of(model: nn.Module, adapter: str, action: str) -> dict[str, list[LowRank]]:
    """Return {path: factors} of an applied adapter.

    Args:
        model: the model.
        adapter: name of the adapter.
        action: the operation, for error messages, such as `be combined`.

    Raises:
        PeftcoreError: the adapter of some module does more than add a low-rank product to a weight.
    """
    entry = engine.applied(model, adapter)
    refuse_trained(model, adapter, action)
    factors: dict[str, list[LowRank]] = {}
    checked_kinds: set[Hashable] = set()
    placed_adapter: Any
    for path, site, placed_adapter in sites(model, adapter):
        reason = why_not(site, placed_adapter, checked_kinds, entry.method)
        if reason:
            raise PeftcoreError(
                f"'{adapter}' ({entry.method}) cannot {action}: its change at '{path}' {reason}. "
                + conversion_hint(
                    f"peftcore.convert(model, '{adapter}', method=...)",
                    site.name is None and implements(placed_adapter, Adapter.merged),
                )
            )
        factors[path] = list(placed_adapter.low_rank())
    return factors


def why_not(site: Site, adapter: nn.Module, checked_kinds: set[Hashable], method: str) -> str:
    """Return the reason why an adapter is more than the product of its `low_rank()`; empty if it is not.

    Args:
        site: where the adapter is attached.
        adapter: the adapter.
        checked_kinds: kinds of adapters (class and shapes) whose `merged` has been compared with their factors; updated
            with this adapter's kind.
        method: name of the adapter's method, for error messages.
    """
    if not implements(adapter, Adapter.low_rank):
        return "is not a low-rank product added to a weight"
    with registry.naming(method, "low_rank"):
        factors = list(adapter.low_rank())
    reason = _extra_tensor(adapter, factors)
    kind = type(adapter), type(site.module), site.name, tuple((f.a.shape, f.b.shape, f.transposed) for f in factors)
    if not reason and kind not in checked_kinds:
        reason = _difference_from_products(site, adapter, factors, method)
        # If only some factors are computed, another layer of the same kind may use its tensors in other ways.
        if not _are_mixed(adapter, factors):
            checked_kinds.add(kind)
    return reason


def conversion_hint(call: str, possible: bool = True) -> str:
    """Return a hint that tells how to make a low-rank adapter."""
    able = [f"'{name}'" for name, method in registry.methods().items() if method.low_rank is not None]
    if not possible or not able:
        return "It does not change weights, so it cannot be converted to a low-rank adapter"
    return f"Convert it to a low-rank adapter: {call.replace('method=...', f'method={able[0]}')}"


def refuse_trained(model: nn.Module, adapter: str, action: str) -> None:
    """Raise a PeftcoreError if an adapter trains base parameters or has its own copies of base tensors."""
    entry, tensors = engine.applied(model, adapter), TrainedParameters.of(model, adapter)
    refuse_saved(model, adapter, action)
    if entry.trained:
        raise PeftcoreError(
            f"'{adapter}' ({entry.method}) cannot {action}: it also trains the base parameter '{entry.trained[0]}', "
            "which has no factors. Use an adapter that was trained without it"
        )
    if tensors is not None and tensors.differs_from_base(model):
        raise PeftcoreError(
            f"'{adapter}' ({entry.method}) cannot {action}: it has its own copies of base tensors, such as "
            "statistics of a norm or rows of an embedding, which have no factors. Use an adapter without such copies"
        )


def refuse_saved(model: nn.Module, adapter: str, action: str) -> None:
    """Raise a PeftcoreError if an adapter trains whole modules (`modules_to_save`)."""
    entry = engine.applied(model, adapter)
    module_names = getattr(entry.config, "modules_to_save", None)
    if module_names:
        raise PeftcoreError(
            f"'{adapter}' ({entry.method}) cannot {action}: it fully trains modules "
            f"(modules_to_save={list(module_names)}). Use an adapter that was trained with modules_to_save=[]"
        )


def add(
    model: nn.Module,
    name: str,
    method: Method,
    template: Any,
    products: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    dtype: torch.dtype | None,
    *,
    of_weights: bool = False,
) -> None:
    """Apply a new, inactive adapter made of the products b `[out, r, ...]` · a `[r, ...]`.

    Args:
        model: the model.
        name: name of the new adapter.
        method: its method.
        template: a config of the method to copy fields from, except those that depend on modules and ranks; or None.
        products: (b, a) of each weight, by path.
        dtype: dtype of the new adapter's parameters; None for the method's default.
        of_weights: the products are given in the shape of the weights, `[rows, r]` · `[r, ...]`, rather than in the
            shape of the method's factors.

    Raises:
        PeftcoreError: the method does not place adapters at exactly these paths. The model is left unchanged.
    """
    assert method.low_rank is not None
    ranks = {path: pairs[0][0].shape[1] for path, pairs in products.items()}
    config = method.low_rank(model, template, ranks)
    with inactive(model, name, config, dtype):
        placements = {path: (site, placed_adapter) for path, site, placed_adapter in sites(model, name)}
        if placements.keys() != products.keys() or engine.applied(model, name).trained:
            raise PeftcoreError(
                f"{method.name} was asked to place adapters at {sorted(products)}, but placed them at "
                f"{sorted(placements)}"
            )
        adapter: Any
        checked_kinds: set[Hashable] = set()
        for path, (site, adapter) in placements.items():
            if reason := why_not(site, adapter, checked_kinds, method.name):
                raise PeftcoreError(f"{method.name} placed an adapter at '{path}' that {reason}")
            parameter_ids, given_pairs = set(map(id, adapter.parameters())), products[path]
            factors = list(adapter.low_rank())
            if len(factors) != len(given_pairs) or not _owners(factors) <= parameter_ids:
                raise PeftcoreError(
                    f"{method.name} placed {len(factors)} products at '{path}', but {len(given_pairs)} were given"
                )
            for f, (b, a) in zip(factors, given_pairs, strict=True):
                if of_weights:
                    b, a = (a.T, b.T) if f.transposed else (b, a)
                    b, a = b.reshape(*b.shape, *(1 for _ in f.b.shape[2:])), a.reshape(a.shape[0], *f.a.shape[1:])
                _fill(f, b, a, name, path)


@contextmanager
def inactive(model: nn.Module, name: str, config: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Apply a new adapter and disable all adapters within the block; restore the active adapters afterwards.

    If the block raises, the new adapter is removed.
    """
    state = engine.require_state(model)
    active, samples, names_before = state.active, state.samples, {*state.applied}
    try:
        engine.set_active(model, ())  # two inactive adapters may train the same parameter
        with warnings.catch_warnings():  # the source adapters' configs already warned
            warnings.simplefilter("ignore")
            engine.apply(model, config, adapter=name, dtype=dtype)
        yield
        engine.set_active(model, active, samples)
    except BaseException:
        if name in state.applied.keys() - names_before:
            engine.remove(model, name)
        engine.set_active(model, active, samples)
        raise


@torch.no_grad()
def _fill(factors: LowRank, b: Tensor, a: Tensor, name: str, path: str) -> None:
    if factors.a.shape != a.shape or factors.b.shape != b.shape:
        raise PeftcoreError(
            f"the factors of '{path}' have shapes {list(factors.b.shape)} and {list(factors.a.shape)}, which do not "
            f"fit values of shapes {list(b.shape)} and {list(a.shape)}"
        )
    factors.a.copy_(a)
    factors.b.copy_(b / factors.scale)
    for tensor in (factors.a, factors.b):
        if not bool(tensor.float().isfinite().all()):
            raise PeftcoreError(
                f"'{name}' would contain NaN or Inf in {tensor.dtype} at '{path}'. Check the source adapters for NaN "
                "and Inf, or use smaller weights"
            )


def _extra_tensor(adapter: nn.Module, factors: Sequence[LowRank]) -> str:
    """Return the name of a tensor that is not a factor; empty if there is none, or if factors are computed."""
    tensors = dict(chain(adapter.named_parameters(), adapter.named_buffers()))
    if _are_computed(tensors.values(), factors):
        return ""
    factor_ids = _owners(factors)
    extra_names = [name for name, tensor in tensors.items() if id(tensor) not in factor_ids]
    return (
        (f"is more than a low-rank product, since the adapter also has the tensor '{extra_names[0]}'")
        if extra_names
        else ""
    )


def _are_computed(tensors: Iterable[Tensor], factors: Sequence[LowRank]) -> bool:
    """Return whether a factor is computed, rather than one of the adapter's tensors `own`."""
    return not _owners(factors) <= set(map(id, tensors))


def _are_mixed(adapter: nn.Module, factors: Sequence[LowRank]) -> bool:
    """Return whether some factors are the adapter's own tensors and others are computed."""
    tensors = [*adapter.parameters(), *adapter.buffers()]
    return _are_computed(tensors, factors) and not _owners(factors).isdisjoint(map(id, tensors))


def _owners(factors: Sequence[LowRank]) -> set[int]:
    """Return the ids of the tensors that the factors are, or are views of."""
    owners: set[int] = set()
    for product in factors:
        for tensor in (product.a, product.b):
            owners.add(id(tensor if tensor._base is None else tensor._base))
    return owners


def _difference_from_products(site: Site, adapter: Any, factors: Sequence[LowRank], method: str) -> str:
    """Describe how the adapter's change differs from its products on a random weight; empty if it does not."""
    device = factors[0].a.device
    if site.name is not None:
        shape, bias = torch.Size(shape_of(site.module, site.name)), None
    elif not implements(adapter, Adapter.merged):
        return "is not a change of a weight"
    else:
        form = weight_format(site.module)
        shape, bias = form.read(site.module).shape, form.read_bias(site.module)
    numbers = sum(f.b.shape[0] * f.a[0].numel() for f in factors)
    if numbers != shape.numel() or any(f.b.shape[1] != f.a.shape[0] for f in factors):
        return "does not have the shape of its factors' product"
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    with torch.no_grad():
        zeros = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        with registry.naming(method, "merged" if site.name is None else "forward"):
            new_weight, new_bias = (
                adapter.merged(weight.clone(), zeros) if site.name is None else (adapter(weight.clone()), None)
            )
        change = as_weight(factors, shape)
    relative_error = (new_weight - weight - change).norm() / (change.norm() + weight.norm())
    if new_bias is not None and (bias is None or new_bias.any()):
        return "also changes a bias"
    return "" if relative_error < 1e-5 else "is not just the product of its factors"


def as_weight(factors: Sequence[LowRank], shape: torch.Size) -> Tensor:
    """Return the change that the products make to a weight of this shape, in fp32."""
    changes = [dense(product).T if product.transposed else dense(product) for product in factors]
    return torch.cat(changes).reshape(shape)
