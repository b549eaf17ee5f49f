"""Add the loss terms of methods in transformers' `Trainer` and its subclasses.

    accelerator.backward(loss)    adds 1/n of the terms to the loss of each of the n batches of a step

The gradients of the terms are therefore scaled, averaged over ranks and clipped like those of the loss. The log reports
the means as `extra_loss/<adapter>`; the logged loss and evaluations do not include the terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcore import engine
from peftcore.errors import PeftcoreError


class ExtraLoss(TrainerCallback):
    """Adds the loss terms to each batch of a trainer's step once, and averages them for the log."""

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        self.trainer = trainer
        self.model = model
        self.waits = True  # not added to this batch yet
        self.added = 0
        self.steps = 0
        self.sums: dict[str, Tensor] = {}  # since the last log
        accelerator = trainer.accelerator
        self._own: Callable[..., Any] = getattr(accelerator.backward, "without_extra_loss", accelerator.backward)

        def backward(loss: Tensor, **kwargs: Any) -> Any:
            return self._own(self.with_terms(loss), **kwargs)

        backward.without_extra_loss = self._own  # type: ignore[attr-defined]
        accelerator.backward = backward

    def with_terms(self, loss: Tensor) -> Tensor:
        """Return the loss of a batch plus its share of the terms, unless the share has already been added."""
        if not self.waits:
            return loss
        self.waits = False
        self.added += 1
        share = 1 / self.trainer.current_gradient_accumulation_steps
        for name, term in engine.loss_terms(self.model).items():
            self.sums[name] = self.sums.get(name, 0.0) + share * term.detach()
            loss = loss + share * self.trainer.accelerator.gradient_accumulation_steps * term.to(loss.device)
        return loss

    def means(self) -> dict[str, float]:
        """Return {name in the log: mean of an adapter's term since the last call}."""
        means = {f"extra_loss/{name}": total.item() / max(1, self.steps) for name, total in self.sums.items()}
        self.steps, self.sums = 0, {}
        return means

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.waits, self.added = True, 0

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.waits = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.added and (names := list(engine.loss_terms(self.model))):
            raise PeftcoreError(
                f"{names} add a term to the loss, but training_step of {type(self.trainer).__name__} skipped it by "
                "calling loss.backward(). Call self.accelerator.backward(loss) instead"
            )
        self.steps += 1


def add_extra_loss(trainer: Trainer, model: nn.Module) -> None:
    """Make `trainer`, which is about to train `model`, add the loss terms of the adapters' methods."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, ExtraLoss):
            trainer.remove_callback(callback)
    if engine.has_loss(model):
        trainer.add_callback(ExtraLoss(trainer, model))


def logged(trainer: Trainer) -> dict[str, float]:
    """Return the means of the terms, to log with the training loss."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExtraLoss):
            return callback.means()
    return {}
