"""Placements of a method on a model, checked, with every choice of the config explicit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from peftcore.engine.attachments import AdapterAttachments
from peftcore.engine.configs import config as named_config, config_of_peft, is_of_peft
from peftcore.engine.custom_linear import fitted
from peftcore.engine.preflight import check_base, check_placements
from peftcore.engine.trained_parameters import tied_to
from peftcore.errors import PeftcoreError, PluginError, warn
from peftcore.model import assumed_unchanged, bypassed, detect
from peftcore.model.base_modules import base_parameters
from peftcore.model.targets import ALL_LINEAR, expert_weights, refuse_targeted, trained_modules
from peftcore.model.targets.coverage import LITTLE, Coverage, coverage
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.method import Method
from peftcore.plugin.placements.placement import Placement
from peftcore.plugin.registry import registry
from peftcore.plugin.validation import check_types


def placements_for(
    model: nn.Module, method: str | Any, fields: dict[str, Any], building: AbstractContextManager[Any] | None = None
) -> AdapterAttachments:
    """Return what a method attaches to `model`, checked; the model is not changed.

    Args:
        model: the model.
        method: name of a method, or a config.
        fields: fields of the config, for a name.
        building: context in which the adapters are built, such as `torch.device("meta")`.
    """
    check_base(model)
    with assumed_unchanged(model):
        chosen, config = _method_and_config(model, method, fields)
        config = _own_copy(config)
        bypassed(model)  # runs the one forward pass and reads the code that `place` and the checks ask about
        attachments = _attachments(model, chosen, config, building or nullcontext())
        check_placements(model, attachments)
        attachments.attached = fitted(model, chosen.name, attachments.attached)
        return attachments


def _attachments(
    model: nn.Module, chosen: Method, config: Any, building: AbstractContextManager[Any]
) -> AdapterAttachments:
    architecture = detect(model)
    names_modules = getattr(config, "target_modules", None) not in ("all", ALL_LINEAR)
    config, saved, apart = _saved_modules(model, config, architecture)
    if hasattr(config, "resolved"):
        with registry.naming(chosen.name, "resolved"):
            config = config.resolved(model, architecture)
    attachments = AdapterAttachments(model, architecture, chosen, config, apart=apart, names_modules=names_modules)
    with building:
        for placement in _placements_of(chosen, model, config, architecture):
            placement.attach(attachments)
        attachments.join()
    attachments.train(saved)
    return attachments


def _placements_of(method: Method, model: nn.Module, config: Any, architecture: Architecture) -> Sequence[Placement]:
    """Call `place`; if a module is missing in a model of experts, say how a method reads the layer of one expert."""
    try:
        with registry.naming(method.name, "place"):
            placements = list(method.place(model, config, architecture))
    except PluginError as error:
        if not isinstance(error.__cause__, AttributeError) or not expert_weights(model):
            raise
        raise PluginError(
            f"{error}. {type(model).__name__} stacks the layers of its experts in one weight: if the method looked for "
            "one of them, leave experts out of target_modules; its author can read such a layer with "
            "peftcore.plugin.layer_at(model, path)"
        ) from error.__cause__
    for placement in placements:
        if not isinstance(placement, Placement):
            raise PluginError(
                f"`place` of {method.name} must return placements of peftcore.plugin, such as Around(path, adapter), "
                f"found {placement!r:.100}"
            )
        if placement.has_adapter and not isinstance(placement.adapter, nn.Module):
            found = type(placement.adapter).__name__
            raise PluginError(
                f"{method.name}: the adapter of {type(placement).__name__} must be an nn.Module, found {found}"
            )
    return placements


def reached_by(placements: Mapping[str, Sequence[Placement]]) -> list[str]:
    """Return the paths of modules and full names of parameters whose adapters have parameters."""
    reached: list[str] = []
    for path, placed in placements.items():
        for placement in placed:
            if next(placement.adapter.parameters(), None) is not None:
                reached.append(placement.reached(path))
    return reached


def covered(model: nn.Module, attachments: AdapterAttachments) -> Coverage:
    """Return what share of the weight in layers has an adapter or a trained parameter."""
    reached = reached_by(attachments.placements)
    reached += dict.fromkeys(f"{name.rpartition('.')[0]}." for name in attachments.trained)
    lacking = "not selected" if attachments.attached else "without a trained parameter"
    return coverage(model, attachments.architecture, reached, lacking=lacking)


def warn_of_little(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Warn if a selection of everything leaves out most of the weight, or experts that the config does not exclude."""
    if attachments.names_modules:
        return
    coverage_found, reached = covered(model, attachments), set(reached_by(attachments.placements))
    trained = {name.rpartition(".")[0] for name in attachments.trained}  # a bias counts, as in `covered`
    lacks_experts = False
    for path, names in expert_weights(model).items():
        if path not in trained:
            lacks_experts |= any(f"{path}.{name}" not in reached for name in names)
    excludes = any(getattr(attachments.config, field, None) for field in ("exclude_modules", "layers_to_transform"))
    if coverage_found.share < LITTLE or (lacks_experts and not excludes):
        hint = ". Methods that know linear layers adapt experts one by one where they are named: target_modules=[..., "
        more = f"{hint}'experts']" if lacks_experts else ""
        warn(f"{attachments.method.name} on {type(model).__name__} {coverage_found}{more}")


