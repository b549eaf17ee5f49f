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

CHANGE = "apply another adapter"  # the name of the module in messages


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
        raise PeftcoreError(
            f"{method.name} does not initialise from data{with_fields}, but batches were passed. Leave batches out"
        )
    refuse_missing_branches(model, adapter, attachments)
    refuse_without_gradient(model, attachments, trains)
    refuse_divided(model, attachments)
    refuse_sharded_parameters(model, attachments.trained)


def check_name(adapter: object) -> None:
    """Raise a PeftcoreError unless `adapter` is a valid adapter name, usable in keys and paths."""
    if not isinstance(adapter, str) or not adapter:
        raise PeftcoreError(f"the name of an adapter must be a non-empty string, found {adapter!r}")
    for character in "./\\\0":
        if character in adapter:
            raise PeftcoreError(
                f"the adapter name {adapter!r} contains {character!r}, which is reserved for paths and keys. Choose "
                "another name"
            )
    try:
        adapter.encode()
    except UnicodeEncodeError:
        raise PeftcoreError(
            f"the adapter name {adapter!a} contains half a surrogate pair, which is not valid text. Choose another name"
        ) from None
    if hasattr(nn.Module, adapter):
        raise PeftcoreError(f"the adapter name '{adapter}' is an attribute of torch.nn.Module. Choose another name")


def refuse_taken_name(state: State, adapter: str) -> None:
    """Raise a PeftcoreError if the model has an adapter of this name."""
    if adapter in state.applied:
        raise PeftcoreError(
            f"the model already has an adapter '{adapter}' ({state.applied[adapter].method}). Choose another name "
            f"(adapter=...), or remove it first: peftcore.remove(model, '{adapter}')"
        )


def check_dtype(dtype: object) -> None:
    """Raise a PeftcoreError unless `dtype` is None or a floating-point dtype of 16 bits or more."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise PeftcoreError(
            f"dtype must be a floating-point torch.dtype with at least 16 bits, such as torch.bfloat16, found {dtype!r}"
        )


def refuse_compiled(model: nn.Module) -> None:
    """Raise a PeftcoreError if `model` is the wrapper of torch.compile."""
    if hasattr(model, "_orig_mod"):
        raise PeftcoreError(
            "cannot apply an adapter to a compiled model. Apply it to the original model, then call torch.compile"
        )


def refuse_scripted(model: nn.Module) -> None:
    """Raise a PeftcoreError if a submodule is compiled by torch.jit, which hides its code and parameters."""
    for path, module in base_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise PeftcoreError(
                f"{path or 'the model'!r} is a torch.jit.ScriptModule, and models with scripted modules cannot be "
                "adapted or quantized. Use the original module, and compile the model afterwards with torch.compile"
            )


def refuse_lazy(model: nn.Module) -> None:
    """Raise a PeftcoreError if a lazy parameter has no shape yet."""
    for name, parameter in base_parameters(model):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise PeftcoreError(
                f"the parameter '{name}' of a lazy module has no shape yet. Run the model once before apply"
            )


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
                f"the model already has adapters of Hugging Face PEFT ({path or 'the model itself'!r} is a "
                f"{type(module).__module__}.{type(module).__name__}). Save them with PEFT's save_pretrained(folder), "
                "and load them on the plain base with peftcore.load(base, folder)"
            )
        lock = module.__dict__.get(LOCK)
        if lock is not None and not lock.retired and (state is None or lock is not state.lock):
            raise PeftcoreError(
                f"{path or 'the model'!r} has adapters that were applied to a submodule or to an enclosing model. "
                "Apply all adapters to the same model"
            )


def refuse_offloaded(model: nn.Module) -> None:
    """Raise a PeftcoreError if accelerate offloads weights between calls: adapters would be on the meta device."""
    for path, module in base_modules(model):
        if "_hf_hook" not in module.__dict__:
            continue
        if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
            raise PeftcoreError(
                f"accelerate offloads the weights of {path or 'the model itself'!r} between calls, so adapters "
                "cannot be attached. Apply or load adapters first, and offload the model afterwards"
            )


def refuse_stage(model: nn.Module) -> None:
    """Raise a PeftcoreError if this rank has only a pipeline stage of the model."""
    if getattr(model, "_pp_stage", None) is not None:  # attribute of transformers for pp_size > 1
        raise PeftcoreError(
            "the model is split into pipeline stages (pp_size), so an adapter would only cover the layers of this "
            "rank and get no gradients from other stages. Load the model without pp_size, apply the adapter, and "
            "call peftcore.shard(model), or load the model with peftcore.load_sharded(folder)"
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
                f"{method} places a {kind.__name__}, which defines `{member}` but does not derive from "
                f"peftcore.plugin.Adapter, so `{member}` would never be called. Write: class {kind.__name__}(Adapter)"
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
    visited_ids: set[int] = set()
    classes: dict[type[nn.Module], bool] = {}
    for placement in placements:
        stack: list[nn.Module | None] = [placement.adapter] if placement.has_adapter else []
        while stack:
            part = stack.pop()
            if part is None or id(part) in visited_ids:
                continue
            visited_ids.add(id(part))
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
        f"the adapter that {method} places{place} registers '{base_name}' of the base{alias}, which would then be "
        "trained and saved as a part of the adapter. Read the layer in forward instead (base.module, "
        "base.weight()), or register a copy"
    )


def refuse_unknown_paths(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if an adapter has no module, or if a module has two adapters."""
    method, modules = attachments.method.name, dict(base_modules(model))
    paths: set[str] = set()
    for path in attachments.paths:
        if path not in modules:
            raise PeftcoreError(
                f"{method} places an adapter on '{path}', which is not a module of the model{nearest(path, modules)}"
            )
        if path in paths:
            raise PeftcoreError(
                f"{method} places two adapters on '{path}', but a module can have only one adapter per name. Combine "
                "them into one adapter"
            )
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
                    f"{attachments.method.name} cannot adapt '{path}', because its weights are complex ('{name}' is "
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
        raise PeftcoreError(
            f"{attachments.method.name} does not adapt any module of {type(model).__name__}. Check the fields of the "
            "config that select modules"
        )


