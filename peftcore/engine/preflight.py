"""All checks that `apply`, `load` and `plan` make before the model changes.

    check_request       the arguments, and the adapters that the model has already
    check_base          the model, before `place` of the method, which reads it
    check_placements    the adapters and trained parameters that the method has placed
    check_new_adapter   the adapter's name and branches, gradients, sharded layers

They run in this order. `plan` changes nothing, so it runs only `check_base` and `check_placements`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from peftcore.engine.adaptation.adapted import adapters_of
from peftcore.engine.adaptation.ancestors import LOCK
from peftcore.engine.adaptation.expert_parallel import followed_plan, follows_experts
from peftcore.engine.adaptation.tensor_parallel import divides_tokens, division_of, has_plan
from peftcore.engine.attachments import AdapterAttachments, Attachment
from peftcore.engine.blocked_gradients import refuse_without_gradient
from peftcore.engine.changed_modules import submodule
from peftcore.engine.state import (
    Applied,
    State,
    check_model,
    refuse_changed,
    refuse_merged,
    refuse_per_sample,
    state_of,
)
from peftcore.engine.trained_parameters import TrainedParameters, refuse_sharded_parameters
from peftcore.errors import PeftcoreError, PluginError, nearest
from peftcore.model import observe
from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.model.targets.selection import refuse_bypassed
from peftcore.plugin import ranks, sharded
from peftcore.plugin.adapter import unseen_member
from peftcore.plugin.layers import is_wrapped
from peftcore.plugin.link import Link
from peftcore.plugin.placements.on_weight import WeightLink
from peftcore.plugin.placements.placement import Placement

CHANGE = "apply another adapter"  # as messages name it


def check_request(model: nn.Module, adapter: str, dtype: torch.dtype | None, *, activates: bool) -> None:
    """Raise a PeftcoreError if no adapter with this name can be applied to `model` now, for any method."""
    state = state_of(model) or State()
    check_name(adapter)
    refuse_taken_name(state, adapter)
    refuse_merged(state, CHANGE)
    if activates:
        refuse_per_sample(state, CHANGE)
    check_dtype(dtype)
    if state.applied:
        refuse_changed(model)


def check_base(model: nn.Module) -> None:
    """Raise a PeftcoreError if no adapter can be placed on `model`."""
    for check in _BASE:
        check(model)


def check_placements(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError or PluginError if `attachments` cannot be attached to `model` or would have no effect."""
    for check in _PLACEMENTS:
        check(model, attachments)


def check_new_adapter(
    model: nn.Module,
    adapter: str,
    attachments: AdapterAttachments,
    *,
    trains: bool,
    initializes: bool,
    has_batches: bool,
) -> None:
    """Raise a PeftcoreError if `attachments` cannot become the adapter named `adapter`.

    Args:
        trains: the adapter will be trained; a loaded adapter may be for inference only.
        initializes: the method has an `initialize`.
        has_batches: data for `initialize` was passed.
    """
    if has_batches and not initializes:
        method = attachments.method
        with_fields = "" if method.initialize is None else " with these fields"
        raise PeftcoreError(f"{method.name} does not initialise from data{with_fields}. Leave batches out")
    refuse_missing_branches(model, adapter, attachments)
    refuse_without_gradient(model, attachments, trains)
    refuse_divided(model, attachments)
    refuse_sharded_parameters(model, attachments.trained)


def check_name(adapter: object) -> None:
    """Raise a PeftcoreError unless `adapter` is a valid adapter name, usable in keys and paths."""
    if not isinstance(adapter, str) or not adapter:
        raise PeftcoreError(f"an adapter's name is a non-empty string, found {adapter!r}")
    for character in "./\\\0":
        if character in adapter:
            raise PeftcoreError(
                f"the adapter name {adapter!r} contains {character!r}, which paths and keys use. Choose another"
            )
    try:
        adapter.encode()
    except UnicodeEncodeError:
        raise PeftcoreError(
            f"the adapter name {adapter!a} contains half a surrogate pair, which is not text. Choose another"
        ) from None
    if hasattr(nn.Module, adapter):
        raise PeftcoreError(f"the adapter name '{adapter}' is an attribute of torch.nn.Module. Choose another")


def refuse_taken_name(state: State, adapter: str) -> None:
    """Raise a PeftcoreError if the model has an adapter of this name."""
    if adapter in state.applied:
        raise PeftcoreError(
            f"an adapter '{adapter}' is applied already ({state.applied[adapter].method}). "
            f"Choose another name (adapter=...), or remove it first: peftcore.remove(model, '{adapter}')"
        )


