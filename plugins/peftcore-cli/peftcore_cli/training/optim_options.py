"""`--optim-args`, of which Trainer takes some as arguments of its own."""

from __future__ import annotations

import ast
import re
from typing import Any

from peftcore.errors import PeftcoreError


def arguments(optim_args: str | None) -> dict[str, Any]:
    """Return `optim_args` as arguments of Trainer, which has its own for `betas` and `eps`.

    Trainer splits `optim_args` at every comma, including the one within betas=(0.9,0.95).

    Raises:
        PeftcoreError: it is not NAME=VALUE, separated by commas, or the value of `betas` or `eps` is wrong.
    """
    found: dict[str, Any] = {}
    rest = []
    for setting in re.findall(r"(?:[^,(]|\([^)]*\))+", optim_args or ""):
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise PeftcoreError(f"--optim-args must be NAME=VALUE separated by commas, found '{setting}'")
        try:
            if name == "betas":
                first, second = ast.literal_eval(text)
                found |= {"adam_beta1": float(first), "adam_beta2": float(second)}
            elif name == "eps":
                found["adam_epsilon"] = float(text)
            else:
                rest.append(setting)
        except (ValueError, SyntaxError, TypeError):
            example = "(0.9,0.999)" if name == "betas" else "1e-8"
            raise PeftcoreError(f"--optim-args {name} must be like {name}={example}, found '{text}'") from None
    return {"optim_args": ",".join(rest) or None, **found}
