"""Placements of a method on a model, checked, with every choice of the config explicit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adaptation.base_modules import base_modules, base_parameters
from peftcore.adaptation.chain import Link
from peftcore.adaptation.enclosing import LOCK
from peftcore.adapter import unseen_member
from peftcore.architecture import Architecture
from peftcore.engine.configs import config as named_config
from peftcore.engine.odd_linear import fitted
from peftcore.engine.state import Applied, State, check_model, state_of
from peftcore.engine.trained import tied_to
from peftcore.errors import PeftcoreError, PluginError, nearest, warn
from peftcore.files.peft_configs import config_of_peft, is_of_peft
from peftcore.layers import is_wrapped
from peftcore.method import Method
from peftcore.observation import assumed_unchanged, bypassed, detect, observe
from peftcore.placements.attachments import Attached, Attachments
from peftcore.placements.placement import Placement
from peftcore.registry import registry
from peftcore.targets import ALL_LINEAR, expert_weights, refuse_targeted, trained_modules
from peftcore.targets.coverage import LITTLE, Coverage, coverage
from peftcore.targets.selection import refuse_bypassed
from peftcore.validation import check_types


@dataclass(frozen=True)
class Placed:
    """Placements of a method on one model: adapters of modules, and names of trained parameters."""

    method: Method
    config: Any
    architecture: Architecture
    attached: tuple[Attached, ...]
    placements: dict[str, tuple[Placement, ...]]  # what the method placed, by the paths of `attached`
    trained: tuple[str, ...]
    apart: tuple[str, ...] = ()  # trained separately from the parameters they are tied to
    names_modules: bool = True  # rather than select all of a kind


def placements_for(
    model: nn.Module, method: str | Any, fields: dict[str, Any], building: AbstractContextManager[Any] | None = None
) -> Placed:
    """Return the checked placements of a method on `model`, which is not changed.

    Args:
        model: the model.
        method: name of a method, or a config.
        fields: fields of the config, for a name.
        building: context in which the adapters are built, such as `torch.device("meta")`.
    """
    check_model(model)
    if hasattr(model, "_orig_mod"):
        raise PeftcoreError("the model is compiled. Apply to the model itself, then torch.compile it")
    refuse_scripted(model)
    _refuse_lazy(model)
    refuse_adapters_of_others(model)
    _refuse_offloaded(model)
    with assumed_unchanged(model):
        chosen, config = _method_and_config(model, method, fields)
        config = _own_copy(config)
        bypassed(model)  # runs the one forward pass and reads the code that `place` and the checks ask about
        return _placed(model, chosen, config, building or nullcontext())


def _placed(model: nn.Module, chosen: Method, config: Any, building: AbstractContextManager[Any]) -> Placed:
    architecture = detect(model)
    names_modules = getattr(config, "target_modules", None) not in ("all", ALL_LINEAR)
    config, saved, apart = _saved_modules(model, config, architecture)
    if hasattr(config, "resolved"):
        with registry.naming(chosen.name, "resolved"):
            config = config.resolved(model, architecture)
    attachments = Attachments(model, architecture, chosen.name)
    with building:
        placements = _placements_of(chosen, model, config, architecture)
        _check_adapters(model, chosen.name, placements)
        for placement in placements:
            placement.attach(attachments)
        attached = attachments.joined()
    by_path = {each.path: each.placements for each in attached}
    trained = tuple(dict.fromkeys([*attachments.trained, *saved]))
    placed = Placed(chosen, config, architecture, tuple(attached), by_path, trained, apart, names_modules)
    odd = _check_placed(model, placed)
    return dataclasses.replace(placed, attached=fitted(model, chosen.name, placed.attached)) if odd else placed


def _placements_of(method: Method, model: nn.Module, config: Any, architecture: Architecture) -> Sequence[Any]:
    """Call `place`; if a module is missing in a model of experts, say how a method reads the layer of one expert."""
    try:
        with registry.naming(method.name, "place"):
            return list(method.place(model, config, architecture))
    except PluginError as error:
        if not isinstance(error.__cause__, AttributeError) or not expert_weights(model):
            raise
        raise PluginError(
            f"{error}. {type(model).__name__} stacks the layers of its experts in one weight: if the method looked for "
            "one of them, leave experts out of target_modules; its author can read such a layer with "
            "peftcore.plugin.layer_at(model, path)"
        ) from error.__cause__


def reached_by(placements: Mapping[str, Sequence[Placement]]) -> list[str]:
    """Return the paths of modules and full names of parameters whose adapters have parameters."""
    return [
        each.reached(path)
        for path, placed in placements.items()
        for each in placed
        if next(each.adapter.parameters(), None) is not None
    ]


def covered(model: nn.Module, placed: Placed) -> Coverage:
    """Return what share of the weight in layers has an adapter or a trained parameter."""
    reached = reached_by(placed.placements)
    reached += dict.fromkeys(f"{name.rpartition('.')[0]}." for name in placed.trained)
    lacking = "not selected" if placed.attached else "without a trained parameter"
    return coverage(model, placed.architecture, reached, lacking=lacking)


def warn_of_little(model: nn.Module, placed: Placed) -> None:
    """Warn if a selection of everything leaves out most of the weight, or experts that the config does not exclude."""
    if placed.names_modules:
        return
    found, reached = covered(model, placed), set(reached_by(placed.placements))
    trained = {name.rpartition(".")[0] for name in placed.trained}  # a bias counts, as in `covered`
    experts = ((path, f"{path}.{name}") for path, names in expert_weights(model).items() for name in names)
    lacks = any(path not in trained and name not in reached for path, name in experts)
    spoken = any(getattr(placed.config, field, None) for field in ("exclude_modules", "layers_to_transform"))
    if found.share < LITTLE or (lacks and not spoken):
        hint = ". Methods that know linear layers adapt experts one by one where they are named: target_modules=[..., "
        more = f"{hint}'experts']" if lacks else ""
        warn(f"{placed.method.name} on {type(model).__name__} {found}{more}")


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
        raise PeftcoreError(f"give the fields {sorted(fields)} in the config, or the method by its name")
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


def _check_adapters(model: nn.Module, method: str, placements: Sequence[Any]) -> None:
    """Raise a PluginError unless every placement is one, with an adapter of its own modules and tensors."""
    for placement in placements:
        if not isinstance(placement, Placement):
            raise PluginError(
                f"`place` of {method} must return placements of peftcore.plugin, such as Around(path, adapter), found "
                f"{placement!r:.100}"
            )
        if placement.has_adapter and not isinstance(placement.adapter, nn.Module):
            found = type(placement.adapter).__name__
            raise PluginError(
                f"{method}: the adapter of {type(placement).__name__} must be an nn.Module, found {found}"
            )
    for kind, is_placed in _classes_apart(model, method, placements).items():
        unseen = unseen_member(kind, inside=not is_placed)
        if unseen is not None:
            raise PluginError(
                f"{method} places a {kind.__name__} that has `{unseen}` and does not derive from "
                "peftcore.plugin.Adapter, without which it is not called. Write: class "
                f"{kind.__name__}(Adapter)"
            )


def _classes_apart(model: nn.Module, method: str, placements: Sequence[Placement]) -> dict[type[nn.Module], bool]:
    """Return {class of a module of the adapters: whether one with it is placed itself, not only inside another}.

    Raises:
        PluginError: an adapter has registered a module or tensor of the base.
    """
    modules, tensors, addresses = set(), set(), set()  # of the base
    for _, module in base_modules(model):
        modules.add(id(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensors.add(id(tensor))
                addresses.add(tensor.data_ptr() if type(tensor) in _PLAIN else 0)
    addresses.discard(0)  # tensors without memory
    seen: set[int] = set()
    classes: dict[type[nn.Module], bool] = {}
    for placement in placements:
        ahead: list[Any] = [placement.adapter] if placement.has_adapter else []
        while ahead:
            part = ahead.pop()
            if part is None or id(part) in seen:
                continue
            seen.add(id(part))
            classes[type(part)] = classes.get(type(part), False) or part is placement.adapter
            if id(part) in modules:
                _refuse_registered(model, method, placement, part)
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None and (
                    id(tensor) in tensors or (type(tensor) in _PLAIN and tensor.data_ptr() in addresses)
                ):
                    _refuse_registered(model, method, placement, tensor)
            ahead += part._modules.values()
    return classes


_PLAIN = (nn.Parameter, Tensor)


def _address(tensor: Tensor) -> int:
    """Return where a plain tensor's memory begins, the same for a parameter made from another tensor."""
    return tensor.data_ptr() if type(tensor) in _PLAIN else 0


