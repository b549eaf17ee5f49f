"""What tasks on judged answers have in common: TRL's trainers, some against a reference, the model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

import peftcore
from peftcore.plugin import has_adapters
from peftcore_cli.console import require
from peftcore_cli.settings import Settings
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Evaluation, Task

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask
    from peftcore_cli.training.trainers import Measuring

BETA = 0.1

Likelihoods = list[Tensor]


class Judged(Task):
    """A task whose answers are judged, trained by TRL.

    Attributes:
        trl_name: beginning of the names of TRL's trainer and config.
        has_reference: whether the loss compares with the model as it was.
    """

    requires = (("trl", "dpo"),)
    least_beta: ClassVar[float | None] = 1e-9
    trl_name: ClassVar[str] = "DPO"
    has_reference: ClassVar[bool] = False

    def likelihoods(
        self, model: nn.Module, examples: Sequence[Example], processor: Any, batch_size: int = 8
    ) -> Likelihoods:
        """Return what the loss needs of the model: log-likelihoods of answers, in batches."""
        raise NotImplementedError

    def figures_of(self, after: Likelihoods, before: Likelihoods, examples: Sequence[Example], beta: float) -> Metrics:
        """Return the loss over all examples and the task's figures, from `likelihoods` of model and reference."""
        raise NotImplementedError

    def columns(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return examples with the columns of TRL's trainer."""
        return examples

    def reference(self, model: nn.Module, examples: Sequence[Example], how: Evaluation) -> Any:
        return self.likelihoods(model, examples, how.processor, at_once(how)) if self.has_reference else None

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        how: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        if reference is None and self.has_reference:
            with peftcore.disabled(model) if has_adapters(model) else contextlib.nullcontext():
                reference = self.reference(model, examples, how)
        after = self.likelihoods(model, examples, how.processor, at_once(how))
        return self.figures_of(after, reference, examples, how.about.beta or BETA)

    def trl_classes(self) -> tuple[Any, Any]:
        """Return (trainer, config) of TRL.

        Raises:
            PeftcoreError: TRL is not installed, or this release has no such trainer.
        """
        require("trl", extra="dpo")
        import trl

        return getattr(trl, f"{self.trl_name}Trainer"), getattr(trl, f"{self.trl_name}Config")

    def arguments(self, settings: Settings) -> tuple[Any, dict[str, Any]]:
        from peftcore_cli.training.trainer_arguments import checkpointing_name

        more = {checkpointing_name(): False, "max_length": None, "beta": settings.beta or BETA}  # TRL's default is True
        return self.trl_classes()[1], more

    def trainer_class(self) -> Any:
        """Return TRL's trainer for examples that are tokens already, with the end of the answer if it is learned."""
        from peftcore_cli.training.trainers import Measuring

        task = self
        base: Any = self.trl_classes()[0]

        class MeasuringComparison(Measuring, base):
            def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
                return dataset

            def _prepare_inputs(self, inputs: Any) -> Any:
                return task.inputs_of(super()._prepare_inputs(inputs), self.model)

            def tokenize_row(self, row: Any, *_args: Any, **_kwargs: Any) -> Any:
                return row

        return MeasuringComparison

    def inputs_of(self, batch: Any, model: nn.Module) -> Any:
        """Return a batch as the model takes it."""
        return batch

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        """Return TRL's trainer.

        The reference is the current model; no second one is loaded (`peftcore.reference_model`).
        """
        require("trl", extra="dpo")
        import datasets

        datasets.disable_progress_bars()
        datasets.utils.logging.set_verbosity_error()  # it cannot hash methods, which matters to its cache only
        for name in ("train_dataset", "eval_dataset"):
            arguments[name] = datasets.Dataset.from_list(self.columns(arguments[name]))
        if self.has_reference and has_adapters(arguments["model"]):  # otherwise all weights train
            arguments["ref_model"] = peftcore.reference_model(arguments["model"])
        return self.trainer_class()(**arguments, processing_class=processor)


def at_once(how: Evaluation) -> int:
    """Return how many pairs to measure together; given a training batch, fewer: measuring needs whole logits."""
    return how.batch_size if how.longest is None else max(1, min(8, how.batch_size, 512 // how.longest))
