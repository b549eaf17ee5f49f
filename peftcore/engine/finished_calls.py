"""The model's last call, for methods whose loss depends on it (`Method.call_loss`).

output = model(**batch)     kept, if it builds a graph for the adapter of such a method
extra_loss(model)           takes it; a second call before that is an error, since its term would be missing
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftcore.adaptation.modes import evaluation_mode
from peftcore.engine.activating import disabled
from peftcore.engine.state import require_state
from peftcore.engine.trained import unmoved_buffers
from peftcore.errors import PeftcoreError
from peftcore.finished_call import FinishedCall
from peftcore.prompts.counting import OTHER_CACHES


def take_finished_call(model: nn.Module, subject: str) -> FinishedCall:
    """Return the call of `model` since the last time, and forget it. `subject`: whose loss depends on it.

    Raises:
        PeftcoreError: no call has finished since, or several have.
    """
    lock = require_state(model).lock
    kept = lock.context.take_calls() if lock.context is not None else []
    kept = [each for each in kept if each.activation is lock.activation]
    if len(kept) != 1:
        found = f"{len(kept)} calls with gradients have" if kept else "no call with gradients has"
        raise PeftcoreError(
            f"the loss of {subject} depends on one call of the model, and {found} finished since the last extra_loss "
            "or loss_terms. Call the model that the adapters are applied to (not a part of it, and not inside a "
            "compiled function), then extra_loss once after each call. Make other calls under torch.no_grad()"
        )
    call, args, kwargs, output, _ = kept[0]

    def run_base() -> Any:
        _refuse_cache(call, subject)
        with torch.no_grad(), disabled(model), unmoved_buffers(model), evaluation_mode(model):
            return model(*args, **kwargs)

    return FinishedCall(call, output, call.state, run_base)


def _refuse_cache(call: Mapping[str, Any], subject: str) -> None:
    for name, value in call.items():
        if value is not None and (name in OTHER_CACHES or "Cache" in type(value).__name__):
            raise PeftcoreError(
                f"the loss of {subject} compares with the base, and the call got a cache, '{name}', to which a second "
                "call would append. Train without it"
            )