def _refuse_registered(model: nn.Module, method: str, placement: Any, registered: Any) -> None:
    """Raise a PluginError that names the module or tensor of the base that an adapter has registered."""

    def name_in(root: nn.Module) -> str:
        for name, each in (*root.named_modules(), *root.named_parameters(), *root.named_buffers()):
            both_tensors = isinstance(each, Tensor) and isinstance(registered, Tensor)
            if each is registered or (both_tensors and 0 != _address(each) == _address(registered)):
                return name
        return ""

    of = name_in(model) or type(model).__name__
    name = "" if registered is placement.adapter else name_in(placement.adapter)
    at = "" if placement.key is None else f" at '{placement.key}'"
    raise PluginError(
        f"the adapter that {method} places{at} registers '{of}' of the base{f' as {name!r}' if name else ''}, which "
        "would be trained and saved as the adapter's own. An adapter reads the layer in forward (base.module, "
        "base.weight()), or registers a copy"
    )


def _check_placed(model: nn.Module, placed: Placed) -> bool:
    """Raise an error for what cannot be placed; return whether a linear layer has a forward that is not nn.Linear's."""
    method, modules, odd = placed.method.name, dict(base_modules(model)), False
    seen: set[str] = set()
    for path in (each.path for each in placed.attached):
        if path not in modules:
            raise PeftcoreError(
                f"{method} places an adapter at '{path}', which is not a module{nearest(path, modules)}"
            )
        if path in seen:
            raise PeftcoreError(f"{method} places two adapters at '{path}'; a module takes one adapter of each name")
        seen.add(path)
        odd |= isinstance(modules[path], nn.Linear) and type(modules[path]).forward is not nn.Linear.forward
    refuse_bypassed(model, [each.path for each in placed.attached])
    _refuse_complex(modules, placed)
    _refuse_more_arguments(model, modules, placed)
    if not placed.attached and not placed.trained:
        raise PeftcoreError(f"{method} places nothing on {type(model).__name__}")
    parameters = dict(base_parameters(model))
    for name in placed.trained:
        if name not in parameters:
            raise PeftcoreError(f"{method} trains '{name}', which is not a parameter{nearest(name, parameters)}")
        dtype = parameters[name].dtype
        if not dtype.is_floating_point:
            raise PeftcoreError(f"{method} trains '{name}' of dtype {dtype}, which has no gradient")
        if is_wrapped(parameters[name]):
            raise PeftcoreError(
                f"{method} trains '{name}', which another library keeps quantized ({type(parameters[name]).__name__}). "
                "Adapt its module (target_modules), or leave it dense where the model is quantized"
            )
    state = state_of(model) or State()
    entry = Applied(method, None, trained=placed.trained)  # the new one is active with the others
    refuse_shared(State({**state.applied, "(new)": entry}), (*state.active, "(new)"))
    return odd


