"""`apply`: attach an adapter to a model, and freeze the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.engine.activating import freeze_branches, set_active, update_call_context
from peftcore.engine.adaptation import adapted, ancestors, fast_path, frozen_linear
from peftcore.engine.adaptation.tensor_parallel_forward import watch_batches
from peftcore.engine.attachments import AdapterAttachments
from peftcore.engine.base_checkpoints import accept_base_checkpoints
from peftcore.engine.changed_modules import Site, parameter_shapes, submodule
from peftcore.engine.initialization import initialize_adapter, initializer
from peftcore.engine.method_placements import device_and_dtype, placements_for, recorded_as, warn_of_little, with_memory
from peftcore.engine.model_parallel import divide_experts, is_divided
from peftcore.engine.preflight import CHANGE, check_new_adapter, check_request
from peftcore.engine.removing import detach_adapter
from peftcore.engine.state import STATE, Applied, State, exclusive, state_of
from peftcore.engine.trained_parameters import TrainedParameters, enclosing_paths
from peftcore.engine.training_hooks import method_modules
from peftcore.model import assuming_unchanged
from peftcore.model.base_modules import base_parameters
from peftcore.plugin import ranks, sharded
from peftcore.plugin.adapter import Adapter
from peftcore.plugin.call import arguments_read
from peftcore.plugin.events import adapter_applied
from peftcore.plugin.method import Method, Model
from peftcore.plugin.modules import parts
from peftcore.plugin.registry import registry


def apply(
    model: Model,
    method: str | Any,
    /,
    *,
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    batches: Iterable[Any] | None = None,
    **fields: Any,
) -> Model:
    """Freeze the parameters of `model` and attach a trainable, active adapter of `method`.

    Args:
        method: name of an installed method, with the fields of its config as keyword arguments; or a config object of
            the method or of Hugging Face PEFT, which is read as if loaded from a file.
        adapter: name of the new adapter. Existing adapters stay active and trainable.
        dtype: dtype of the adapter's parameters; by default float32 on a 16-bit or quantized base, so that small
            updates are not rounded away, and otherwise the dtype of the layer.
        batches: data, for methods that initialise the adapter from data. Each batch is a mapping of keyword arguments
            for the model (with `labels` if the method needs gradients), a tuple of positional arguments, or a tensor.
            The model runs on the batches with the adapters that are already active, without the new one.

    Returns:
        `model`, changed in place.

    Raises:
        PluginError: the method is not installed or broken.
        PeftcoreError: a field, pattern or name is wrong, or the adapter cannot be initialised. The model is then
            unchanged, except for preparation by the method, such as quantizing the base to 4 bits.

    Examples:
        >>> peftcore.apply(model, "lora", r=16, target_modules=["q_proj", "v_proj"])
        >>> optimizer = torch.optim.AdamW(peftcore.parameter_groups(model, lr=1e-4))
    """
    return add_adapter(model, method, fields, adapter=adapter, dtype=dtype, batches=batches)


@exclusive(CHANGE, base=True)
@torch.inference_mode(False)  # parameters created under it could never be trained
def add_adapter(
    model: Model,
    method: str | Any,
    fields: dict[str, Any],
    *,
    adapter: str = "default",
    dtype: torch.dtype | None = None,
    batches: Iterable[Any] | None = None,
    fill: Callable[[], object] | None = None,
    active: bool = True,
    trainable: bool = True,
) -> Model:
    """Attach an adapter like `apply`; its values may come from elsewhere, such as a file.

    Args:
        model: the model.
        method: name of a method, a config, or checked `AdapterAttachments` on the meta device, whose tensors are then
            allocated but not filled.
        fields: fields of the config, if `method` is a name.
        adapter, dtype, batches: as in `apply`.
        fill: sets the values of the new adapter; it replaces the method's `initialize`.
        active: activate the adapter. If False, the active adapters stay active, including per-sample ones.
        trainable: whether the adapter trains, as in `set_trainable`.
    """
    check_request(model, adapter, dtype, activates=active)
    with assuming_unchanged(model), with_memory(model), sharded.gathered_when_read(model):
        attachments = method if isinstance(method, AdapterAttachments) else placements_for(model, method, fields)
        initialize, config_of_initialize = None, None
        if fill is None:
            initialize, config_of_initialize = initializer(attachments.method, attachments.config)
        check_new_adapter(
            model,
            adapter,
            attachments,
            trains=fill is None,
            initializes=initialize is not None,
            has_batches=batches is not None,
        )
        warn_of_little(model, attachments)
    if attachments.method.prepare is not None:
        with registry.naming(attachments.method.name, "prepare"):
            attachments.method.prepare(model, attachments.config)
    recorded_method, config = recorded_as(attachments.method, attachments.config)
    modules = {attachment.path: submodule(model, attachment.path) for attachment in attachments.attached}
    _settle_all(attachments, modules, dtype, training=model.training)

    state = state_of(model) or State()
    is_first = not state.applied
    state.applied[adapter] = _record(attachments, recorded_method, config, trainable=trainable)
    for path, module in modules.items():
        state.sites.setdefault(path, Site(parameter_shapes(module))).adapters += 1
    model.__dict__[STATE] = state
    try:
        _attach(model, state, adapter, attachments, modules, is_first=is_first)
        if initialize is not None:
            initialize_adapter(model, adapter, initialize, attachments.method.name, config_of_initialize, batches)
        if is_first:
            state.loading = accept_base_checkpoints(model)
            state.watching = watch_batches(model) if is_divided(model) else None
        if fill is None and is_divided(model):
            _broadcast_values(model, adapter, attachments, initialized=initialize is not None)
        if ranks.count() > 1:
            divide_experts(model, attachments)
        if active:
            set_active(model, (*state.active, adapter))
        if fill is not None:
            fill()
        adapter_applied.announce(model)
    except BaseException:
        detach_adapter(model, adapter)
        raise
    return model


def _attach(
    model: nn.Module,
    state: State,
    adapter: str,
    attachments: AdapterAttachments,
    modules: Mapping[str, nn.Module],
    *,
    is_first: bool,
) -> None:
    """Attach the recorded `adapter` to `modules` as inactive; the model's first adapter freezes the base."""
    if is_first:  # first, since the folding class must be inside the other swapped classes
        frozen_linear.fold_frozen(model, attachments.architecture.output_head)
    for path in enclosing_paths(model, modules, attachments.trained):
        ancestors.enclose(submodule(model, path), state.lock, root=not path)
    if is_first:
        parameters = base_parameters(model)
        state.requires_grad = {name: parameter.requires_grad for name, parameter in parameters}
        for _, parameter in parameters:
            parameter.requires_grad_(False)
    for attachment in attachments.attached:
        module = modules[attachment.path]
        adapted.attach(
            module, adapter, attachment.adapter, link=attachment.link, branches=attachment.branches, lock=state.lock
        )
    TrainedParameters.attach(model, adapter, attachments.trained, attachments.apart)
    state.applied[adapter].frozen = TrainedParameters.of(model, adapter) is None  # by `_settle`
    fast_path.guard(model)
    freeze_branches(state, adapter)
    update_call_context(state)