def check_dtype(dtype: object) -> None:
    """Raise a PeftcoreError unless `dtype` is None or a floating-point dtype of 16 bits or more."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise PeftcoreError(
            f"dtype must be a floating torch.dtype of 16 bits or more, such as torch.bfloat16, found {dtype!r}"
        )


def refuse_compiled(model: nn.Module) -> None:
    """Raise a PeftcoreError if `model` is the wrapper of torch.compile."""
    if hasattr(model, "_orig_mod"):
        raise PeftcoreError("the model is compiled. Apply to the model itself, then torch.compile it")


def refuse_scripted(model: nn.Module) -> None:
    """Raise a PeftcoreError if a submodule is compiled by torch.jit, which hides its code and parameters."""
    for path, module in base_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise PeftcoreError(
                f"{path or 'the model'!r} is a torch.jit.ScriptModule, which cannot be adapted or quantized, nor can "
                "the model around it. Build the model with the module that was scripted, and compile it afterwards "
                "with torch.compile"
            )


def refuse_lazy(model: nn.Module) -> None:
    """Raise a PeftcoreError if a lazy parameter has no shape yet."""
    for name, parameter in base_parameters(model):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise PeftcoreError(f"'{name}' has no shape yet (a lazy module). Run the model once before apply")


@cache
def _is_of_peft(cls: type) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in cls.__mro__)


def refuse_adapters_of_others(model: nn.Module) -> None:
    """Raise a PeftcoreError if the model has another library's adapters, or a submodule or parent has adapters."""
    state = state_of(model)
    modules = base_modules(model)
    is_of_peft: Callable[[type], bool] = _is_of_peft  # to mypy a class is not hashable
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


def refuse_offloaded(model: nn.Module) -> None:
    """Raise a PeftcoreError if accelerate offloads weights between calls: adapters would be on the meta device."""
    for path, module in base_modules(model):
        if "_hf_hook" not in module.__dict__:
            continue
        if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
            raise PeftcoreError(
                f"accelerate has offloaded {path or 'the model itself'!r}, whose weights are in memory only while it "
                "is called. Apply or load adapters first, and offload the model with them afterwards"
            )


def refuse_stage(model: nn.Module) -> None:
    """Raise a PeftcoreError if this rank has only a pipeline stage of the model."""
    if getattr(model, "_pp_stage", None) is not None:  # of transformers, for pp_size > 1
        raise PeftcoreError(
            "the model is divided into stages of a pipeline (pp_size), and this rank has only some of its layers: an "
            "adapter would cover these alone, and no gradient crosses the stages. Load the model without pp_size, "
            "apply, and call peftcore.shard(model), or load it with peftcore.load_sharded(folder)"
        )


_BASE = (
    check_model,
    refuse_compiled,
    refuse_scripted,
    refuse_lazy,
    refuse_adapters_of_others,
    refuse_offloaded,
    refuse_stage,
)