def refuse_shared(state: State, active: Sequence[str]) -> None:
    """Raise a PeftcoreError if two of the adapters `active` train the same parameter."""
    owner: dict[str, str] = {}
    for name in active:
        for parameter in state.applied[name].trained:
            other = owner.setdefault(parameter, name)
            if other != name:
                raise PeftcoreError(
                    f"'{parameter}' is trained by the active adapter '{other}' already, and two active adapters cannot "
                    f"train the same parameter. Deactivate '{other}' first: peftcore.activate(model, [...])"
                )


def _refuse_complex(modules: Mapping[str, nn.Module], placed: Placed) -> None:
    """Raise a PeftcoreError if an adapter would be at a module with complex parameters, for which no method is made."""
    for path in (each.path for each in placed.attached):
        for name, parameter in modules[path]._parameters.items():
            if parameter is not None and parameter.is_complex():
                raise PeftcoreError(
                    f"{placed.method.name} cannot adapt '{path}', which has complex weights ('{name}' is "
                    f"{parameter.dtype}). Leave it out of target_modules, or exclude it: exclude_modules=['{path}']"
                )


def _refuse_more_arguments(model: nn.Module, modules: Mapping[str, nn.Module], placed: Placed) -> None:
    """Raise a PeftcoreError if the model calls a linear layer with more than x, which adapters cannot pass on.

    Adapters that change the weight can, since the layer's own forward runs.
    """
    odd = set()
    for each in placed.attached:
        module, plain = modules[each.path], nn.Linear.forward
        if isinstance(module, nn.Linear) and type(module).forward is not plain and each.link is Link:
            odd.add(each.path)
    for call in observe(model).calls if odd else ():
        more = list(call.given)[1:]
        if call.path in odd and more:
            raise PeftcoreError(
                f"{placed.method.name} cannot adapt '{call.path}': the model calls it with {', '.join(more)} besides "
                f"its input. Leave it out of target_modules, or exclude it: exclude_modules=['{call.path}']"
            )


