"""Merging: one loop for every method and every weight format.

The weight is read through its format in fp32, each active adapter's pure `merged(weight)` is applied,
and the result is rounded once to the stored dtype. The base's parameters are put aside, not
overwritten, so `unmerge` is bit exact. Before anything is written each layer is run both ways (probe.py).

What a format of few bits loses of the adapters is measured per layer, and refused above a limit:

    lost = |stored - wanted| / |wanted - before|     (Frobenius norms)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftcore import engine, ranks
from peftcore.adaptation.adapted import adapters_of, base_parameters, is_adapted
from peftcore.engine.changes import facts
from peftcore.engine.trained import TrainedParameters, tied_to
from peftcore.errors import PeftcoreError
from peftcore.merging.probe import refuse_inexact
from peftcore.method import WeightFormat
from peftcore.observation.heads import mark_as_loaded
from peftcore.quantization.convert import note_in_config
from peftcore.quantization.weight_format import QUANTIZED
from peftcore.registry import registry
from peftcore.targets import is_conv1d

DENSE = WeightFormat(
    name="dense",
    matches=lambda module: (weight := module._parameters.get("weight")) is not None and weight.is_floating_point(),
    read=lambda module: module.weight.detach(),
    write=lambda module, weight: {"weight": weight.to(module.weight.dtype)},
)
TRANSPOSED = WeightFormat(
    name="transposed",
    matches=is_conv1d,
    read=lambda module: module.weight.detach().T,
    write=lambda module, weight: {"weight": weight.T.to(module.weight.dtype).contiguous()},
)
ATTENTION = WeightFormat(
    name="attention",  # the projections of queries, keys, values and of the output, one below the other: [4 E, E]
    matches=lambda module: isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None,
    read=lambda module: torch.cat([module.in_proj_weight.detach(), module.out_proj.weight.detach()]),
    write=lambda module, weight: {
        "in_proj_weight": weight[: 3 * module.embed_dim].to(module.in_proj_weight.dtype).clone(),
        "out_proj.weight": weight[3 * module.embed_dim :].to(module.out_proj.weight.dtype).clone(),
    },
)


@dataclass
class Merged:
    """What `unmerge` needs: the adapters that acted, and the tensors that were put aside, by name."""

    active: tuple[str, ...]
    aside: dict[str, Tensor] = field(default_factory=dict)
    tied: bool | None = None  # the model config's tie_word_embeddings, where merging untied them
    lost: dict[str, float] = field(default_factory=dict)  # by path, where a weight has few bits
    written: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)  # what stands in their place


@dataclass
class _Layer:
    """One adapted weight, merged: what is to be stored, and what of the adapters that loses (None: nothing)."""

    path: str
    tensors: dict[str, Tensor]
    lost: float | None
    plain: Callable[[nn.Module], None] | None = None  # after a merge for good

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for attribute, tensor in self.tensors.items():
            yield f"{self.path}.{attribute}" if self.path else attribute, tensor


@engine.alone("merge", base=True)
def merge(
    model: nn.Module,
    *,
    keep_adapters: bool = True,
    untie: bool = False,
    dtype: torch.dtype | None = None,
    max_loss: float = 0.1,
) -> nn.Module:
    """Work the active adapters into the base's weights.

    Args:
        keep_adapters: keep the base's own weights aside for `unmerge`. With False the adapters are taken
            off for good, and nothing is kept: the model is a plain one with new weights.
        untie: a weight that another module shares (tied embeddings) is refused, since merging would change
            that module too; with True the adapted module gets a weight of its own.
        dtype: quantized weights that adapters change become dense ones of this dtype. For good (`keep_adapters` is
            False) the whole model is cast to it. None: they are quantized again, see `max_loss`.
        max_loss: the share of the adapters' change that quantizing again may lose, in any layer; see `merge_loss`.

    Raises:
        PeftcoreError: an adapter cannot be merged, or would compute something else in the weight than beside it, a
            weight is tied, a result is not finite, or quantizing again would lose more than `max_loss`. The model is
            then as it was.
    """
    state = engine.require_state(model)
    engine.refuse_merged(state, "merge")
    engine.refuse_changed(model)
    ranks.refuse_sharded(model, "merge")
    engine.refuse_per_sample(state, "merge")
    if not state.active:
        raise PeftcoreError("no adapter is active. Choose what to merge: peftcore.activate(model, [...])")
    _check_mergeable(model, state.active)
    tied = _tied(model, state.active)
    if tied and not untie:
        raise PeftcoreError(
            f"the weight of '{tied[0][0]}' is tied to '{tied[0][1]}', which merging would change too. "
            "merge(model, untie=True) gives the adapted module a weight of its own"
        )
    if keep_adapters:
        layers = list(_merged_layers(model, state.active, dtype))
        lost = {layer.path: layer.lost for layer in layers if layer.lost is not None}
    else:  # every result is checked before the first is written, and none is kept meanwhile
        lost = _lost(model, state.active, dtype)
        layers = _merged_layers(model, state.active, dtype, checked=True)
    _check_lost(lost, max_loss)

    merged = Merged(state.active, lost=lost)
    for name in state.active:
        _merge_trained(model, name, merged)
    plain = {}
    for layer in layers:
        for name, tensor in layer.named():
            aside = _exchange(model, name, tensor)
            if keep_adapters:
                merged.aside.setdefault(name, aside)
        if layer.plain is not None:
            plain[layer.path] = layer.plain
    if tied:
        merged.tied = _untie_config(model, tied)
    engine.set_active(model, ())
    if keep_adapters:
        merged.written = {name: (t.shape, t.dtype) for name in merged.aside for t in [_get(model, name)]}
        state.merged = merged
    else:
        for entry in state.applied.values():  # a weight that was packed has another shape now
            entry.facts = {path: facts(model.get_submodule(path)) for path in entry.facts}
        for name in merged.active:
            engine.remove(model, name)
        for path, make_plain in plain.items():
            module = model.get_submodule(path)
            if not is_adapted(module):
                make_plain(module)
        if plain:
            model.to(dtype)
    if plain:
        note_in_config(model)
    return model


@engine.alone("measure")
def merge_loss(model: nn.Module) -> dict[str, float]:
    """What of the active adapters' change `merge` would lose in each quantized layer, by path; the model is left alone.

    0 is nothing, 1 means that the error is as large as the change itself. Dense layers are not listed.
    """
    state = engine.require_state(model)
    engine.refuse_merged(state, "measure")
    engine.refuse_per_sample(state, "measure")
    _check_mergeable(model, state.active)
    return _lost(model, state.active, None)


def changes_nothing(model: nn.Module, adapter: str) -> bool:
    """Is every weight, with `adapter` merged, what it was? False also where that cannot be known from weights."""
    own = TrainedParameters.of(model, adapter)
    if own is not None:
        pairs = zip(own.values(model), own.originals(model), strict=True)
        if own.has_moved(model) or not all(torch.equal(value, original) for (_, value), (_, original) in pairs):
            return False
    for path, module in engine.adapter_modules(model, adapter):
        if not hasattr(module, "merged"):
            return False
        adapted = model.get_submodule(path)
        with torch.no_grad():
            weight = weight_format(adapted).read(adapted).float()
            if not torch.equal(module.merged(weight), weight):
                return False
    return True


@engine.alone("unmerge", base=True)
def unmerge(model: nn.Module) -> nn.Module:
    """Put the base's own weights back, bit for bit, and let the merged adapters act again.

    Where the model was cast meanwhile, they are cast with it.

    Raises:
        PeftcoreError: nothing is merged, or a merged weight has another size now. The model is then as it was.
    """
    state = engine.require_state(model)
    if state.merged is None:
        raise PeftcoreError("nothing is merged into this model")
    for name, (shape, _) in state.merged.written.items():
        found = _get(model, name)
        if found is None or found.shape != shape:
            now = "gone" if found is None else f"of shape {list(found.shape)}"
            raise PeftcoreError(
                f"'{name}' is {now} and was {list(shape)} when it was merged (resized?): what was put aside does not "
                "fit any more. Undo that first, or keep the model merged"
            )
    merged, state.merged = state.merged, None
    for name, tensor in merged.aside.items():
        found = _get(model, name)  # the model may have moved, or been cast, meanwhile
        is_cast = found.dtype is not merged.written[name][1] and tensor.is_floating_point()
        tensor.data = tensor.data.to(found.device, found.dtype if is_cast else tensor.dtype)
        _exchange(model, name, tensor)
    if merged.tied is not None:
        model.config.tie_word_embeddings = merged.tied
    if hasattr(getattr(model, "config", None), "quantization_config"):
        note_in_config(model)
    engine.set_active(model, merged.active)
    return model


def weight_format(module: nn.Module) -> WeightFormat:
    """The format that reads the weight of `module`; those of plugins are asked first."""
    for candidate in (*registry.weight_formats(), QUANTIZED, TRANSPOSED, ATTENTION, DENSE):
        if candidate.matches(module):
            return candidate
    raise PeftcoreError(
        f"no weight format reads {type(module).__name__}: it has no floating parameter 'weight' of its own. "
        "Where a norm computes that (parametrize, weight_norm), take the norm off before apply; else a plugin can "
        "provide a format"
    )


def _check_mergeable(model: nn.Module, names: tuple[str, ...]) -> None:
    cannot = {
        name: path
        for name in names
        for path, adapter in engine.adapter_modules(model, name)
        if not hasattr(adapter, "merged")
    }
    if not cannot:
        return
    method = {name: engine.applied(model, name).method for name in names}
    can = [name for name in names if name not in cannot]
    name, path = next(iter(cannot.items()))
    raise PeftcoreError(
        f"the adapter '{name}' ({method[name]}) cannot be merged: at '{path}' it is no change of a weight. "
        + (
            f"Of the active ones {', '.join(f'{other} ({method[other]})' for other in can)} can: "
            f"peftcore.activate(model, {can}), then merge"
            if can
            else "No active adapter can"
        )
    )


def _merged_layers(
    model: nn.Module, names: tuple[str, ...], dtype: torch.dtype | None, checked: bool = False
) -> Iterator[_Layer]:
    """Every adapted weight, merged, and checked to be finite and to compute what its adapters do."""
    paths = dict.fromkeys(path for name in names for path in engine.applied(model, name).paths)
    for path in paths:
        module = model.get_submodule(path)
        adapters = adapters_of(module)
        chosen = weight_format(module)
        stored = chosen.read(module)
        if stored.is_meta:
            raise PeftcoreError(f"the weight of '{path}' is on the meta device, so it has no values to merge into")
        with torch.no_grad(), torch.autocast(stored.device.type, enabled=False):
            before = stored.float()
            weight = before.clone()  # a plugin's `merged` may change what it is given
            acting = [name for name in names if name in adapters]
            for name in acting:
                weight = adapters[name].merged(weight)
                if not isinstance(weight, Tensor) or weight.shape != before.shape:
                    found = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
                    raise PeftcoreError(
                        f"'merged' of the adapter '{name}' at '{path}' gives {found}, for a weight {list(before.shape)}"
                    )
            if chosen.decode is None:
                layer = _Layer(path, chosen.write(module, weight), None)
            elif dtype is not None:
                layer = _Layer(path, {"weight": weight.to(dtype)}, None, chosen.plain)
            elif torch.equal(weight, before):
                layer = _Layer(path, {}, None)  # quantizing again could only round the base anew
            else:
                tensors = chosen.write(module, weight)
                change = (weight - before).norm()
                layer = _Layer(path, tensors, ((chosen.decode(module, tensors) - weight).norm() / change).item())
            bad = [t.dtype for t in layer.tensors.values() if t.is_floating_point() and not _is_finite(t)]
            if bad or not math.isfinite(layer.lost or 0):
                where = (bad or [chosen.name])[0]
                raise PeftcoreError(
                    f"merging {list(names)} into '{path}' gives values that are not finite in {where}. "
                    "The adapter holds NaN or infinity, or the sum overflows; nothing was changed"
                )
            if not checked:
                refuse_inexact(path, module, acting, chosen, before, weight)
        yield layer


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.numel() or all(bound.isfinite() for bound in torch.aminmax(tensor))  # NaN passes through


def _lost(model: nn.Module, names: tuple[str, ...], dtype: torch.dtype | None) -> dict[str, float]:
    return {layer.path: layer.lost for layer in _merged_layers(model, names, dtype) if layer.lost is not None}


def _check_lost(lost: dict[str, float], max_loss: float) -> None:
    if not lost:
        return
    worst = max(lost, key=lambda path: lost[path])
    mean = sum(lost.values()) / len(lost)
    what = (
        f"quantized again, {len(lost)} merged layers lose {mean:.0%} of what the adapters change on average, "
        f"at worst {lost[worst]:.0%} ('{worst}')"
    )
    if lost[worst] > max_loss:
        raise PeftcoreError(
            f"{what}; max_loss={max_loss:g} allows {max_loss:.0%}. Nothing was changed. Merge into 16 bits: "
            "peftcore.merge(model, dtype=torch.bfloat16). Layer by layer: peftcore.merge_loss(model)"
        )
    warnings.warn(what, stacklevel=4)


def _merge_trained(model: nn.Module, name: str, merged: Merged) -> None:
    """Tensors that an adapter has of its own are merged by value: the base's slots get a copy of them."""
    own = TrainedParameters.of(model, name)
    if own is None:
        return
    values = [(slots, value.detach().clone()) for slots, value, _ in own.standing(model)]
    own.activate(model, False)
    own.hold(model, ())
    for slots, value in values:
        is_parameter = isinstance(_get(model, slots[0]), nn.Parameter)
        tensor = nn.Parameter(value, requires_grad=False) if is_parameter else value
        for slot in slots:
            merged.aside.setdefault(slot, _get(model, slot))
            _exchange(model, slot, tensor)


