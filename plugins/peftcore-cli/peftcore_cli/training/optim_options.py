"""`--optim-args`: optimizer arguments, and arguments of Trainer for the optimizer."""

from __future__ import annotations

import ast
import re
from typing import Any

from peftcore.errors import PeftcoreError


def arguments(optim_args: str | None) -> dict[str, Any]:
    """Convert `optim_args` to arguments of Trainer, which has separate arguments for `betas` and `eps`.

    Trainer would split `optim_args` at every comma, including the comma in betas=(0.9,0.95).

    Raises:
        PeftcoreError: the text is not a list of NAME=VALUE, or the value of `betas` or `eps` is invalid.
    """
    trainer_arguments: dict[str, Any] = {}
    optimizer_settings = []
    for setting in re.findall(r"(?:[^,(]|\([^)]*\))+", optim_args or ""):
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise PeftcoreError(f"--optim-args must be NAME=VALUE separated by commas, found '{setting}'")
        try:
            if name == "betas":
                beta1, beta2 = ast.literal_eval(text)
                trainer_arguments |= {"adam_beta1": float(beta1), "adam_beta2": float(beta2)}
            elif name == "eps":
                trainer_arguments["adam_epsilon"] = float(text)
            else:
                optimizer_settings.append(setting)
        except (ValueError, SyntaxError, TypeError):
            example = "(0.9,0.999)" if name == "betas" else "1e-8"
            raise PeftcoreError(f"--optim-args {name} must have the form {name}={example}, found '{text}'") from None
    return {"optim_args": ",".join(optimizer_settings) or None, **trainer_arguments}
