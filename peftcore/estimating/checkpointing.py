"""Gradient checkpointing of a meta model, which recomputes activations (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.estimating.following import NotFollowed

_METHODS = (
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
)  # the name depends on the release of transformers


def checkpoint(model: nn.Module, kind: bool | str | Mapping[str, Any]) -> None:
    """Enable gradient checkpointing on a transformers model, as specified by `Step.gradient_checkpointing`.

    Raises:
        NotFollowed: The model does not support gradient checkpointing, or `offload` is set.
        PeftcoreError: An option is unknown.
    """
    options = dict(kind) if isinstance(kind, Mapping) else {"use_reentrant": kind == "reentrant"}
    options.setdefault("use_reentrant", False)
    if options.get("offload"):
        raise NotFollowed("gradient_checkpointing: offload=True cannot be estimated. Omit the option")
    name = next((name for name in _METHODS if hasattr(model, name)), None)
    if name is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise NotFollowed(f"{type(model).__name__} does not support gradient_checkpointing. Omit the option")
    enable = getattr(model, name)
    our_options = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    unknown_options = our_options.keys() - inspect.signature(enable).parameters.keys()
    if unknown_options:
        raise PeftcoreError(
            f"gradient_checkpointing: {', '.join(unknown_options)} needs a later release of transformers"
        )
    unknown = options.keys() - {"use_reentrant", "context_fn", "preserve_rng_state", "determinism_check", "debug"}
    if unknown:
        raise PeftcoreError(
            f"gradient_checkpointing: torch.utils.checkpoint has no option {', '.join(sorted(unknown))}. Its options "
            "are use_reentrant, context_fn, preserve_rng_state, determinism_check and debug; transformers adds "
            "every_n_layers"
        )
    enable(options, **our_options)
