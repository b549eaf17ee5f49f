"""Adapters whose change of a weight is a thin product: read as factors, checked to be that, and made from such."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.adaptation.chain import WeightChanges
from peftcore.composing.products import dense
from peftcore.engine.trained import TrainedParameters
from peftcore.errors import PeftcoreError
from peftcore.layers import shape_of
from peftcore.merging.merged_layers import is_mergeable
from peftcore.method import Factors, Method
from peftcore.registry import registry
from peftcore.weight_formats import weight_format


class Site(NamedTuple):
    """A module at which an adapter stands, and the parameter of it whose change it is, if it is one."""

    module: nn.Module
    name: str | None = None


def has_factors(model: nn.Module, adapter: str) -> bool:
    """Says every adapter of that name what its factors are?"""
    placed = [each for _, _, each in sites(model, adapter)]
    return bool(placed) and all(hasattr(each, "factors") for each in placed)


def sites(model: nn.Module, adapter: str) -> Iterator[tuple[str, Site, Any]]:
    """(path, what it stands at, what it placed); of a change of a parameter, its own path."""
    for path, placed in engine.adapter_modules(model, adapter):
        module = model.get_submodule(path)
        if isinstance(placed, WeightChanges):
            for name, change in placed.changes.items():
                yield (f"{path}.{name}" if path else name), Site(module, name), change
        else:
            yield path, Site(module), placed


def factors_of(model: nn.Module, adapter: str, what: str) -> dict[str, list[Factors]]:
    """The factors of an applied adapter, by path.

    Args:
        what: for messages, such as `be combined`.

    Raises:
        PeftcoreError: at some module it does something else than add a thin product to a weight.
    """
    entry = engine.applied(model, adapter)
    refuse_trained(model, adapter, what)
    found: dict[str, list[Factors]] = {}
    seen: set[Any] = set()
    placed: Any
    for path, site, placed in sites(model, adapter):
        why = why_not(site, placed, seen, entry.method)
        if why:
            raise PeftcoreError(
                f"'{adapter}' ({entry.method}) cannot {what}: what it does at '{path}' {why}. "
                + ways(f"peftcore.convert(model, '{adapter}', to=...)", site.name is None and is_mergeable(placed))
            )
        found[path] = list(placed.factors())
    return found


def why_not(site: Site, adapter: Any, seen: set[Any], method: str) -> str:
    """Why an adapter at `site` is not the thin products that its `factors` tell of, in words; empty: it is.

    Args:
        seen: kinds of adapter, by class and shapes, whose `merged` was compared with their factors; its own is added.
    """
    if not hasattr(adapter, "factors"):
        return "is no thin product that is added to a weight"
    with registry.naming(method, "factors"):
        factors = list(adapter.factors())
    why = _more(adapter, factors)
    kind = type(adapter), type(site.module), site.name, tuple((f.a.shape, f.b.shape, f.transposed) for f in factors)
    if not why and kind not in seen:
        why = _other(site, adapter, factors, method)
        if not _are_mixed(adapter, factors):  # else another layer's further tensors may do more
            seen.add(kind)
    return why


def ways(call: str, possible: bool = True) -> str:
    """What makes an adapter of thin products, in a sentence."""
    able = [f"'{name}'" for name, method in registry.methods().items() if method.low_rank is not None]
    if not possible or not able:
        return "It is no change of a weight, of which such products could be made"
    return f"{call.replace('to=...', f'to={able[0]}')} makes an adapter of such products of it"


def refuse_trained(model: nn.Module, adapter: str, what: str) -> None:
    """Raise a PeftcoreError if an adapter trains or keeps parameters of the base beside what it places."""
    entry, own = engine.applied(model, adapter), TrainedParameters.of(model, adapter)
    refuse_saved(model, adapter, what)
    if entry.trained:
        raise PeftcoreError(
            f"'{adapter}' ({entry.method}) cannot {what}: it trains '{entry.trained[0]}' of the base too, which has no "
            "factors. Possible are adapters that were trained without"
        )
    if own is not None and own.has_moved(model):
        raise PeftcoreError(
            f"'{adapter}' ({entry.method}) cannot {what}: it has tensors of the base's of its own, such as statistics "
            "of a norm or rows of a vocabulary, which are no sum"
        )


def refuse_saved(model: nn.Module, adapter: str, what: str) -> None:
    """Raise a PeftcoreError if an adapter trains modules whole."""
    entry = engine.applied(model, adapter)
    saved = getattr(entry.config, "modules_to_save", None)
    if saved:
        raise PeftcoreError(
            f"'{adapter}' ({entry.method}) cannot {what}: it trains {', '.join(map(repr, saved))} whole "
            "(modules_to_save), a module of its own and no change of the base's. Possible are adapters that were "
            "trained with modules_to_save=[]"
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
    """Apply a resting adapter `name` of these products b `[out, r, ...]` · a `[r, ...]`, by path.

    Args:
        template: a config of the method, of which the new one's has what does not depend on modules and ranks.
        of_weights: they are laid out as the weights are, `[rows, r]` · `[r, ...]`, rather than as the method's factors.

    Raises:
        PeftcoreError: the method does not place them as it is asked to. The model is then as it was.
    """
    assert method.low_rank is not None
    ranks = {path: pairs[0][0].shape[1] for path, pairs in products.items()}
    config = method.low_rank(model, template, ranks)
    with resting(model, name, config, dtype):
        placed = {path: (site, each) for path, site, each in sites(model, name)}
        if placed.keys() != products.keys() or engine.applied(model, name).trained:
            raise PeftcoreError(f"{method.name} places something else than it was asked for: {sorted(placed)}")
        adapter: Any
        seen: set[Any] = set()
        for path, (site, adapter) in placed.items():
            if why := why_not(site, adapter, seen, method.name):
                raise PeftcoreError(f"{method.name} places an adapter at '{path}' that {why}")
            own, given = set(map(id, adapter.parameters())), products[path]
            factors = list(adapter.factors())
            if len(factors) != len(given) or not {_owner(t) for f in factors for t in (f.a, f.b)} <= own:
                raise PeftcoreError(
                    f"at '{path}' {method.name} has {len(factors)} products, not {len(given)} to be filled"
                )
            for f, (b, a) in zip(factors, given, strict=True):
                if of_weights:
                    b, a = (a.T, b.T) if f.transposed else (b, a)
                    b, a = b.reshape(*b.shape, *(1 for _ in f.b.shape[2:])), a.reshape(a.shape[0], *f.a.shape[1:])
                _fill(f, b, a, name, path)


@contextmanager
def resting(model: nn.Module, name: str, config: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block a new adapter stands on the model and nothing acts; behind it, what acted before acts again.

    An error in the block takes the adapter off.
    """
    active = engine.require_state(model).active
    engine.set_active(model, ())  # two that train one parameter may stand side by side
    try:
        with warnings.catch_warnings():  # what there is to say of such a config was said of the first
            warnings.simplefilter("ignore")
            engine.apply(model, config, adapter=name, dtype=dtype)
        try:
            yield
        except BaseException:
            engine.remove(model, name)
            raise
    finally:
        engine.set_active(model, active)


