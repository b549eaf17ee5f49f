"""Base class of tasks that TRL trains on preferences (DPO, KTO, ORPO and reward models)."""

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
    """A task on preferences, trained by TRL.

    Attributes:
        trl_name: prefix of the names of TRL's trainer and config.
        has_reference: whether the loss uses a reference, the model before training.
    """

    requires = (("trl", "dpo"),)
    least_beta: ClassVar[float | None] = 1e-9
    trl_name: ClassVar[str] = "DPO"
    has_reference: ClassVar[bool] = False

    def likelihoods(
        self, model: nn.Module, examples: Sequence[Example], processor: Any, batch_size: int = 8
    ) -> Likelihoods:
        """Return the log-likelihoods that the loss needs, for each batch."""
        raise NotImplementedError

    def figures_of(
        self, policy: Likelihoods, reference: Likelihoods, examples: Sequence[Example], beta: float
    ) -> Metrics:
        """Return the loss over all examples and the metrics, from the `likelihoods` of model and reference."""
        raise NotImplementedError

    def columns(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return the examples with the columns that TRL's trainer reads."""
        return examples

    def as_dataset(self, examples: Sequence[Example]) -> Any:
        """Return the examples as the `datasets.Dataset` that TRL requires. Rows are read when they are indexed."""
        import datasets

        names = list(self.columns(examples[:1])[0])

        def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
            rows = self.columns([examples[i] for i in batch["index"]])
            return {name: [row.get(name) for row in rows] for name in names}

        return datasets.Dataset.from_dict({"index": range(len(examples))}).with_transform(read)

    def reference(self, model: nn.Module, examples: Sequence[Example], evaluation: Evaluation) -> Any:
        return (
            self.likelihoods(model, examples, evaluation.processor, measuring_batch_size(evaluation))
            if self.has_reference
            else None
        )

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        evaluation: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        if reference is None and self.has_reference:
            with peftcore.disabled(model) if has_adapters(model) else contextlib.nullcontext():
                reference = self.reference(model, examples, evaluation)
        likelihoods = self.likelihoods(model, examples, evaluation.processor, measuring_batch_size(evaluation))
        return self.figures_of(likelihoods, reference, examples, evaluation.about.beta or BETA)

    def trl_classes(self) -> tuple[Any, Any]:
        """Return TRL's (trainer, config) classes.

        Raises:
            PeftcoreError: TRL is not installed, or its release does not have the trainer.
        """
        require("trl", extra="dpo")
        import trl

        return getattr(trl, f"{self.trl_name}Trainer"), getattr(trl, f"{self.trl_name}Config")

    def arguments(self, settings: Settings) -> tuple[Any, dict[str, Any]]:
        from peftcore_cli.training.trainer_arguments import checkpointing_name

        options = {
            checkpointing_name(): False,
            "max_length": None,
            "beta": settings.beta or BETA,
        }  # TRL's default is True
        return self.trl_classes()[1], options

    def trainer_class(self) -> Any:
        """Return a subclass of TRL's trainer that takes tokenized examples."""
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
        """Convert a batch to model inputs."""
        return batch

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        """Return TRL's trainer.

        The reference is derived from the current model (`peftcore.reference_model`), so no second model is loaded.
        """
        require("trl", extra="dpo")
        import datasets

        datasets.disable_progress_bars()
        datasets.utils.logging.set_verbosity_error()  # hides a warning about the cache of datasets
        for name in ("train_dataset", "eval_dataset"):
            arguments[name] = self.as_dataset(arguments[name])
        if self.has_reference and has_adapters(
            arguments["model"]
        ):  # without adapters, all weights are trained, so TRL loads its own reference
            arguments["ref_model"] = peftcore.reference_model(arguments["model"])
        return self.trainer_class()(**arguments, processing_class=processor)


def measuring_batch_size(evaluation: Evaluation) -> int:
    """Return the number of pairs per evaluation batch: fewer than in training, because evaluation needs full logits."""
    return (
        evaluation.batch_size
        if evaluation.longest is None
        else max(1, min(8, evaluation.batch_size, 512 // evaluation.longest))
    )
