"""Models with their own code: add missing methods that commands call."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from peftcore.errors import PeftcoreError


def complete(model: nn.Module) -> None:
    """Add a loss to the class of a language model, and a clear error if the class has no `generate`.

    Classes written for transformers 4 inherited `generate` from `PreTrainedModel`, and some return only logits.
    """
    kind: Any = type(model)
    if not hasattr(kind, "generate"):
        kind.generate = _refuse
    signature = inspect.signature(kind.forward)
    parameters = [*signature.parameters.values()]
    if any(parameter.name == "labels" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    from transformers.loss.loss_utils import ForCausalLMLoss

    forward = kind.forward

    @functools.wraps(forward)
    def with_loss(self: Any, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if labels is not None:
            output.loss = ForCausalLMLoss(output.logits, labels, output.logits.shape[-1])
        return output

    labels_parameter = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
    with_loss.__signature__ = signature.replace(parameters=[*parameters, labels_parameter])  # type: ignore[attr-defined]
    kind.forward = with_loss


def _refuse(self: Any, *_args: Any, **_options: Any) -> Any:
    raise PeftcoreError(
        f"{type(self).__name__} cannot generate text: its class does not inherit from transformers' GenerationMixin, "
        "as transformers 5 requires. Add GenerationMixin to the base classes in the model's folder"
    )