def _tied(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """(adapted module, another name of its parameter) for every adapted weight that is shared."""
    paths = {path for name in names for path in engine.applied(model, name).paths}
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in base_parameters(model):
        by_parameter.setdefault(id(parameter), []).append(name)
    shared = [slots for slots in by_parameter.values() if len(slots) > 1]
    return [
        *_trained_apart(model, names),
        *(
            (path, other)
            for slots in shared
            for slot in slots
            for path in [slot.rpartition(".")[0]]
            if path in paths
            for other in slots
            if other != slot
        ),
    ]


def _trained_apart(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(module, another name of its parameter) where an adapter trains it apart from what it is tied to."""
    for name in names:
        own = TrainedParameters.of(model, name)
        for slot in own.slots if own is not None else ():
            tied = tied_to(model, own.slots[slot])
            if tied:
                yield slot.rpartition(".")[0], tied[0]


def _untie_config(model: nn.Module, tied: list[tuple[str, str]]) -> bool | None:
    warnings.warn(f"merge untied '{tied[0][0]}' from '{tied[0][1]}': the model has one more weight now", stacklevel=4)
    config = getattr(model, "config", None)
    before = getattr(config, "tie_word_embeddings", None)
    if before:
        config.tie_word_embeddings = False  # else saving drops the new weight
    return before


def _get(model: nn.Module, name: str) -> Tensor | None:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute, None)


def _exchange(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Put `tensor` in place of the parameter or buffer `name`, and return what stood there."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    before = getattr(module, attribute)
    if attribute in module._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        mark_as_loaded(tensor, before)
        module._parameters[attribute] = tensor
    else:
        module._buffers[attribute] = tensor
    return before