def _record(attachments: AdapterAttachments, method: Method, config: Any, *, trainable: bool) -> Applied:
    """Return the record of the new adapter."""
    adapters = [adapter.adapter for adapter in attachments.attached]
    return Applied(
        method=method.name,
        config=config,
        placements=attachments.placements,
        trained=attachments.trained,
        trainable=trainable,
        reads=arguments_read(adapters),
        whole_batch=any(adapter.whole_batch for adapter in adapters if isinstance(adapter, Adapter)),
    )


def _broadcast_values(model: nn.Module, adapter: str, attachments: AdapterAttachments, *, initialized: bool) -> None:
    """Copy rank 0's adapter to all ranks, since their random initial values may differ."""
    tensors: list[Tensor] = []
    for attachment in attachments.attached:
        tensors += [*attachment.adapter.parameters(), *attachment.adapter.buffers()]
    ranks.broadcast(tensors)
    if initialized:
        ranks.broadcast(parameter.detach() for parameter in method_modules(model, adapter).trained.values())


def _settle_all(
    attachments: AdapterAttachments, modules: Mapping[str, nn.Module], dtype: torch.dtype | None, *, training: bool
) -> None:
    """Move each adapter to the device of its module and to its dtype, put it in the model's mode, and freeze it."""
    new_parameters: dict[nn.Parameter, nn.Parameter] = {}
    for attachment in attachments.attached:
        device, adapter_dtype = device_and_dtype(modules[attachment.path], dtype)
        _settle(attachment.adapter, device, adapter_dtype, training, new_parameters)


def _settle(
    adapter: nn.Module,
    device: torch.device | None,
    dtype: torch.dtype,
    training: bool,
    new_parameters: dict[nn.Parameter, nn.Parameter],
) -> None:
    """Do `adapter.to(device, dtype).train(training).requires_grad_(False)`, but skip steps that would change nothing.

    Tensors on the meta device are allocated but not filled. `new_parameters` maps old parameters to new ones, since
    adapters may share tensors.
    """
    fits = has_mode = True
    for module in parts(adapter):
        has_mode &= module.training == training and type(module).train is nn.Module.train
        if device is not None and device.type != "meta":
            _allocate(module, device, dtype, new_parameters)
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
                fits &= _is_on(parameter, device, dtype)
        for buffer in module._buffers.values():
            fits &= buffer is None or _is_on(buffer, device, dtype)
    if not fits:
        adapter.to(dtype=dtype)
        if any(tensor.is_meta for tensor in (*adapter.parameters(), *adapter.buffers())):
            adapter.to_empty(device=device)
        else:
            adapter.to(device=device)
    if not has_mode:
        adapter.train(training)


def _allocate(
    module: nn.Module, device: torch.device, dtype: torch.dtype, new_parameters: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Allocate the module's own parameters that are on the meta device."""
    for name, parameter in module._parameters.items():
        if parameter is None or not parameter.is_meta or type(parameter) is not nn.Parameter:
            continue
        if parameter not in new_parameters:
            own_dtype = dtype if parameter.is_floating_point() else parameter.dtype
            values = torch.empty(parameter.shape, dtype=own_dtype, device=device)
            new_parameters[parameter] = nn.Parameter(values, requires_grad=False)
        module._parameters[name] = new_parameters[parameter]


def _is_on(tensor: Tensor, device: torch.device | None, dtype: torch.dtype) -> bool:
    return tensor.device == device and (tensor.dtype == dtype or not tensor.is_floating_point())