def refuse_untrainable(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if a base parameter to be trained does not exist or cannot have a gradient."""
    method, parameters = attachments.method.name, dict(base_parameters(model))
    for name in attachments.trained:
        if name not in parameters:
            raise PeftcoreError(
                f"{method} trains '{name}', which is not a parameter of the model{nearest(name, parameters)}"
            )
        dtype = parameters[name].dtype
        if not dtype.is_floating_point:
            raise PeftcoreError(
                f"{method} cannot train '{name}', because tensors of dtype {dtype} have no gradient. Exclude the "
                "module, or use a dense base"
            )
        if is_wrapped(parameters[name]):
            raise PeftcoreError(
                f"{method} cannot train '{name}', which another library has quantized "
                f"({type(parameters[name]).__name__}). Adapt its module instead (target_modules), or skip it when "
                "quantizing the model"
            )


def refuse_trained_twice(model: nn.Module, attachments: AdapterAttachments) -> None:
    """Raise a PeftcoreError if an active adapter already trains a parameter of the new adapter."""
    state = state_of(model) or State()
    record = Applied(
        attachments.method.name, None, trained=attachments.trained
    )  # it becomes active together with the others
    refuse_shared(State({**state.applied, "(new)": record}), (*state.active, "(new)"))


def refuse_shared(state: State, active: Sequence[str]) -> None:
    """Raise a PeftcoreError if two of the `active` adapters train the same parameter."""
    owner: dict[str, str] = {}
    for name in active:
        for parameter in state.applied[name].trained:
            other_adapter = owner.setdefault(parameter, name)
            if other_adapter != name:
                raise PeftcoreError(
                    f"the active adapter '{other_adapter}' already trains '{parameter}', and two active adapters "
                    f"cannot train the same parameter. Deactivate '{other_adapter}' first: peftcore.activate(model, "
                    "[...])"
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
                raise PeftcoreError(f"'{adapter}' cannot combine itself. Name other adapters")
            if name not in state.applied:
                hint = f"applied: {', '.join(state.applied)}" if state.applied else "none is applied"
                raise PeftcoreError(
                    f"'{adapter}' combines '{name}', which is not applied ({hint}). Apply or load it first: "
                    f"peftcore.load(model, folder, adapter='{name}')"
                )
            entry, tensors = state.applied[name], TrainedParameters.of(model, name)
            reason = f"is itself a combination of adapters ({', '.join(entry.branches)})" if entry.branches else None
            if entry.trained or (tensors is not None and tensors.differs_from_base(model)):
                reason = "trains base parameters, which cannot run as a branch"
            if reason:
                raise PeftcoreError(f"'{adapter}' cannot combine '{name}' ({entry.method}): it {reason}")
            if name not in (adapters_of(model.get_submodule(attachment.path)) or ()):
                raise PeftcoreError(
                    f"'{adapter}' combines '{name}' on '{attachment.path}', but '{name}' ({entry.method}) is not "
                    f"attached there. It is attached to {', '.join(map(repr, entry.paths[:3]))}"
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
                f"{method} cannot be applied: '{attachment.path}' was quantized before it was sharded, so shards may "
                "split 4-bit blocks. Call peftcore.quantize(model) again, which aligns the blocks with the shards"
            )
        raise PeftcoreError(
            f"{method} cannot be applied: tensor parallelism (tp_plan, tp_size, parallelize_module) shards "
            f"{shared_out}, but the adapter needs the full layer. Load the model without tensor parallelism, apply "
            "the adapter, and call peftcore.shard(model), or load the model with peftcore.load_sharded(folder)"
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
        f"{method} cannot be applied: the experts of '{attachment.path}' are sharded over the ranks (ep_size), which "
        "only low-rank adapters of single experts support. Exclude the module with "
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
