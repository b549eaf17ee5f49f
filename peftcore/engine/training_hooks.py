"""Hooks of methods into training: loss terms, parameter groups, schedules and `after_step`.

PyTorch can call a hook after each step of any optimizer. This module registers such a hook until an adapter's first
`after_step`, and warns once, at the second optimizer step without it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from peftcore.engine.current_optimizer import stepping, unwrapped
from peftcore.engine.state import Applied, adapter_parameters, applied, placements, require_state, state_of
from peftcore.engine.trained_parameters import TrainedParameters
from peftcore.errors import PeftcoreError, PluginError
from peftcore.plugin import sharded
from peftcore.plugin.events import adapter_applied
from peftcore.plugin.method import AdapterModules, Method
from peftcore.plugin.registry import registry


def method_modules(model: nn.Module, adapter: str) -> AdapterModules:
    """Return the distinct modules of `adapter` that are still attached, and the base parameters that it trains.

    Raises:
        PeftcoreError: no such adapter is applied, or its method placed two at one path.
    """
    modules: dict[str, nn.Module] = {}
    unplaced: list[nn.Module] = []
    for placement in placements(model, adapter):
        key = placement.key
        if key is None:
            unplaced.append(placement.adapter)
            continue
        if key in modules:
            raise PeftcoreError(
                f"{applied(model, adapter).method} has two adapters on '{key}'. Combine them into one module"
            )
        modules[key] = placement.adapter
    free_keys = (key for key in ("", *(f"#{number}" for number in range(1, len(unplaced) + 1))) if key not in modules)
    modules.update(zip(free_keys, unplaced, strict=False))
    trained_parameters = TrainedParameters.of(model, adapter)
    return AdapterModules(modules, {} if trained_parameters is None else dict(trained_parameters.values(model)))


def after_step(model: nn.Module, step: int, total_steps: int, *, optimizer: Any = None) -> None:
    """Run the `after_step` of the active adapters' methods; training loops call it after each optimizer step.

    Call it between `optimizer.step()` and `optimizer.zero_grad()`, while gradients exist.

    Args:
        step: 1-based number of the step.
        total_steps: total number of steps.
        optimizer: the optimizer that has stepped; required by methods that reset its state.

    Raises:
        PeftcoreError: no adapter is applied, `step` or `total_steps` is invalid, or `optimizer` is not an optimizer or
            is missing although a method needs it.
        PluginError: a method has changed the base.

    Examples:
        >>> optimizer.step()
        >>> peftcore.after_step(model, step, total_steps, optimizer=optimizer)
        >>> optimizer.zero_grad()
    """
    require_state(model)
    if not (isinstance(step, int) and isinstance(total_steps, int)) or step < 1:
        raise PeftcoreError(
            f"after_step takes the 1-based number of the step and the total number of steps, found {step!r}"
        )
    optimizer = unwrapped(optimizer)
    for name, entry, method in _training(model):
        entry.missed_steps = None
        if method.after_step is not None:
            modules = method_modules(model, name)
            parameters = [parameter for _, parameter in adapter_parameters(model, name)]
            versions_before = _base_versions(model, entry, parameters)
            with (
                registry.naming(method.name, "after_step"),
                sharded.gathered(parameters, write=True),
                stepping(optimizer),
            ):
                config = method.after_step(modules, entry.config, step, total_steps)
            _refuse_changed_base(method, versions_before, _base_versions(model, entry, parameters))
            if config is not None:
                set_trained_fields(entry, method, config)


def _refuse_changed_base(method: Method, versions_before: Mapping[str, int], versions_after: Mapping[str, int]) -> None:
    """Raise a PluginError if a method's `after_step` has modified base parameters in place."""
    for name, version in versions_after.items():
        if versions_before.get(name, version) != version:
            raise PluginError(
                f"{method.name} has changed the base tensor '{name}' in after_step, but files of the adapter would "
                "not contain this change. Load the base again, and report this to the plugin's author: the method "
                "can change a buffer of the adapter instead"
            )


