"""Observation of a model on data: inputs of its layers and gradients of its weights.

A batch is the arguments of a call: a mapping of keyword arguments, a tuple of positional ones, or a single tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ranks
from peftcore.errors import PeftcoreError


def run(model: nn.Module, batch: Any) -> Any:
    """Return the output of `model` for `batch`, whose tensors are moved to the model's device.

    Raises:
        PeftcoreError: `batch` is not a batch.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    moved = partial(_moved, device=device)
    if isinstance(batch, Mapping):
        return model(**{name: moved(value) for name, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(*map(moved, batch))
    if isinstance(batch, Tensor):
        return model(moved(batch))
    raise PeftcoreError(
        f"a batch is a mapping of keyword arguments for the model, a tuple or a tensor, found {batch!r:.200}"
    )


@torch.no_grad()
def inputs_of(
    model: nn.Module, paths: Iterable[str], batches: Iterable[Any], visit: Callable[[str, Tensor, Any], bool | None]
) -> None:
    """Run `model` on `batches`, and pass the inputs of the modules at `paths` to `visit`.

    Args:
        visit: (path, first tensor argument, batch) -> True if the module needs no more inputs. Once all modules are
            done, the remaining batches are skipped.

    Raises:
        PeftcoreError: a path is not a module, there is no batch, or a module was not called with a tensor.
    """
    now: list[Any] = []
    seen: set[str] = set()
    hooks: dict[str, Any] = {}

    def look(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None or path not in hooks:
            return
        seen.add(path)
        if visit(path, x, now[0]):
            hooks.pop(path).remove()

    try:
        for path in paths:
            hooks[path] = _submodule(model, path).register_forward_pre_hook(partial(look, path), with_kwargs=True)
        wanted = set(hooks)
        for batch in _some(batches):
            now[:] = [batch]
            run(model, batch)
            if not hooks:
                break
    finally:
        for hook in hooks.values():
            hook.remove()
    _refuse_unseen(sorted(wanted - seen), "was not called with a tensor, so it has no inputs to see")


def gradients_of(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    visit: Callable[[str, Tensor], object],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    at_once: int = 16,
) -> None:
    """Pass the mean gradient of the loss over `batches` with respect to base weights, in float32, to `visit`.

    With one batch, each gradient is passed on as soon as the backward pass has it. With more, `at_once` gradients are
    summed at a time, and the batches run again for the next ones.

    Args:
        names: names of parameters.
        visit: (name, gradient), in any order.
        loss: (output, batch) -> a scalar; by default the output's `loss`, for batches with labels.
        at_once: how many gradients are in memory at a time.

    Raises:
        PeftcoreError: a name is not a parameter with a gradient, there is no batch or no loss, or the loss does not
            depend on a parameter.
    """
    held = [dict(batch) if isinstance(batch, Mapping) else batch for batch in _some(batches)]
    chosen = {name: _parameter(model, name) for name in names}
    at_once = len(chosen) if len(held) == 1 else at_once
    unseen: list[str] = []
    for start in range(0, len(chosen), max(1, at_once)):
        part = dict(list(chosen.items())[start : start + at_once])
        sums: dict[str, Tensor] = {}

        def take(name: str, parameter: Tensor, sums: dict[str, Tensor] = sums) -> None:
            gradient, parameter.grad = parameter.grad.float(), None  # type: ignore[union-attr]
            if len(held) == 1:
                sums[name] = torch.empty(0)
                with torch.no_grad():
                    visit(name, gradient)
            else:
                sums[name] = sums[name].add_(gradient) if name in sums else gradient

        with _asked(model, part, take):
            for batch in held:
                answer = run(model, batch)
                value = loss(answer, batch) if loss is not None else getattr(answer, "loss", None)
                if not isinstance(value, Tensor):
                    raise PeftcoreError(
                        "the model returned no loss: add labels to the batches, or pass loss=(output, batch) -> ..."
                    )
                value.backward()
        unseen += [name for name in part if name not in sums]
        for name in list(sums) if len(held) > 1 else ():
            visit(name, sums.pop(name) / len(held))
    _refuse_unseen(unseen, "has no gradient: the loss does not depend on it. Leave it out, such as by exclude_modules")


@contextmanager
def _asked(model: nn.Module, chosen: dict[str, nn.Parameter], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Compute gradients of the parameters `chosen` only inside the block, and pass each to `take`."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in chosen.values()}
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for parameter in before:
            parameter.requires_grad_(False)
        for name, parameter in chosen.items():
            parameter.requires_grad_(True).grad = None
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(take, name)).remove)
        try:
            yield
        finally:
            for parameter, asked in before.items():
                parameter.requires_grad_(asked)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


def _some(batches: Iterable[Any]) -> Iterator[Any]:
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise PeftcoreError("there is no batch. If it is an iterator that was read before, pass a list or a DataLoader")


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


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
        raise PeftcoreError(f"'{name}' is stored as {parameter.dtype}, which has no gradient. Observe a dense base")
    if ranks.is_part(parameter):
        raise PeftcoreError(f"'{name}' is sharded. Observe its gradient before the model is sharded")
    return parameter


def _refuse_unseen(names: Sequence[str], what: str) -> None:
    if names:
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        raise PeftcoreError(f"'{names[0]}'{more} {what}")