def with_memory(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which adapters are allocated, even if the caller is under `torch.device("meta")`.

    Adapters of a model that is on the meta device itself are made there, and no random numbers are drawn.
    """
    if next(model.parameters(), torch.empty(0, device="cpu")).is_meta and all(p.is_meta for p in model.parameters()):
        return torch.device("meta")
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _saved_modules(
    model: nn.Module, config: Any, architecture: Architecture
) -> tuple[Any, Sequence[str], tuple[str, ...]]:
    """Return (config with `modules_to_save` made explicit, its parameters, those trained separately).

    A module that is tied to one of them (the head to the embedding) is trained with it, as one parameter, unless the
    config has `ensure_weight_tying=False`.
    """
    saved = getattr(config, "modules_to_save", ())
    if saved is None and architecture.task_heads:
        saved = list(architecture.task_heads)
    names = trained_modules(model, saved or ()).names
    tied = tied_to(model, names)
    together = getattr(config, "ensure_weight_tying", True)
    if tied and together:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in tied)
        saved = [*saved, *(path for path in modules if not model.get_submodule(path)._modules)]
        refuse_targeted(getattr(config, "target_modules", None), modules, f"tied to {names[0]!r}")
        names = trained_modules(model, saved).names
    if saved != getattr(config, "modules_to_save", ()):
        config = dataclasses.replace(config, modules_to_save=saved)
    return config, names, () if together else tuple(names)


def device_and_dtype(module: nn.Module, dtype: torch.dtype | None) -> tuple[torch.device | None, torch.dtype]:
    """Return the device and dtype of an adapter of `module`, by the rule of `apply`."""
    device, own = None, torch.float32
    for _, parameter in base_parameters(module):
        device = device or parameter.device
        if parameter.is_floating_point():
            own = parameter.dtype
            break
    return device, dtype or (own if own.itemsize >= 4 else torch.float32)


def _method_and_config(model: nn.Module, method: str | Any, fields: dict[str, Any]) -> tuple[Method, Any]:
    if isinstance(method, str):
        return registry.method(method), named_config(method, **fields)
    if fields:
        raise PeftcoreError(
            f"apply takes no fields beside a config object, found {', '.join(sorted(fields))}. Pass them to it, "
            "or name the method"
        )
    if is_of_peft(method):
        return config_of_peft(model, method)
    chosen = registry.method_of_config(method)
    check_types(method)
    return chosen, method


def _own_copy(config: Any) -> Any:
    """Return a copy that later changes of the user's config, or of a list in it, do not reach."""
    own = copy.copy(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (list, dict, set)):
            object.__setattr__(own, field.name, copy.deepcopy(value))  # also of a frozen dataclass
    return own


def recorded(method: Method, config: Any) -> tuple[Method, Any]:
    """Return the method that an adapter of `method` with this config is recorded as, and its config."""
    if method.recorded_as is None:
        return method, config
    with registry.naming(method.name, "recorded_as"):
        config = method.recorded_as(config)
    return registry.method_of_config(config), config