def set_trained_fields(entry: Applied, method: Method, config: Any) -> None:
    """Copy the values of `Method.trained_fields` after training from `config` to the adapter's config.

    Raises:
        PluginError: `config` is not a config of the method.
    """
    if not isinstance(config, method.config_class):
        raise PluginError(
            f"after_step of {method.name} must return None or a {method.config_class.__name__}, found {config!r:.200}"
        )
    entry.config = dataclasses.replace(entry.config, **{name: getattr(config, name) for name in method.trained_fields})


def scheduled(model: nn.Module, step: int, total_steps: int) -> float:
    """Return the learning rate factor at a 1-based step: the product of the methods' schedules."""
    factor = 1.0
    for _, entry, method in _training(model):
        if method.schedule is not None:
            with registry.naming(method.name, "schedule"):
                factor *= method.schedule(entry.config, step, total_steps)
    return factor


def has_schedule(model: nn.Module) -> bool:
    """Return whether the method of a trainable adapter has a learning rate schedule."""
    return any(method.schedule for _, _, method in _training(model))


def extra_loss(model: nn.Module) -> Tensor:
    """Return the sum of the loss terms of all trainable adapters: a scalar, 0 if there are none.

    In a custom training loop, add it once per optimizer step; with gradient accumulation over n batches, add 1/n of it
    to the loss of each batch:

        (model(**batch).loss + peftcore.extra_loss(model)).backward()

    The loss terms depend on the current values of the adapters, so call this after each forward pass. `Trainer`, its
    subclasses and the command line add the terms automatically. Collective if adapters are sharded.

    Raises:
        PeftcoreError: no adapter is applied, or a method's term is not a scalar or has no gradient.

    Examples:
        >>> loss = model(**batch).loss + peftcore.extra_loss(model)
        >>> loss.backward()
    """
    terms = loss_terms(model)
    if not terms:
        return torch.zeros((), device=next((p.device for p in model.parameters() if p.requires_grad), "cpu"))
    total, *other_terms = terms.values()
    for term in other_terms:
        total = total + term.to(total.device)
    return total


def loss_terms(model: nn.Module) -> dict[str, Tensor]:
    """Return {adapter: loss term} for the adapters with a term; `extra_loss` sums them.

    Examples:
        >>> peftcore.apply(model, "adalora", total_step=1000)
        >>> peftcore.loss_terms(model)    # {"default": tensor(...)}
    """
    terms: dict[str, Tensor] = {}
    for name, entry, method in _training(model):
        if method.loss is None:
            continue
        # A forward may have left full parameters in the modules; their gradients would be lost.
        sharded.reshard(model)
        modules = method_modules(model, name)
        is_sharded = any(sharded.is_shard(parameter) for _, parameter in adapter_parameters(model, name))
        compute = partial(method.loss, modules, entry.config)
        if is_sharded:
            trained_module = nn.Module()
            # The same dictionary, so that the method reads the full tensors from `modules.trained`.
            trained_module._parameters = cast("dict[str, nn.Parameter | None]", modules.trained)
            compute = partial(_term_of_full, [*modules.values(), trained_module], compute, method.name)
        with registry.naming(method.name, "loss"):
            result = compute()
        term = _term(result, method.name)
        if term is not None:
            terms[name] = term
    return terms


def _term(term: Any, method: str) -> Tensor | None:
    """Check the result of a method's loss, and return it in float32 or wider.

    Raises:
        PeftcoreError: the result is not a scalar, or has no gradient.
    """
    if term is None:
        return None
    if not isinstance(term, Tensor) or term.dim() or not term.is_floating_point():
        description = f"a {term.dtype} tensor of shape {list(term.shape)}" if isinstance(term, Tensor) else repr(term)
        raise PeftcoreError(f"the loss of {method} must be a scalar or None, found {description:.200}")
    if torch.is_grad_enabled() and not term.requires_grad:
        raise PeftcoreError(
            f"the loss term of {method} has no gradient, so it would have no effect. Compute it from the adapters' "
            "parameters, without detach() or .data, or return None"
        )
    return term.float() if term.dtype.itemsize < 4 else term