def refuse_scripted(model: nn.Module) -> None:
    """Raise a PeftcoreError if a part of the model is compiled by torch.jit, which hides its code and parameters."""
    for path, module in base_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise PeftcoreError(
                f"{path or 'the model'!r} is a torch.jit.ScriptModule, which cannot be adapted or quantized, nor can "
                "the model around it. Build the model with the module that was scripted, and compile it afterwards "
                "with torch.compile"
            )


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in base_parameters(model):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise PeftcoreError(f"'{name}' has no shape yet (a lazy module). Run the model once before apply")


def _refuse_offloaded(model: nn.Module) -> None:
    """Refuse weights that accelerate offloads between calls: adapters would be on the meta device, without values."""
    for path, module in base_modules(model):
        if "_hf_hook" not in module.__dict__:
            continue
        if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
            raise PeftcoreError(
                f"accelerate has offloaded {path or 'the model itself'!r}, whose weights are here only while it is "
                "called. Apply or load adapters first, and offload the model with them afterwards"
            )


@cache
def _is_of_peft(cls: type) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in cls.__mro__)


def refuse_adapters_of_others(model: nn.Module) -> None:
    """Raise a PeftcoreError if the model, a part or an ancestor of it has adapters of another library or model."""
    state = state_of(model)
    modules = base_modules(model)
    is_of_peft: Callable[[Any], bool] = _is_of_peft  # to mypy a class is not hashable
    for path, module in modules:
        if is_of_peft(type(module)):
            raise PeftcoreError(
                f"the model has adapters of Hugging Face PEFT already ({path or 'the model itself'!r} is a "
                f"{type(module).__module__}.{type(module).__name__}). Save them with its save_pretrained(folder), and "
                "load them here on the plain base: peftcore.load(base, folder)"
            )
        lock = module.__dict__.get(LOCK)
        if lock is not None and not lock.retired and (state is None or lock is not state.lock):
            raise PeftcoreError(
                f"{path or 'the model'!r} has adapters that were applied to another model, of which it is a part, or "
                "which is a part of this one. Apply all to one of them"
            )
