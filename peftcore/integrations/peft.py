"""Hugging Face PEFT refuses a model that has peftcore's adapters.

It would freeze them, rename the modules they are attached to, and save its own adapter without them.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peftcore.engine import state_of
from peftcore.errors import PeftcoreError


def _patch(cls: Any) -> None:
    own = cls.__init__

    @functools.wraps(own)
    def init(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        state = state_of(model) if isinstance(model, nn.Module) else None
        if state is not None:
            raise PeftcoreError(
                f"PEFT cannot adapt {type(model).__name__}, which has peftcore's adapters "
                f"{', '.join(state.applied)}. Add another with peftcore.apply(model, ..., adapter='NAME'), or "
                "remove them first: peftcore.remove(model)"
            )
        own(self, model, *args, **kwargs)

    cls.__init__ = init


for _cls in (PeftModel, PeftMixedModel, BaseTuner):
    _patch(_cls)