def has_loss(model: nn.Module) -> bool:
    """Return whether the method of any adapter, active or not, has a loss term."""
    methods = [registry.method(entry.method) for entry in require_state(model).applied.values()]
    return any(method.loss for method in methods)


def has_parameter_groups(model: nn.Module) -> bool:
    """Return whether the method of a trainable adapter defines parameter groups."""
    return any(method.parameter_groups for _, _, method in _training(model))


NOTHING_TRAINS = (
    "the model has no trainable parameters: its adapters are frozen, inactive or merged. To train an adapter from "
    "files, load it with peftcore.load(model, folder, trainable=True); otherwise call peftcore.unmerge(model), or "
    "peftcore.activate(model, 'NAME')"
)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return all trainable parameters in groups: `AdamW(peftcore.parameter_groups(model, lr=2e-4, weight_decay=0.01))`.

    The groups of methods come first. All other parameters get the learning rate `lr`. Matrices also get `weight_decay`;
    vectors, such as biases, norms and scales, get none.

    Raises:
        PeftcoreError: the model has no adapter or no trainable parameter; two groups contain the same parameter; or a
            group contains a tensor that is not a parameter of the model.

    Examples:
        >>> groups = peftcore.parameter_groups(model, lr=2e-4, weight_decay=0.01)
        >>> optimizer = torch.optim.AdamW(groups)
    """
    require_state(model)
    groups = method_groups(model, lr, weight_decay)
    ungrouped = not_in(groups, model.named_parameters())
    vectors = [p for p in ungrouped.values() if _dimensions(p) < 2]
    matrices = [p for p in ungrouped.values() if _dimensions(p) >= 2]
    groups += [{"params": matrices, "lr": lr, "weight_decay": weight_decay}] if matrices else []
    groups += [{"params": vectors, "lr": lr, "weight_decay": 0.0}] if vectors else []
    if not groups:
        raise PeftcoreError(NOTHING_TRAINS)
    return groups


def method_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of the trainable adapters' methods, each with `lr` and `weight_decay`."""
    if state_of(model) is None:
        return []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[int, str] = {}  # {id of a parameter: description of its group, for messages}
    groups: list[dict[str, Any]] = []
    for adapter, entry, method in _training(model):
        if method.parameter_groups is None:
            continue
        owner = f"the parameter groups of {method.name} ('{adapter}')"
        modules = method_modules(model, adapter)
        with registry.naming(method.name, "parameter_groups"):
            result = method.parameter_groups(modules, entry.config, lr, weight_decay)
        for group in result if isinstance(result, (list, tuple)) else [result]:
            parameters = _parameters_of_group(group, owner)
            _record_owner(parameters, owner, names, owners)
            trainable = [p for p in parameters if p.requires_grad]
            if trainable:
                groups.append({"lr": lr, "weight_decay": weight_decay, **group, "params": trainable})
    return groups


def _parameters_of_group(group: Any, owner: str) -> list[nn.Parameter]:
    """Return the parameters of a group, given as in torch: one parameter, several, or (name, parameter) pairs."""
    params = group["params"] if isinstance(group, dict) and "params" in group else None
    if isinstance(params, Tensor):
        params = [params]
    if not isinstance(params, Iterable):
        raise PeftcoreError(f"{owner} must be dictionaries with 'params', found {group!r:.200}")
    return [entry[1] if isinstance(entry, tuple) else entry for entry in params]


def _record_owner(
    parameters: Iterable[nn.Parameter], owner: str, names: dict[int, str], owners: dict[int, str]
) -> None:
    """Record `owner` as the group of `parameters` in `owners`.

    Args:
        names: {id of a parameter of the model: its name}.

    Raises:
        PeftcoreError: a tensor is not a parameter of the model, or is already in a group.
    """
    for parameter in parameters:
        name = names.get(id(parameter))
        if name is None:
            raise PeftcoreError(f"{owner} contain a {type(parameter).__name__} that is not a parameter of the model")
        if id(parameter) in owners:
            raise PeftcoreError(f"{owner} contain '{name}', which already belongs to {owners[id(parameter)]}")
        owners[id(parameter)] = owner


