"""The optimizer that transformers' `Trainer` makes for a model with adapters.

`optim="paged_adamw_8bit"` and the other names of `peftcore.optim.NAMES` select that package's optimizers, with
arguments in `optim_args` ("budget=256MB,directory=/data"). If the method of a trainable adapter defines parameter
groups, every optimizer gets them; schedulers keep the ratios of their learning rates.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from torch import nn
from transformers import TrainingArguments

from peftcore import engine, optim
from peftcore.errors import PeftcoreError


def optimizer_of(args: TrainingArguments) -> tuple[type, dict[str, Any]] | None:
    """Return the optimizer of peftcore that `args` select and its arguments, or None.

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
            raise PeftcoreError(f"optim_args must be NAME=VALUE separated by commas, found '{setting}'")
        try:
            options[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            options[name.strip()] = text.strip()
    return kind, options


def with_groups(trainer: Any, adapted: nn.Module, model: nn.Module | None) -> tuple[Any, dict[str, Any]]:
    """Return the optimizer that `trainer` would make and its arguments, with the methods' parameter groups.

    Parameters in no group are grouped by Trainer's rule: no weight decay for biases and norms.

    Args:
        trainer: the trainer.
        adapted: the model with the adapters.
        model: the model the trainer makes the optimizer for, if it is not `trainer.model`.

    Raises:
        PeftcoreError: the optimizer chooses the groups itself.
    """
    model = trainer.model if model is None else model
    kind, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    from transformers import trainer as transformers_trainer  # whose import runs `peftcore.integrations.transformers`

    is_factory = getattr(transformers_trainer, "is_optimizer_factory", lambda _kind: False)  # in later releases
    lr, decay = options.get("lr") or trainer.args.learning_rate, trainer.args.weight_decay
    groups = engine.method_groups(adapted, lr, decay)
    if not groups:
        return kind, options
    of_trainer = options.get("optimizer_dict")
    if isinstance(of_trainer, list) and all(isinstance(each, dict) and "params" in each for each in of_trainer):
        ours = {
            id(p) for group in groups for p in group["params"]
        }  # a trainer's own groups, as of sentence-transformers
        rest = [{**each, "params": [p for p in each["params"] if id(p) not in ours]} for each in of_trainer]
        return kind, {**options, "optimizer_dict": [*groups, *(each for each in rest if each["params"])]}
    if {"params", "model", "optimizer_dict"} & set(options) or is_factory(kind):
        raise PeftcoreError(
            f"optim='{getattr(trainer.args.optim, 'value', trainer.args.optim)}' groups parameters itself, but "
            "an adapter's method defines its own groups. Choose another optim, such as 'adamw_torch'"
        )
    left, decaying = engine.not_in(groups, model.named_parameters()), set(trainer.get_decay_parameter_names(model))
    for amount, wanted in ((decay, True), (0.0, False)):
        if chosen := [p for name, p in left.items() if (name in decaying) is wanted]:
            groups.append({"params": chosen, "weight_decay": amount})
    return kind, {**options, "params": groups}