@torch.no_grad()
def _fill(factors: Factors, b: Tensor, a: Tensor, name: str, path: str) -> None:
    if factors.a.shape != a.shape or factors.b.shape != b.shape:
        raise PeftcoreError(
            f"'{path}' has factors {list(factors.b.shape)} and {list(factors.a.shape)}, which cannot be filled with "
            f"{list(b.shape)} and {list(a.shape)}"
        )
    factors.a.copy_(a)
    factors.b.copy_(b / factors.scale)
    for tensor in (factors.a, factors.b):
        if not bool(tensor.float().isfinite().all()):
            raise PeftcoreError(
                f"'{name}' would hold values at '{path}' that are not finite in {tensor.dtype}. What it is made of "
                "holds NaN or infinity, or the weights are too large"
            )


def _more(adapter: nn.Module, factors: Sequence[Factors]) -> str:
    """Describe what an adapter whose own tensors are its factors holds besides them; empty where some are computed."""
    own = dict(chain(adapter.named_parameters(), adapter.named_buffers()))
    if _are_computed(own.values(), factors):
        return ""
    known = {_owner(tensor) for each in factors for tensor in (each.a, each.b)}
    more = [name for name, tensor in own.items() if id(tensor) not in known]
    return f"is more than a thin product: it holds '{more[0]}', too" if more else ""


def _are_computed(own: Iterable[Tensor], factors: Sequence[Factors]) -> bool:
    """Return whether a factor is computed, rather than one of an adapter's `own` tensors."""
    known = set(map(id, own))
    return any(_owner(tensor) not in known for each in factors for tensor in (each.a, each.b))


def _are_mixed(adapter: nn.Module, factors: Sequence[Factors]) -> bool:
    """Return whether some factors are the adapter's own tensors and others are computed."""
    own = [*adapter.parameters(), *adapter.buffers()]
    owners = {_owner(tensor) for each in factors for tensor in (each.a, each.b)}
    return _are_computed(own, factors) and not owners.isdisjoint(map(id, own))


def _owner(tensor: Tensor) -> int:
    """The identity of the parameter that a factor is, or is a part of."""
    return id(tensor if tensor._base is None else tensor._base)


def _other(site: Site, adapter: Any, factors: Sequence[Factors], method: str) -> str:
    """How a weight that the adapter changes differs from one to which the products are added, in words.

    Seen on random values in place of the weight.
    """
    device = factors[0].a.device
    if site.name is not None:
        shape, bias = torch.Size(shape_of(site.module, site.name)), None
    elif not hasattr(adapter, "merged"):
        return "is no change of a weight"
    else:
        form = weight_format(site.module)
        shape, bias = form.read(site.module).shape, form.read_bias(site.module)
    numbers = sum(f.b.shape[0] * f.a[0].numel() for f in factors)
    if numbers != shape.numel() or any(f.b.shape[1] != f.a.shape[0] for f in factors):
        return "is no product of its factors"
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    with torch.no_grad():
        zeros = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        with registry.naming(method, "merged" if site.name is None else "forward"):
            changed, moved = (
                adapter.merged(weight.clone(), zeros) if site.name is None else (adapter(weight.clone()), None)
            )
        change = as_weight(factors, shape)
    off = (changed - weight - change).norm() / (change.norm() + weight.norm())
    if moved is not None and (bias is None or moved.any()):
        return "changes a bias, too"
    return "" if off < 1e-5 else "is not its factors' product alone"


def as_weight(factors: Sequence[Factors], shape: torch.Size) -> Tensor:
    """The change of a weight `shape` that products make, fp32."""
    changes = [dense(each).T if each.transposed else dense(each) for each in factors]
    return torch.cat(changes).reshape(shape)
