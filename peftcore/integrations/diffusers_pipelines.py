"""Pipelines of diffusers refuse to be saved without their models' adapters."""

from __future__ import annotations

import functools
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from peftcore.engine import state_of
from peftcore.errors import PeftcoreError
from peftcore.integrations import diffusers as _models  # which is patched as well

_own = DiffusionPipeline.save_pretrained


@functools.wraps(_own)
def _save_pretrained(pipe: Any, *args: Any, **kwargs: Any) -> Any:
    for name, model in pipe.components.items():
        state = state_of(model) if isinstance(model, nn.Module) else None
        if state is not None and state.merged is None:
            raise PeftcoreError(
                f"save_pretrained cannot write the adapters of '{name}' ({type(model).__name__}). Save the "
                f"adapters with peftcore.save(pipe.components, folder, format={_models.FORMAT!r}), or merge them "
                f"first: peftcore.merge(pipe.{name})"
            )
    return _own(pipe, *args, **kwargs)


DiffusionPipeline.save_pretrained = _save_pretrained
