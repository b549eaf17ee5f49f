"""Run a model on data to observe the inputs of its layers and the gradients of its weights.

A batch contains the arguments of a call: a mapping of keyword arguments, a tuple of positional arguments, or a single
tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from peftcore.errors import PeftcoreError
from peftcore.plugin import sharded


def run(model: nn.Module, batch: Any) -> Any:
    """Run `model` on `batch`, after moving its tensors (also nested ones) to the model's device.

    Returns:
        The model's output.

    Raises:
        PeftcoreError: `batch` is not a mapping, tuple, list or tensor.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))

    def to_device(value: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(device), value)

    if isinstance(batch, Mapping):
        return model(**{name: to_device(value) for name, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(*map(to_device, batch))
    if isinstance(batch, Tensor):
        return model(to_device(batch))
    raise PeftcoreError(
        "a batch must be a mapping of keyword arguments, a tuple of positional arguments, or a tensor, found "
        f"{batch!r:.200}"
    )


@torch.no_grad()
def inputs_of(
    model: nn.Module, paths: Iterable[str], batches: Iterable[Any], visit: Callable[[str, Tensor, Any], bool | None]
) -> None:
    """Run `model` on `batches`, and pass the inputs of the modules at `paths` to `visit`.

    Args:
        visit: (path, first tensor argument, batch) -> True if the module needs no more inputs. Once it has returned
            True for all modules, the remaining batches are skipped.

    Raises:
        PeftcoreError: a path is not a module, `batches` is empty, or a module was never called with a tensor.
    """
    current_batch: list[Any] = []
    called_paths: set[str] = set()
    hooks: dict[str, Any] = {}

    def visit_input(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or path not in hooks:
            return
        called_paths.add(path)
        if visit(path, x, current_batch[0]):
            hooks.pop(path).remove()

    try:
        for path in dict.fromkeys(paths):
            hooks[path] = _submodule(model, path).register_forward_pre_hook(
                partial(visit_input, path), with_kwargs=True
            )
        expected_paths = set(hooks)
        for batch in _require_any(batches):
            current_batch[:] = [batch]
            run(model, batch)
            if not hooks:
                break
    finally:
        for hook in hooks.values():
            hook.remove()
    _refuse_missing(
        sorted(expected_paths - called_paths),
        (
            "was not called with a tensor, so its inputs cannot be observed. Leave it out of target_modules, or pass "
            "batches that reach it"
        ),
    )


def gradients_of(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    visit: Callable[[str, Tensor], object],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    at_once: int = 16,
) -> None:
    """Compute the mean gradient of the loss over `batches` for base weights in float32, and pass it to `visit`.

    With one batch, each gradient is passed to `visit` and freed as soon as the backward pass has computed it. With
    several batches, the gradients of `at_once` weights are accumulated, and the batches run again for the next weights.

    Args:
        model: the model.
        names: names of parameters.
        batches: arguments of calls of the model.
        visit: (name, gradient), in any order.
        loss: (output, batch) -> scalar loss; by default the output's `loss`, for batches with labels.
        at_once: number of gradients in memory at a time.

    Raises:
        PeftcoreError: a name is not a parameter that can have a gradient, `batches` is empty, the output has no loss,
            or the loss does not depend on a parameter.
    """
    saved_batches = [dict(batch) if isinstance(batch, Mapping) else batch for batch in _require_any(batches)]
    names_of: dict[nn.Parameter, list[str]] = {}  # a shared parameter has several names
    for name in dict.fromkeys(names):
        names_of.setdefault(_parameter(model, name), []).append(name)
    parameters = list(names_of)
    reached: set[nn.Parameter] = set()  # parameters that the loss depends on

    @torch.no_grad()
    def pass_on(parameter: nn.Parameter, gradient: Tensor) -> None:
        reached.add(parameter)
        for name in names_of[parameter]:
            visit(name, gradient)

    if not parameters:
        return
    if len(saved_batches) == 1:
        _backward(model, parameters, saved_batches, loss, pass_on)
    else:
        group_size = max(1, at_once)
        for start in range(0, len(parameters), group_size):
            sums = _sum_gradients(model, parameters[start : start + group_size], saved_batches, loss)
            for parameter in list(sums):
                pass_on(parameter, sums.pop(parameter) / len(saved_batches))
    missing_names: list[str] = []
    for parameter in parameters:
        if parameter not in reached:
            missing_names += names_of[parameter]
    _refuse_missing(
        missing_names,
        "has no gradient, because the loss does not depend on it. Leave it out, for example with exclude_modules",
    )


def _sum_gradients(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Any],
    loss: Callable[[Any, Any], Tensor] | None,
) -> dict[nn.Parameter, Tensor]:
    """Return the sum over all batches of each parameter's gradient, for parameters that the loss depends on."""
    sums: dict[nn.Parameter, Tensor] = {}

    def add(parameter: nn.Parameter, gradient: Tensor) -> None:
        sums[parameter] = sums[parameter].add_(gradient) if parameter in sums else gradient

    _backward(model, parameters, batches, loss, add)
    return sums


def _backward(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Any],
    loss: Callable[[Any, Any], Tensor] | None,
    visit: Callable[[nn.Parameter, Tensor], None],
) -> None:
    """Run forward and backward on each batch, and pass each gradient to `visit` as soon as it is computed.

    Args:
        visit: (parameter, gradient in float32). The gradient is not kept in `grad`.
    """

    def take_gradient(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.float(), None
        visit(parameter, gradient)

    with _training_only(model, parameters, take_gradient):
        for batch in batches:
            output = run(model, batch)
            value = loss(output, batch) if loss is not None else getattr(output, "loss", None)
            if not isinstance(value, Tensor):
                raise PeftcoreError(
                    "the model did not return a loss. Add labels to the batches, or pass loss=(output, batch) -> ..."
                )
            if value.requires_grad:
                value.backward()


@contextmanager
def _training_only(
    model: nn.Module, parameters: Sequence[nn.Parameter], hook: Callable[[nn.Parameter], None]
) -> Iterator[None]:
    """Require gradients only for `parameters` inside the block, and call `hook` when a parameter's gradient is ready.

    At the end of the block, `requires_grad` and `grad` of all parameters are as before.
    """
    required_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in parameters}
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        try:
            for parameter in required_grad:
                parameter.requires_grad_(False)
            for parameter in parameters:
                parameter.requires_grad_(True).grad = None
                stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
            yield
        finally:
            for parameter, requires_grad in required_grad.items():
                parameter.requires_grad_(requires_grad)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


def _require_any(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches; raise a PeftcoreError if there are none."""
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise PeftcoreError(
            "`batches` is empty. If it is an iterator that was already consumed, pass a list or a DataLoader"
        )


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise PeftcoreError(f"'{path}' is not a module of {type(model).__name__}") from None


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    try:
        parameter = model.get_parameter(name)
    except AttributeError:
        raise PeftcoreError(f"'{name}' is not a parameter of {type(model).__name__}") from None
    if not parameter.is_floating_point():
        raise PeftcoreError(f"'{name}' has no gradient, because it is stored as {parameter.dtype}. Use a dense base")
    if sharded.is_shard(parameter):
        raise PeftcoreError(
            f"cannot compute the gradient of '{name}', because it is sharded. Compute it before sharding the model"
        )
    return parameter


def _refuse_missing(names: Sequence[str], problem: str) -> None:
    if names:
        suffix = f", and {len(names) - 1} more" if len(names) > 1 else ""
        raise PeftcoreError(f"'{names[0]}'{suffix} {problem}")
