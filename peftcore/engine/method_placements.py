"""Place a method on a model: resolve its config, call `place`, and check the result."""

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
from peftcore.engine.custom_linear import adapt_custom_linear
from peftcore.engine.preflight import check_base, check_placements
from peftcore.engine.trained_parameters import tied_to
from peftcore.errors import PeftcoreError, PluginError, warn
from peftcore.model import assuming_unchanged, bypassed_layers, detect
from peftcore.model.base_modules import base_parameters
from peftcore.model.targets import ALL_LINEAR, expert_weights, refuse_targeted, trained_modules
from peftcore.model.targets.coverage import LOW_COVERAGE, Coverage, coverage
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.method import Method
from peftcore.plugin.placements.placement import Placement
from peftcore.plugin.registry import registry
from peftcore.plugin.validation import check_types


def placements_for(
    model: nn.Module, method: str | Any, fields: dict[str, Any], building: AbstractContextManager[Any] | None = None
) -> AdapterAttachments:
    """Return the checked attachments of a method on `model`, without changing the model.

    Args:
        model: the model.
        method: name of a method, or a config.
        fields: fields of the config, if `method` is a name.
        building: context manager in which the adapters are created, such as `torch.device("meta")`.

    Raises:
        PluginError: the method is not installed or broken.
        PeftcoreError: the config is wrong, or the adapters cannot be attached to this model.
    """
    check_base(model)
    with assuming_unchanged(model):
        resolved_method, config = _method_and_config(model, method, fields)
        config = _own_copy(config)
        bypassed_layers(model)  # runs one traced forward pass, whose result `place` and the checks share
        attachments = _attachments(model, resolved_method, config, building or nullcontext())
        check_placements(model, attachments)
        attachments.attached = adapt_custom_linear(model, resolved_method.name, attachments.attached)
        return attachments


def _attachments(
    model: nn.Module, method: Method, config: Any, building: AbstractContextManager[Any]
) -> AdapterAttachments:
    architecture = detect(model)
    names_modules = getattr(config, "target_modules", None) not in ("all", ALL_LINEAR)
    config, saved_names, apart = _saved_modules(model, config, architecture)
    if hasattr(config, "resolved"):
        with registry.naming(method.name, "resolved"):
            config = config.resolved(model, architecture)
    attachments = AdapterAttachments(model, architecture, method, config, apart=apart, names_modules=names_modules)
    with building:
        for placement in _placements_of(method, model, config, architecture):
            placement.attach(attachments)
        attachments.join()
    attachments.train(saved_names)
    return attachments


def _placements_of(method: Method, model: nn.Module, config: Any, architecture: Architecture) -> Sequence[Placement]:
    """Return the placements that the method's `place` returns.

    Raises:
        PluginError: `place` fails, or returns something else. If `place` does not find a module in a model with
            experts, the message tells how to read the layer of one expert.
    """
    try:
        with registry.naming(method.name, "place"):
            placements = list(method.place(model, config, architecture))
    except PluginError as error:
        if not isinstance(error.__cause__, AttributeError) or not expert_weights(model):
            raise
        raise PluginError(
            f"{error}. In {type(model).__name__}, the weights of all experts are stacked in one parameter. If the "
            "method looked for the layer of one expert, leave experts out of target_modules; in a plugin, read such "
            "a layer with peftcore.plugin.layer_at(model, path)"
        ) from error.__cause__
    for placement in placements:
        if not isinstance(placement, Placement):
            raise PluginError(
                f"`place` of {method.name} must return placements of peftcore.plugin, such as Around(path, adapter), "
                f"found {placement!r:.100}"
            )
        if placement.has_adapter and not isinstance(placement.adapter, nn.Module):
            adapter_type = type(placement.adapter).__name__
            raise PluginError(
                f"{method.name}: the adapter of {type(placement).__name__} must be an nn.Module, found {adapter_type}"
            )
    return placements


def adapted_paths(placements: Mapping[str, Sequence[Placement]]) -> list[str]:
    """Return the paths of modules and full names of parameters that have an adapter with parameters."""
    paths: list[str] = []
    for path, placed in placements.items():
        for placement in placed:
            if next(placement.adapter.parameters(), None) is not None:
                paths.append(placement.reached(path))
    return paths