def refuse_unregistered_class(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PluginError if an adapter defines methods of `Adapter` without inheriting from it.

    The same error is raised if an adapter has registered a module or tensor of the base.
    """
    method = attachments.method.name
    placements = list(chain.from_iterable(attachment.placements for attachment in attachments.attached))
    for kind, is_placed in _adapter_classes(model, method, placements).items():
        member = unseen_member(kind, inside=not is_placed)
        if member is not None:
            raise PluginError(
                f"{method} places a {kind.__name__} that has `{member}` and does not derive from "
                "peftcore.plugin.Adapter, without which it is not called. Write: class "
                f"{kind.__name__}(Adapter)"
            )


def _identities(model: nn.Module) -> tuple[set[int], set[int], set[int]]:
    """Return (ids of the base's modules, ids of its tensors, addresses of the plain ones)."""
    modules: set[int] = set()
    tensors: set[int] = set()
    addresses: set[int] = set()
    for _, module in base_modules(model):
        modules.add(id(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensors.add(id(tensor))
                addresses.add(_address(tensor))
    addresses.discard(0)  # tensors without memory
    return modules, tensors, addresses


def _adapter_classes(model: nn.Module, method: str, placements: Sequence[Placement]) -> dict[type[nn.Module], bool]:
    """Return {class of a module in the adapters: whether a module of this class is placed itself}.

    Raises:
        PluginError: an adapter has registered a module or tensor of the base.
    """
    modules, tensors, addresses = _identities(model)
    visited: set[int] = set()
    classes: dict[type[nn.Module], bool] = {}
    for placement in placements:
        stack: list[nn.Module | None] = [placement.adapter] if placement.has_adapter else []
        while stack:
            part = stack.pop()
            if part is None or id(part) in visited:
                continue
            visited.add(id(part))
            classes[type(part)] = classes.get(type(part), False) or part is placement.adapter
            if id(part) in modules:
                _refuse_registered(model, method, placement, part)
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None and (id(tensor) in tensors or _address(tensor) in addresses):
                    _refuse_registered(model, method, placement, tensor)
            stack += part._modules.values()
    return classes


_PLAIN = (nn.Parameter, Tensor)


def _address(tensor: Tensor) -> int:
    """Return the address of a plain tensor's memory, which a parameter made from the tensor shares; else 0."""
    return tensor.data_ptr() if type(tensor) in _PLAIN else 0


def _refuse_registered(model: nn.Module, method: str, placement: Placement, registered: nn.Module | Tensor) -> NoReturn:
    """Raise a PluginError that names the module or tensor of the base that an adapter has registered."""

    def name_in(root: nn.Module) -> str:
        for name, candidate in (*root.named_modules(), *root.named_parameters(), *root.named_buffers()):
            if candidate is registered:
                return name
            both_tensors = isinstance(candidate, Tensor) and isinstance(registered, Tensor)
            if both_tensors and 0 != _address(cast(Tensor, candidate)) == _address(cast(Tensor, registered)):
                return name
        return ""

    base_name = name_in(model) or type(model).__name__
    name = "" if registered is placement.adapter else name_in(placement.adapter)
    alias = f" as {name!r}" if name else ""
    place = "" if placement.key is None else f" at '{placement.key}'"
    raise PluginError(
        f"the adapter that {method} places{place} registers '{base_name}' of the base{alias}, which would be trained "
        "and saved as the adapter's own. An adapter reads the layer in forward (base.module, base.weight()), or "
        "registers a copy"
    )


def refuse_unknown_paths(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if an adapter has no module, or if a module has two adapters."""
    method, modules = attachments.method.name, dict(base_modules(model))
    paths: set[str] = set()
    for path in attachments.paths:
        if path not in modules:
            raise PeftcoreError(
                f"{method} places an adapter at '{path}', which is not a module{nearest(path, modules)}"
            )
        if path in paths:
            raise PeftcoreError(f"{method} places two adapters at '{path}'; a module takes one adapter of each name")
        paths.add(path)


def refuse_uncalled(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if the model reads a module's weight without calling it."""
    refuse_bypassed(model, attachments.paths)


def refuse_complex(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if an adapted module has complex parameters, which no method supports."""
    for path in attachments.paths:
        for name, parameter in submodule(model, path)._parameters.items():
            if parameter is not None and parameter.is_complex():
                raise PeftcoreError(
                    f"{attachments.method.name} cannot adapt '{path}', which has complex weights ('{name}' is "
                    f"{parameter.dtype}). Leave it out of target_modules, or exclude it: exclude_modules=['{path}']"
                )


def refuse_more_arguments(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if the model calls a linear layer with more arguments than x, which adapters would drop.

    Adapters that change the weight are allowed, because the layer's original forward runs.
    """
    custom_paths = set()
    for attachment in attachments.attached:
        module = submodule(model, attachment.path)
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward and attachment.link is Link:
            custom_paths.add(attachment.path)
    for call in observe(model).calls if custom_paths else ():
        arguments = list(call.argument_shapes)[1:]
        if call.path in custom_paths and arguments:
            raise PeftcoreError(
                f"{attachments.method.name} cannot adapt '{call.path}': the model calls it with {', '.join(arguments)} "
                "besides its input. Leave it out of target_modules, or exclude it: "
                f"exclude_modules=['{call.path}']"
            )


def refuse_nothing(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if the method has placed nothing."""
    if not attachments.attached and not attachments.trained:
        raise PeftcoreError(f"{attachments.method.name} places nothing on {type(model).__name__}")


def refuse_untrainable(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if a base parameter to be trained does not exist or cannot have a gradient."""
    method, parameters = attachments.method.name, dict(base_parameters(model))
    for name in attachments.trained:
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


def refuse_trained_twice(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if an active adapter already trains a parameter of the new adapter."""
    state = state_of(model) or State()
    record = Applied(attachments.method.name, None, trained=attachments.trained)  # it is active with the others
    refuse_shared(State({**state.applied, "(new)": record}), (*state.active, "(new)"))


def refuse_shared(state: State, active: Sequence[str]) -> None:
    """Raise a PeftcoreError if two of the `active` adapters train the same parameter."""
    owner: dict[str, str] = {}
    for name in active:
        for parameter in state.applied[name].trained:
            other_adapter = owner.setdefault(parameter, name)
            if other_adapter != name:
                raise PeftcoreError(
                    f"'{parameter}' is trained by the active adapter '{other_adapter}' already, and two active "
                    f"adapters cannot train the same parameter. Deactivate '{other_adapter}' first: "
                    "peftcore.activate(model, [...])"
                )


_PLACEMENTS = (
    refuse_unregistered_class,
    refuse_unknown_paths,
    refuse_uncalled,
    refuse_complex,
    refuse_more_arguments,
    refuse_nothing,
    refuse_untrainable,
    refuse_trained_twice,
)


def refuse_missing_branches(model: nn.Module, adapter: str, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError unless each branch of the new `adapter` is attached where the adapter combines it."""
    state = state_of(model) or State()
    for attachment in attachments.attached:
        for name in attachment.branches:
            if name == adapter:
                raise PeftcoreError(f"'{adapter}' names itself among the adapters that it combines")
            if name not in state.applied:
                hint = f"applied: {', '.join(state.applied)}" if state.applied else "none is applied"
                raise PeftcoreError(
                    f"'{adapter}' combines '{name}', which is not applied ({hint}). Apply or load it first: "
                    f"peftcore.load(model, folder, adapter='{name}')"
                )
            entry, tensors = state.applied[name], TrainedParameters.of(model, name)
            reason = f"combines others itself ({', '.join(entry.branches)})" if entry.branches else None
            if entry.trained or (tensors is not None and tensors.has_moved(model)):
                reason = "trains parameters of the base, which cannot be a branch of a call"
            if reason:
                raise PeftcoreError(f"'{adapter}' cannot combine '{name}' ({entry.method}): it {reason}")
            if name not in (adapters_of(model.get_submodule(attachment.path)) or ()):
                raise PeftcoreError(
                    f"'{adapter}' combines '{name}' at '{attachment.path}', where '{name}' ({entry.method}) is not "
                    f"attached. It is attached to {', '.join(map(repr, entry.paths[:3]))}"
                )


def refuse_divided(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if an adapter cannot follow the tensor parallelism of its layer.

    Adapters around and after linear layers follow a plan of transformers (see `adaptation.tensor_parallel`). Any other
    layer must have full parameters and gradients on every rank.
    """
    if ranks.count() == 1 and not sharded.is_sharded(model):
        return
    divided, shards_tokens = _divided_parameters(model), divides_tokens(model)
    if not divided and not shards_tokens:
        return
    method = attachments.method.name
    for attachment in attachments.attached:
        module = submodule(model, attachment.path)
        if _follows_division(module, attachment, method):
            continue
        shared_out = _shared_out(module, attachment, divided, shards_tokens=shards_tokens)
        if shared_out is None:
            continue
        weight = module._parameters.get("weight")
        if weight is not None and not sharded.original(weight).is_floating_point():
            raise PeftcoreError(
                f"{method} cannot be applied: '{attachment.path}' was divided over the ranks after it was "
                "quantized, and its blocks of 4-bit values with it. Call peftcore.quantize(model) again, which gives "
                "each rank its part of the blocks"
            )
        raise PeftcoreError(
            f"{method} cannot be applied: tensor parallelism (tp_plan, tp_size, parallelize_module) "
            f"divides {shared_out} over the ranks, and the adapter needs all outputs or inputs of the layer. Load the "
            "model without it, apply, and call peftcore.shard(model), or load it by peftcore.load_sharded(folder)"
        )


def _divided_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base's parameters that tensor parallelism has sharded, by name."""
    paths = {id(module): path for path, module in base_modules(model)}
    divided: dict[str, nn.Parameter] = {}
    for fsdp, module in sharded.modules_with_fsdp(model):
        path = paths.get(id(module))
        if path is None:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and sharded.is_tensor_parallel(sharded.original(parameter), fsdp=fsdp):
                divided[f"{path}.{name}".removeprefix(".")] = parameter
    return divided


def _follows_division(module: nn.Module, attachment: Attachment, method: str) -> bool:
    """Return whether an adapter can follow the plan that shards its module.

    Raises:
        PeftcoreError: the module's experts are sharded, and the adapter is not made of single experts' adapters.
    """
    if attachment.link.follows_division and division_of(module) is not None:
        return True
    if attachment.link is not WeightLink or followed_plan(module) is None:
        return False
    if follows_experts(module, WeightLink.changes_of(attachment.adapter)):
        return True
    raise PeftcoreError(
        f"{method} cannot be applied: the ranks share out the experts of '{attachment.path}' (ep_size), "
        "and only low-rank products of single experts can follow them. Exclude the module, "
        f"exclude_modules=['{attachment.path.rpartition('.')[2]}'], or load the model without ep_size"
    )


def _shared_out(
    module: nn.Module, attachment: Attachment, divided: dict[str, nn.Parameter], *, shards_tokens: bool
) -> str | None:
    """Describe, for an error, the sharded part of a module whose adapter needs the full module; None without one."""
    path = attachment.path
    if has_plan(module):
        return f"the work of '{path}'"
    if shards_tokens:
        return f"the tokens of '{path}'"
    names = [
        f"{path}.{name}".removeprefix(".") for name, parameter in module._parameters.items() if parameter is not None
    ]
    for placement in attachment.placements:
        name = placement.divided(path, names, divided)
        if name:
            return f"'{name}'"
    return None
