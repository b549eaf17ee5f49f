"""The loss of a step: the model's own, or that of one of TRL's trainers, with the passes of its reference.

TRL multiplies by the head's weight in tiles, so that no step of its has logits of all tokens; its own function
(`add_fused_lm_head`) is followed, of the release that is installed. What stands above the log-likelihoods is a few
numbers a sequence.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.engine import disabled, state_of
from peftcore.errors import PeftcoreError
from peftcore.estimating.following import NotFollowed

Call = Callable[..., Any]  # (model, **inputs) -> its outputs, as a trainer calls it
# What each trainer asks of the policy's pass beside log-likelihoods, for its log (TRL 1.16).
_ASKED = {
    "sft": ("entropy", "is_top1"),
    "dpo": ("entropy", "mean_logits", "is_top1"),
    "kto": ("entropy", "mean_logits"),
}
_BETA = 0.1


def rows_of(loss: str | None, batch_size: int) -> int:
    """Sequences of a batch: two answers to each prompt are compared in one pass."""
    return 2 * batch_size if loss == "dpo" else batch_size


class Own:
    """The loss that `model` returns for its labels."""

    reference: nn.Module | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, call: Call, inputs: dict[str, Tensor]) -> Tensor:
        loss: Tensor | None = call(self.model, **inputs).loss
        if loss is None:
            raise NotFollowed(f"{type(self.model).__name__} returned no loss for labels {list(inputs['labels'].shape)}")
        return loss


class OfTrainer(Own):
    """The loss of TRL's trainer of that name, for `model`, whose forward it changes as the trainer does.

    Attributes:
        reference: without adapters the trainer loads a second model, which is this one; None: with its adapters off the
            model itself is the reference.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model)
        try:
            from trl.trainer.utils import add_fused_lm_head
        except ImportError as error:
            raise PeftcoreError(f"loss='{name}' is that of TRL, from 1.16 on. Try: pip install 'trl>=1.16'") from error
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        if head is None:
            raise PeftcoreError(f"loss='{name}' is for language models, and {type(model).__name__} has no output head")
        self.name = name
        if name != "sft" and state_of(model) is None:
            self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        compared = self.reference or model
        original = model.forward
        add_fused_lm_head(compared)
        self._of_reference = compared.forward
        model.forward = original
        add_fused_lm_head(model, outputs=("log_probs", *_ASKED[name]))

    def __call__(self, call: Call, inputs: dict[str, Tensor]) -> Tensor:
        def likelihoods(model: nn.Module) -> Tensor:
            found: Tensor = call(model, **inputs, fused_lm_head=True).log_probs.sum(1)
            return found

        inputs = {**inputs, "use_cache": False}  # type: ignore[dict-item]
        if self.name == "sft":
            outputs = call(self.model, **inputs, fused_lm_head=True)
            return -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)
        if self.name == "kto":
            with torch.no_grad():
                of_policy = likelihoods(self.model)
        outputs = call(self.model, **inputs, fused_lm_head=True)  # which the trainer has until it has logged them
        found = outputs.log_probs.sum(1)
        with torch.no_grad(), self._acting():
            if self.name == "kto":
                divergence = (of_policy - likelihoods(self.reference or self.model)).mean().clamp(min=0)
            before = likelihoods(self.reference or self.model)
        ratios = found - before
        if self.name == "kto":
            return (1 - torch.sigmoid(_BETA * (ratios - divergence))).mean()
        chosen, rejected = ratios.chunk(2)
        return -F.logsigmoid(_BETA * (chosen - rejected)).mean()

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """Within the block the model is the reference."""
        if self.reference is not None:
            yield
            return
        training = [module for module in self.model.modules() if module.training]
        policy, self.model.forward = self.model.forward, self._of_reference
        try:
            with ExitStack() as stack:
                stack.enter_context(disabled(self.model))
                for module in training:
                    module.training = False
                yield
        finally:
            self.model.forward = policy
            for module in training:
                module.training = True


@contextmanager
def tiles_in_place() -> Iterator[None]:
    """Within the block TRL reads and writes a tile of logits in place, as its Triton kernels do on a card."""
    kernels = sys.modules.get("trl.kernels.chunked_logprob")
    names = [name for name in ("_forward_tile", "_backward_tile") if hasattr(kernels, name)]
    before = {name: getattr(kernels, name) for name in names}
    try:
        for name in names:
            setattr(kernels, name, lambda *_, **__: None)
        yield
    finally:
        for name, function in before.items():
            setattr(kernels, name, function)


def loss_of(model: nn.Module, name: str | None) -> Own:
    """The loss of that name, as `Step.loss` has it."""
    return Own(model) if name is None else OfTrainer(model, name)
