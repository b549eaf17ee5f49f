"""Initialise an adapter from the base's weights or from data: `Method.initialize`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.engine.method_placements import recorded_as, with_memory
from peftcore.engine.model_parallel import undivided
from peftcore.engine.state import adapter_modules, adapter_parameters, applied, require_state
from peftcore.engine.trained_parameters import restored_buffers, updated_buffers
from peftcore.engine.training_hooks import method_modules
from peftcore.errors import PeftcoreError, PluginError
from peftcore.model.base_modules import base_modules
from peftcore.plugin import sharded
from peftcore.plugin.method import AdapterModules, Method
from peftcore.plugin.registry import registry

Initialize = Callable[[nn.Module, AdapterModules, Any, Iterable[Any] | None], Any]  # `Method.initialize`


def initializer(method: Method, config: Any) -> tuple[Initialize | None, Any]:
    """Return (`initialize`, config) of `method`, or of the method that it is recorded as.

    `initialize` is None if it would do nothing with this config.
    """
    if method.initialize is None:
        method, config = recorded_as(method, config)
    is_needed = method.initialize is not None and method.initializes(config)
    return method.initialize if is_needed else None, config


def takes_batches(method: str, fields: dict[str, Any]) -> bool:
    """Return whether `method` with these fields has an `initialize`, which may use data."""
    installed = registry.method(method)
    try:
        return initializer(installed, installed.config_class(**fields))[0] is not None
    except TypeError:  # an unknown field; `apply` reports it
        return False


def initialize_adapter(
    model: nn.Module, adapter: str, initialize: Initialize, method: str, config: Any, batches: Iterable[Any] | None
) -> None:
    """Initialise the inactive `adapter`, and check that nothing else in the model has changed.

    Raises:
        PluginError: `initialize` changed the base.
        PeftcoreError: the values are not finite.
    """
    tensors_before = _base(model)
    try:
        with (
            in_evaluation_mode(model, [adapter, *require_state(model).active]),
            with_memory(model),
            torch.no_grad(),
            sharded.gathered_when_read(model),
            undivided(model),
        ):
            with registry.naming(method, "initialize"):
                new_config = initialize(model, method_modules(model, adapter), config, batches)
            if new_config is not None:
                applied(model, adapter).config = new_config
    finally:
        sharded.reshard(model)
        changed_name = next((name for name, facts in _base(model).items() if tensors_before.get(name) != facts), None)
        if changed_name is not None:
            raise PluginError(
                f"{method} has changed the base tensor '{changed_name}' while initialising its adapter, but it may "
                "only change the adapter. Load the base again, and report this to the plugin's author"
            )
    tensors: dict[str, Tensor] = dict(adapter_parameters(model, adapter))
    for path, module in adapter_modules(model, adapter):
        tensors.update((f"{path}.{name}" if path else name, buffer) for name, buffer in module.named_buffers())
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise PeftcoreError(
                f"{method} initialised '{name}' with NaN or Inf. Check the base and the batches for NaN and Inf, or "
                "pass more batches"
            )


@contextmanager
def in_evaluation_mode(model: nn.Module, adapters: Iterable[str]) -> Iterator[None]:
    """Put the base and `adapters` into evaluation mode inside the block.

    At its end, restore their mode and gradients, the buffers that training updates, the problem type in the model's
    config, and PyTorch's random state.
    """
    modules = [module for _, module in base_modules(model)]
    for name in adapters:
        for _, adapter in adapter_modules(model, name):
            modules += adapter.modules()
    parameters = {p for module in modules for p in module._parameters.values() if p is not None}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        by_type: dict[str, set[torch.device]] = {}
        for parameter in parameters:
            by_type.setdefault(parameter.device.type, set()).add(parameter.device)
        for kind in by_type.keys() - {"cpu", "meta"}:
            indices = [device.index for device in by_type[kind]]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        stack.enter_context(restored_buffers(model))
        stack.enter_context(_evaluating(modules))
        stack.enter_context(_without_gradients(parameters))
        stack.enter_context(_same_problem_types(modules))
        yield


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    modes = {module: module.training for module in modules}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    gradients = {parameter: parameter.grad for parameter in parameters}
    for parameter, gradient in gradients.items():
        if gradient is not None:
            parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            if parameter.grad is not gradient:
                parameter.grad = gradient


@contextmanager
def _same_problem_types(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore `problem_type` in configs, which transformers' classifiers set in the first call with labels."""
    configs: list[Any] = [vars(module).get("config") for module in modules]
    problem_types = [(config, config.problem_type) for config in configs if hasattr(config, "problem_type")]
    try:
        yield
    finally:
        for config, problem_type in problem_types:
            if config.problem_type != problem_type:
                config.problem_type = problem_type


def _base(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return {name: (id, version)} of the base's tensors, except for buffers that training updates."""
    moving = {id(buffer) for _, buffer in updated_buffers(model)}
    versions: dict[str, tuple[int, int]] = {}
    for path, module in base_modules(model):
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        tensors: dict[str, Tensor | None] = {**module._parameters, **buffers}
        for name, tensor in tensors.items():
            if tensor is not None and id(tensor) not in moving and not sharded.is_shard(tensor):
                version = 0 if tensor.is_inference() else tensor._version
                versions[f"{path}.{name}" if path else name] = id(tensor), version
    return versions