def not_in(groups: Iterable[dict[str, Any]], parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of the trainable `parameters` that are in no group."""
    grouped = set(map(id, chain.from_iterable(group["params"] for group in groups)))
    return {name: p for name, p in parameters if p.requires_grad and id(p) not in grouped}


def _training(model: nn.Module) -> Iterator[tuple[str, Applied, Method]]:
    """Yield (name, record, method) of the adapters that train now."""
    state = require_state(model)
    for name in state.active:
        entry = state.applied[name]
        if entry.trainable and state.merged is None:
            yield name, entry, registry.method(entry.method)


def _base_versions(model: nn.Module, entry: Applied, trained: Iterable[nn.Parameter]) -> dict[str, int]:
    """Return {name: version} of the frozen base parameters in the modules that an adapter is attached to.

    Args:
        trained: the adapter's parameters, to exclude: a method may have frozen some of them for the next steps.
    """
    versions: dict[str, int] = {}
    adapter_ids = {id(parameter) for parameter in trained}
    for path in entry.paths:
        try:
            module = model.get_submodule(path)
        except AttributeError:  # the model has been deleted
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in adapter_ids:
                continue
            if parameter.requires_grad or parameter.is_inference() or sharded.is_shard(parameter):
                continue
            versions[f"{path}.{name}" if path else name] = parameter._version
    return versions


def _dimensions(parameter: nn.Parameter) -> int:
    return len(sharded.shape_of(parameter))


_waiting: WeakSet[nn.Module] = WeakSet()  # models with an adapter that waits for its first `after_step`

_handles: list[RemovableHandle] = []  # the hook's handle while it is registered


def watch(model: nn.Module) -> None:
    """Count the optimizer steps of the adapter last applied to `model`, if its method has an `after_step`."""
    state = state_of(model)
    entry = next(reversed(state.applied.values()), None) if state is not None else None
    if entry is None:
        return
    method = registry.method(entry.method)
    if method.after_step is not None and method.needs_after_step(entry.config):
        entry.missed_steps = 0
        _waiting.add(model)
    if _waiting and not _handles:
        _handles.append(register_optimizer_step_post_hook(_after_optimizer_step))


def _after_optimizer_step(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    if is_dynamo_compiling():
        return
    stepped_ids = set(map(id, chain.from_iterable(group["params"] for group in optimizer.param_groups)))
    for model in list(_waiting):
        state = state_of(model)
        if state is None or all(entry.missed_steps is None for entry in state.applied.values()):
            _waiting.discard(model)
            continue
        for name, entry, _ in _training(model):
            if entry.missed_steps is not None and _has_stepped(model, name, stepped_ids):
                _count_missed_step(name, entry)
    if not _waiting:
        while _handles:
            _handles.pop().remove()


def _has_stepped(model: nn.Module, adapter: str, stepped_ids: set[int]) -> bool:
    """Return whether the optimizer has updated a parameter of the adapter, ignoring meta tensors."""
    parameters = (parameter for _, parameter in adapter_parameters(model, adapter))
    return any(id(parameter) in stepped_ids and not parameter.is_meta for parameter in parameters)


def _count_missed_step(name: str, entry: Applied) -> None:
    """Count an optimizer step without `after_step`, and warn at the second."""
    entry.missed_steps = (entry.missed_steps or 0) + 1
    if entry.missed_steps < 2:
        return
    entry.missed_steps = None
    warnings.warn(
        f"the optimizer has taken two steps on the adapter '{name}' ({entry.method}) without peftcore.after_step, "
        "which its method needs after each step (for a projection or a schedule). Call peftcore.after_step(model, "
        "step, total_steps), with a 1-based step, after each optimizer.step() and before optimizer.zero_grad(). "
        "transformers' Trainer calls it automatically",
        stacklevel=4,
    )


adapter_applied.subscribe(watch)


# --- loss terms of sharded parameters, computed on full ones; each shard gets its part of the gradient ----------------


def _term_of_full(modules: Sequence[nn.Module], compute: Callable[[], Tensor | None], method: str) -> Tensor | None:
    """Return `compute()`, run while the sharded parameters of `modules` are gathered. Collective.

    The gradient is equal on all ranks. Each rank's shard of the gradient is added at the end of the backward pass,
    after the hooks of `fully_shard`. Parameters partitioned by ZeRO-3 get the gradient like any other.

    Args:
        method: name of the method, for error messages.

    Raises:
        PeftcoreError: the result depends on tensors with gradients that are not parameters of these modules.
    """
    parameters = _all_parameters(modules)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(sharded.gathered_parameters(module))
        leaves = _all_parameters(modules)  # the full parameters, in the same order
        value = compute()
    if value is None or not value.requires_grad:
        return value
    parameter_of = {id(leaf): parameter for leaf, parameter in zip(leaves, parameters, strict=True)}
    if any(id(leaf) not in parameter_of for leaf in _leaves(value)):
        raise PeftcoreError(
            f"the loss term of {method} depends on a forward pass, which is not supported while its parameters are "
            "sharded. Replicate them: peftcore.shard(model, adapter_placement='replicate')"
        )
    # By id, since a shared parameter is a single leaf.
    trainable_leaves = list({id(leaf): leaf for leaf in leaves if leaf.requires_grad}.values())
    gradients = torch.autograd.grad(value, trainable_leaves, allow_unused=True)
    gradients_by_parameter = [
        (parameter_of[id(leaf)], g) for leaf, g in zip(trainable_leaves, gradients, strict=True) if g is not None
    ]
    return _with_gradients(value.detach(), gradients_by_parameter)


def _all_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of `modules`; a shared parameter occurs several times."""
    parameters: list[nn.Parameter] = []
    for module in modules:
        parameters += [parameter for _, parameter in module.named_parameters(remove_duplicate=False)]
    return parameters


def _with_gradients(value: Tensor, gradients: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
    """Attach these gradients of full parameters to `value`; its backward pass adds them to the shards' gradients."""
    parameters = [parameter for parameter, _ in gradients]
    if any(map(sharded.is_zero3, parameters)):
        with sharded.gathered(parameters):  # autograd records the shapes of inputs
            return cast(Tensor, _KnownGradients.apply(value, [g for _, g in gradients], *parameters))  # type: ignore[no-untyped-call]
    anchor = torch.zeros((), device=value.device, requires_grad=True)
    return cast(Tensor, _ShardGradients.apply(anchor, value, gradients))  # type: ignore[no-untyped-call]


class _ShardGradients(torch.autograd.Function):
    """A value with precomputed gradients, which are added at the very end of the backward pass."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, shares: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
        ctx.shares = shares
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        queue = Variable._execution_engine.queue_callback
        queue(
            lambda: queue(lambda: _ShardGradients.add(ctx.shares, gradients[0]))
        )  # after the callback of `fully_shard`
        return None, None, None

    @staticmethod
    @torch.no_grad()
    def add(shares: list[tuple[nn.Parameter, Tensor]], scale: Tensor) -> None:
        for parameter, gradient in shares:
            share = torch.zeros_like(parameter)
            sharded.fill(share, gradient * scale)
            parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)


class _KnownGradients(torch.autograd.Function):
    """A value with precomputed gradients, for ZeRO-3, which reads a gradient once autograd has summed it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, *(gradient * gradients[0] for gradient in ctx.gradients)


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors with gradients that `value` was computed from."""
    nodes = [value.grad_fn]
    visited_nodes: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited_nodes:
            continue
        visited_nodes.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [next_node for next_node, _ in node.next_functions]
