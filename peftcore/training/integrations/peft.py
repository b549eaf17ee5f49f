"""Hugging Face PEFT refuses a model that has peftcore's adapters.

PEFT would freeze some of these adapters, rename the adapted modules, and write the adapters' tensors into its own
adapter's file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peftcore.engine import state_of
from peftcore.errors import PeftcoreError
from peftcore.training.integrations.patching import replace


def _init(_self: Any, original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    state = state_of(model) if isinstance(model, nn.Module) else None
    if state is not None:
        raise PeftcoreError(
            f"PEFT cannot adapt {type(model).__name__}, because it has peftcore's adapters "
            f"{', '.join(state.applied)}. Add another adapter with peftcore.apply(model, ..., adapter='NAME'), or "
            "remove them first: peftcore.remove(model)"
        )
    original(model, *args, **kwargs)


for _cls in (PeftModel, PeftMixedModel, BaseTuner):
    replace(_cls, "__init__", _init)
