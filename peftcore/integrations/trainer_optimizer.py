"""The optimizer that transformers' `Trainer` makes for a model with adapters.

`optim="paged_adamw_8bit"` and the other names of `peftcore.optim.NAMES` mean the optimizers of that package, whose
arguments stand in `optim_args` ("budget=256MB,directory=/data"). Where the method of an adapter that trains has
parameter groups, any optimizer is given these; schedulers keep the ratios of their learning rates.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers import trainer as transformers_trainer

from peftcore import engine, optim
from peftcore.errors import PeftcoreError


def optimizer_of(args: TrainingArguments) -> tuple[type, dict[str, Any]] | None:
    """What `args.optim` and `args.optim_args` mean, if it is an optimizer of peftcore's, for a plain `Trainer`:
    `Trainer(..., optimizer_cls_and_kwargs=optimizer_of(args))`.

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
            raise PeftcoreError(f"optim_args: expected NAME=VALUE separated by commas, found '{setting}'")
        try:
            options[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            options[name.strip()] = text.strip()
    return kind, options


def with_groups(trainer: Any, adapted: nn.Module, model: nn.Module | None) -> tuple[Any, dict[str, Any]]:
    """The optimizer that `trainer` would make and its arguments, with the groups of the methods.

    What they do not name Trainer groups by its own rule: no decay of what is called a bias or a norm.

    Args:
        adapted: the model with the adapters.
        model: what the trainer makes the optimizer for, if that is not `trainer.model`.

    Raises:
        PeftcoreError: the optimizer chooses the groups itself.
    """
    model = trainer.model if model is None else model
    kind, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    is_factory = getattr(transformers_trainer, "is_optimizer_factory", lambda _kind: False)  # of later releases
    if {"params", "model", "optimizer_dict"} & set(options) or is_factory(kind):
        raise PeftcoreError(
            f"optim='{getattr(trainer.args.optim, 'value', trainer.args.optim)}' groups the parameters itself, and the "
            "method of an adapter that trains has groups of its own. Choose another optim, such as 'adamw_torch'"
        )
    lr, decay = options.get("lr") or trainer.args.learning_rate, trainer.args.weight_decay
    groups = engine.method_groups(adapted, lr, decay)
    rest, decaying = engine.not_in(groups, model.named_parameters()), set(trainer.get_decay_parameter_names(model))
    for amount, wanted in ((decay, True), (0.0, False)):
        if chosen := [p for name, p in rest.items() if (name in decaying) is wanted]:
            groups.append({"params": chosen, "weight_decay": amount})
    return kind, {**options, "params": groups}
