"""Faster training steps (fused operators, the loss without logits) and integrations with trainers.

It imports `files`, `quantization` and what is below them. `peftcore` exports `fuse`, `loss_without_logits` and
`reference_model`. Names are imported lazily, because `import peftcore` imports this package and must not load PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftcore.training.fusing import RECOMPUTE as RECOMPUTE, recomputes as recomputes
    from peftcore.training.integrations.trainer import (
        is_complete as is_complete,
        latest_checkpoint as latest_checkpoint,
    )
    from peftcore.training.integrations.trainer_optimizer import bare_model as bare_model
    from peftcore.training.loss_without_logits import evaluated_without_logits as evaluated_without_logits

_HOMES = {
    "RECOMPUTE": "fusing",
    "recomputes": "fusing",
    "is_complete": "integrations.trainer",
    "latest_checkpoint": "integrations.trainer",
    "bare_model": "integrations.trainer_optimizer",
    "evaluated_without_logits": "loss_without_logits",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'peftcore.training' has no attribute '{name}'")
    value = getattr(import_module(f"peftcore.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
