"""Loss of a step: the model's own loss, a contrastive loss, or the loss of a TRL trainer with its reference model.

TRL multiplies by the head's weight in tiles, so the logits of all tokens never exist at once. TRL's installed function
`add_fused_lm_head` is simulated. The trainers then compute only a few numbers per sequence from the log-likelihoods.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.estimating.following import NotFollowed
from peftcore.plugin import evaluation_mode, has_adapters

Call = Callable[..., Any]  # (model, **inputs) -> outputs, as a trainer calls the model
# Outputs that each trainer logs in addition to the policy's log-likelihoods (TRL 1.16).
_ASKED = {
    "sft": ("entropy", "is_top1"),
    "dpo": ("entropy", "mean_logits", "is_top1"),
    "kto": ("entropy", "mean_logits"),
}
_BETA = 0.1
VECTORS = {"pairs": 2, "triplets": 3}  # number of texts per example
_SEQUENCES = {"dpo": 2, **VECTORS}  # sequences per example; DPO has two answers per prompt


def rows_of(loss: str | None, batch_size: int) -> int:
    """Return the number of sequences in a batch."""
    return _SEQUENCES.get(loss or "", 1) * batch_size


class Own:
    """The loss that `model` returns for labels."""

    reference: nn.Module | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, call: Call, inputs: dict[str, Tensor]) -> Tensor:
        loss: Tensor | None = call(self.model, **inputs).loss
        if loss is None:
            raise NotFollowed(f"{type(self.model).__name__} returned no loss for labels {list(inputs['labels'].shape)}")
        return loss


class OfVectors(Own):
    """Contrastive loss of mean-pooled last hidden states, as in `peftcore train --task pairs`.

    Args:
        model: Model without an output head.
        texts: Texts of an example: the anchor, then its candidates.
    """

    def __init__(self, model: nn.Module, texts: int) -> None:
        super().__init__(model)
        self.texts = texts

    def __call__(self, call: Call, inputs: dict[str, Tensor]) -> Tensor:
        states: Tensor | None = getattr(call(self.model, **inputs), "last_hidden_state", None)
        if states is None:
            raise NotFollowed(
                f"{type(self.model).__name__} returns no last_hidden_state, so there are no embeddings of texts. "
                "Estimate a class without an output head, such as ...Model"
            )
        weights = inputs["attention_mask"][..., None].to(states.device).float()
        embeddings = F.normalize((states.float() * weights).sum(1) / weights.sum(1), dim=-1)
        anchors, candidates = embeddings.split(
            (len(embeddings) // self.texts, len(embeddings) - len(embeddings) // self.texts)
        )
        labels = torch.arange(len(anchors), device="cpu")
        return F.cross_entropy((anchors @ candidates.T).masked_fill(labels[:, None] < 0, 0.0), labels)


class OfTrainer(Own):
    """Loss of a TRL trainer for `model`, whose forward is modified as by the trainer.

    Attributes:
        reference: Reference model that the trainer loads for a model without adapters. None means that the model with
            its adapters disabled is the reference.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model)
        try:
            from trl.trainer.utils import add_fused_lm_head
        except ImportError as error:
            raise PeftcoreError(
                f"loss='{name}' needs TRL 1.16 or later. Install it: pip install 'trl>=1.16'"
            ) from error
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        if head is None:
            raise PeftcoreError(
                f"loss='{name}' needs a language model with an output head, which {type(model).__name__} does not "
                "have. Estimate a class such as ...ForCausalLM"
            )
        self.name = name
        if name != "sft" and not has_adapters(model):
            self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        reference_model = self.reference or model
        original = model.forward
        add_fused_lm_head(reference_model)
        self._of_reference = reference_model.forward
        model.forward = original
        add_fused_lm_head(model, outputs=("log_probs", *_ASKED[name]))

    def __call__(self, call: Call, inputs: dict[str, Tensor]) -> Tensor:
        def likelihoods(model: nn.Module) -> Tensor:
            embeddings: Tensor = call(model, **inputs, fused_lm_head=True).log_probs.sum(1)
            return embeddings

        inputs = {**inputs, "use_cache": False}  # type: ignore[dict-item]
        if self.name == "sft":
            outputs = call(self.model, **inputs, fused_lm_head=True)
            return -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)
        if self.name == "kto":  # separate forward passes estimate the KL divergence
            with torch.no_grad():
                of_divergence = likelihoods(self.model)
        outputs = call(self.model, **inputs, fused_lm_head=True)  # the trainer keeps these values for its log
        with torch.no_grad(), self._as_reference() as reference:
            if self.name == "kto":
                divergence = (of_divergence - likelihoods(reference)).mean().clamp(min=0)
            of_reference = likelihoods(reference)
        ratios = outputs.log_probs.sum(1) - of_reference
        if self.name == "kto":
            return (1 - torch.sigmoid(_BETA * (ratios - divergence))).mean()
        chosen, rejected = ratios.chunk(2)
        return -F.logsigmoid(_BETA * (chosen - rejected)).mean()

    @contextmanager
    def _as_reference(self) -> Iterator[nn.Module]:
        """Return the reference model. The model itself acts as the reference within the block."""
        if self.reference is not None:
            yield self.reference
            return
        policy, self.model.forward = self.model.forward, self._of_reference
        try:
            with peftcore.disabled(self.model), evaluation_mode(self.model):
                yield self.model
        finally:
            self.model.forward = policy


@contextmanager
def tiles_in_place() -> Iterator[None]:
    """Make TRL read and write tiles of logits in place within the block, as its Triton kernels do on a GPU.

    On meta tensors TRL runs its functions for devices without Triton. Per tile, they need 3 GB more temporary memory
    than the kernels, up to 70 % of the step of a model with 1 billion parameters and a vocabulary of 128,000.
    """
    kernels = sys.modules.get("trl.kernels.chunked_logprob")
    names = [name for name in ("_forward_tile", "_backward_tile") if hasattr(kernels, name)]
    originals = {name: getattr(kernels, name) for name in names}
    try:
        for name in names:
            setattr(kernels, name, lambda *_, **__: None)
        yield
    finally:
        for name, function in originals.items():
            setattr(kernels, name, function)


def loss_of(model: nn.Module, name: str | None) -> Own:
    """Return the loss selected by `Step.loss`."""
    if name in VECTORS:
        return OfVectors(model, VECTORS[name])
    return Own(model) if name is None else OfTrainer(model, name)
