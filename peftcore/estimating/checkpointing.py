"""Gradient checkpointing of a stand-in: activations are computed again (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.estimating.following import NotFollowed

_METHODS = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # by transformers' release


def checkpoint(model: nn.Module, kind: bool | str | Mapping[str, Any]) -> None:
    """Let a model of transformers compute activations again in the backward, as `Step.gradient_checkpointing` says.

    Raises:
        NotFollowed: it cannot, or it would move activations to another memory.
        PeftcoreError: what is asked of it is none of its options.
    """
    options = dict(kind) if isinstance(kind, Mapping) else {"use_reentrant": kind == "reentrant"}
    options.setdefault("use_reentrant", False)
    if options.get("offload"):
        raise NotFollowed("gradient_checkpointing: offload=True moves activations to another memory")
    name = next((name for name in _METHODS if hasattr(model, name)), None)
    if name is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise NotFollowed(f"{type(model).__name__} has no gradient checkpointing of transformers' kind")
    enable = getattr(model, name)
    own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    missing = own.keys() - inspect.signature(enable).parameters.keys()
    if missing:
        raise PeftcoreError(f"gradient_checkpointing: this release of transformers knows no {', '.join(missing)}")
    unknown = options.keys() - {"use_reentrant", "context_fn", "preserve_rng_state", "determinism_check", "debug"}
    if unknown:
        raise PeftcoreError(
            f"gradient_checkpointing: torch.utils.checkpoint takes no {', '.join(sorted(unknown))}. It takes "
            "use_reentrant, context_fn, preserve_rng_state, determinism_check and debug; transformers every_n_layers"
        )
    enable(options, **own)