def coverage_of(model: nn.Module, attachments: AdapterAttachments) -> Coverage:
    """Return the fraction of layer weights that have an adapter or are trained."""
    paths = adapted_paths(attachments.placements)
    paths += dict.fromkeys(f"{name.rpartition('.')[0]}." for name in attachments.trained)
    reason = "not selected" if attachments.attached else "without a trained parameter"
    return coverage(model, attachments.architecture, paths, lacking=reason)


def warn_of_little(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Warn if a config without a selection misses most weights, or experts that it does not exclude."""
    if attachments.names_modules:
        return
    share_text, adapted = coverage_of(model, attachments), set(adapted_paths(attachments.placements))
    # A trained bias counts, as in `coverage_of`.
    trained_paths = {name.rpartition(".")[0] for name in attachments.trained}
    lacks_experts = False
    for path, names in expert_weights(model).items():
        if path not in trained_paths:
            lacks_experts |= any(f"{path}.{name}" not in adapted for name in names)
    excludes = any(getattr(attachments.config, field, None) for field in ("exclude_modules", "layers_to_transform"))
    if share_text.share < LOW_COVERAGE or (lacks_experts and not excludes):
        hint = (
            ". Methods for linear layers adapt experts one by one if target_modules names them: target_modules=[..., "
        )
        advice = f"{hint}'experts']" if lacks_experts else ""
        warn(f"{attachments.method.name} on {type(model).__name__} {share_text}{advice}")


def with_memory(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context manager in which adapters get memory, even under the caller's `torch.device("meta")`.

    Adapters of a model on the meta device are also created there, without drawing random numbers.
    """
    if next(model.parameters(), torch.empty(0, device="cpu")).is_meta and all(p.is_meta for p in model.parameters()):
        return torch.device("meta")
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _saved_modules(
    model: nn.Module, config: Any, architecture: Architecture
) -> tuple[Any, Sequence[str], tuple[str, ...]]:
    """Return (config with explicit `modules_to_save`, names of their parameters, names of the untied parameters).

    A module tied to one of `modules_to_save` (the head to the embedding) shares the trained parameter, unless the
    config has `ensure_weight_tying=False`.
    """
    module_names = getattr(config, "modules_to_save", ())
    if module_names is None and architecture.task_heads:
        module_names = list(architecture.task_heads)
    names = trained_modules(model, module_names or ()).names
    tied = tied_to(model, names)
    together = getattr(config, "ensure_weight_tying", True)
    if tied and together:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in tied)
        module_names = [*module_names, *(path for path in modules if not model.get_submodule(path)._modules)]
        refuse_targeted(getattr(config, "target_modules", None), modules, f"tied to {names[0]!r}")
        names = trained_modules(model, module_names).names
    if module_names != getattr(config, "modules_to_save", ()):
        config = dataclasses.replace(config, modules_to_save=module_names)
    return config, names, () if together else tuple(names)


def device_and_dtype(module: nn.Module, dtype: torch.dtype | None) -> tuple[torch.device | None, torch.dtype]:
    """Return the device and dtype of an adapter of `module`; `dtype` is the argument of `apply`."""
    device, parameter_dtype = None, torch.float32
    for _, parameter in base_parameters(module):
        device = device or parameter.device
        if parameter.is_floating_point():
            parameter_dtype = parameter.dtype
            break
    return device, dtype or (parameter_dtype if parameter_dtype.itemsize >= 4 else torch.float32)


def _method_and_config(model: nn.Module, method: str | Any, fields: dict[str, Any]) -> tuple[Method, Any]:
    if isinstance(method, str):
        return registry.method(method), named_config(method, **fields)
    if fields:
        raise PeftcoreError(
            f"apply got a config object and also the fields {', '.join(sorted(fields))}. Set these fields in the "
            "config, or pass the method by name"
        )
    if is_of_peft(method):
        return config_of_peft(model, method)
    resolved_method = registry.method_of_config(method)
    check_types(method)
    return resolved_method, method


def _own_copy(config: Any) -> Any:
    """Copy a config with its lists, so that the user's later changes do not affect the adapter."""
    config_copy = copy.copy(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (list, dict, set)):
            object.__setattr__(config_copy, field.name, copy.deepcopy(value))  # the dataclass may be frozen
    return config_copy


def recorded_as(method: Method, config: Any) -> tuple[Method, Any]:
    """Return (method, config) to record for an adapter of `method` with this config."""
    if method.recorded_as is None:
        return method, config
    with registry.naming(method.name, "recorded_as"):
        config = method.recorded_as(config)
    return registry.method_of_config(config), config
