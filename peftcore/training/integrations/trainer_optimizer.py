"""Create the optimizer of transformers' `Trainer` for a model with adapters.

`optim="paged_adamw_8bit"` and the other names in `peftcore.optim.NAMES` select an optimizer of `peftcore.optim`, with
arguments in `optim_args` ("budget=256MB,directory=/data"). If the method of a trainable adapter defines parameter
groups, any optimizer gets them, and schedulers keep the ratios of their learning rates. If the method has its own
schedule, the trainer's schedule is multiplied by it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    trainer as transformers_trainer,
)
from transformers.trainer import Trainer

from peftcore import engine, optim
from peftcore.errors import PeftcoreError, warn


def optimizer_of(args: TrainingArguments) -> tuple[type, dict[str, Any]] | None:
    """Return the optimizer of peftcore selected by `args` and its arguments, or None.

    For a plain Trainer: `Trainer(..., optimizer_cls_and_kwargs=optimizer_of(args))`.

    Raises:
        PeftcoreError: `optim_args` is not NAME=VALUE, separated by commas.
    """
    kind: Any = optim.NAMES.get(getattr(args.optim, "value", args.optim))
    if kind is None:
        return None
    options: dict[str, Any] = {"lr": args.learning_rate}
    if not issubclass(kind, optim.Lion):
        options["eps"] = args.adam_epsilon
    options["betas"] = (args.adam_beta1, args.adam_beta2)
    for setting in re.findall(r"(?:[^,(]|\([^)]*\))+", args.optim_args or ""):
        name, equals, text = setting.strip().partition("=")
        if not equals:
            raise PeftcoreError(f"optim_args must be NAME=VALUE pairs separated by commas, found '{setting}'")
        try:
            options[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            options[name.strip()] = text.strip()
    return kind, options


def with_groups(trainer: Trainer, adapted: nn.Module, model: nn.Module | None) -> tuple[Any, dict[str, Any]]:
    """Return (optimizer that `trainer` would create, its arguments), with the methods' parameter groups.

    Parameters without a group are grouped by Trainer's rule: no weight decay for biases and norms.

    Args:
        trainer: the trainer.
        adapted: the model with the adapters.
        model: the model to create the optimizer for, if it is not `trainer.model`.

    Raises:
        PeftcoreError: the optimizer forms its own groups.
    """
    model = trainer.model if model is None else model
    kind, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    lr, decay = options.get("lr") or trainer.args.learning_rate, trainer.args.weight_decay
    groups = engine.method_groups(adapted, lr, decay)
    if not groups:
        return kind, options
    own_groups = options.get("optimizer_dict")
    if _are_groups(own_groups):  # of sentence-transformers' trainer
        return kind, {**options, "optimizer_dict": [*groups, *_without_members(own_groups, groups)]}
    if {"params", "model", "optimizer_dict"} & set(options) or _is_factory(kind):
        raise PeftcoreError(
            f"optim='{getattr(trainer.args.optim, 'value', trainer.args.optim)}' forms its own parameter groups, but "
            "an adapter's method defines groups too. Choose another optim, such as 'adamw_torch'"
        )
    remaining_parameters = engine.not_in(groups, model.named_parameters())
    decaying = set(trainer.get_decay_parameter_names(model))
    with_decay = [parameter for name, parameter in remaining_parameters.items() if name in decaying]
    without_decay = [parameter for name, parameter in remaining_parameters.items() if name not in decaying]
    if with_decay:
        groups.append({"params": with_decay, "weight_decay": decay})
    if without_decay:
        groups.append({"params": without_decay, "weight_decay": 0.0})
    return kind, {**options, "params": groups}


def _are_groups(value: object) -> bool:
    """Return whether `value` is a list of parameter groups as optimizers accept it."""
    return isinstance(value, list) and all(isinstance(group, dict) and "params" in group for group in value)


def _without_members(groups: list[dict[str, Any]], other_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups without the parameters in `other_groups`, dropping groups that become empty."""
    member_ids = set(map(id, chain.from_iterable(group["params"] for group in other_groups)))
    remaining_groups: list[dict[str, Any]] = []
    for group in groups:
        parameters = [parameter for parameter in group["params"] if id(parameter) not in member_ids]
        if parameters:
            remaining_groups.append({**group, "params": parameters})
    return remaining_groups


def _is_factory(kind: Any) -> bool:
    """Return whether transformers passes the model, not parameters, to `kind`; older releases never do."""
    is_factory = getattr(transformers_trainer, "is_optimizer_factory", None)
    return is_factory is not None and bool(is_factory(kind))


def create_scheduler(
    trainer: Trainer, original: Callable[..., Any], num_training_steps: int, *args: Any, **kwargs: Any
) -> Any:
    """Return the scheduler that `trainer` would create, multiplied by the schedules of the adapters' methods.

    Raises:
        PeftcoreError: the scheduler does not compute the learning rate from the step alone.
    """
    given, model = trainer.lr_scheduler, bare_model(trainer)
    made_before = given is not None and getattr(trainer, "_created_lr_scheduler", False)
    scheduler = original(num_training_steps, *args, **kwargs)
    if made_before or not engine.has_schedule(model):
        return scheduler
    if given is not None:
        warn(
            "the trainer was given its own scheduler, so the learning rate is not multiplied by the schedule of the "
            "adapter's method. Leave out the scheduler, and choose lr_scheduler_type"
        )
        return scheduler
    if not isinstance(scheduler, LambdaLR):
        raise PeftcoreError(
            f"lr_scheduler_type={str(trainer.args.lr_scheduler_type)!r} does not compute the learning rate from the "
            "step alone, so the schedule of the adapter's method cannot multiply it. Use linear, cosine or constant"
        )

    def times(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda steps: rate(steps) * engine.scheduled(model, steps + 1, num_training_steps)

    scheduler.lr_lambdas = [times(rate) for rate in scheduler.lr_lambdas]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * rate(0)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
    return scheduler


class PagingReport(TrainerCallback):
    """Callback that reports at the end where a paged optimizer stored its state, and the cost of moving it."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer: Any = kwargs.get("optimizer")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # unwrapped from accelerate's
        if hasattr(optimizer, "paging") and state.is_world_process_zero:
            print(f"optimizer state: {optimizer.paging()}", flush=True)


def create_optimizer(trainer: Trainer, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Create the optimizer for `Trainer.create_optimizer`, with peftcore's optimizers and the methods' groups."""
    if trainer.optimizer is not None:
        return original(*args, **kwargs)
    if trainer.optimizer_cls_and_kwargs is None:
        trainer.optimizer_cls_and_kwargs = optimizer_of(trainer.args)
    old_arguments = trainer.optimizer_cls_and_kwargs
    if engine.has_parameter_groups(bare_model(trainer)):
        model = kwargs.get("model", args[0] if args else None)
        trainer.optimizer_cls_and_kwargs = with_groups(trainer, bare_model(trainer), model)
    try:
        return original(*args, **kwargs)
    finally:
        trainer.optimizer_cls_and_kwargs = old_arguments


def bare_model(trainer: Trainer) -> nn.Module:
    """Return the model that `trainer` trains, unwrapped."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
