"""Trainers of the command line: transformers' Trainer with our metrics, and the mixin of TRL's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerControl

from peftcore.training import bare_model
from peftcore_cli.bases import precision
from peftcore_cli.console import say
from peftcore_cli.data import streamed
from peftcore_cli.tasks import encoded_examples
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.training.sampler import LengthGroupedSampler

_Base: Any = Trainer if TYPE_CHECKING else object  # mixin before one of several trainers


class Measuring(_Base):
    """Mixin with batches of similar lengths that evaluates with `measure`, so that all figures are comparable.

    Args:
        measure: (model) -> metrics on held-out examples.
        lengths: tokens of each training example.
        parts: (number of examples, weight) of each data set, see `mixture`.
    """

    def __init__(
        self,
        *args: Any,
        measure: Callable[[nn.Module], Metrics],
        lengths: Sequence[int],
        parts: Sequence[tuple[int, float]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.measure, self.lengths, self.parts = measure, lengths, parts
        self.control: TrainerControl
        self.measured: dict[int, Metrics] = {}  # by step

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        if isinstance(self.train_dataset, streamed.EncodedLines):
            return streamed.BlockSampler(self.train_dataset, self.args.train_batch_size, self.args.seed)
        return LengthGroupedSampler(self.lengths, self.args.train_batch_size, self.args.seed, self.parts)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True  # a finished run was resumed: not a step more
            return
        super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        model = bare_model(self)
        with precision.own(model):
            measured = self.measure(model)
        self.measured[self.state.global_step] = measured
        say(f"step {self.state.global_step}/{self.state.max_steps}  held out: {measured}", "bold")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.as_dict().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class MeasuringTrainer(Measuring, Trainer):
    """Trainer on examples with `input_ids` and `labels`.

    Args:
        divides_by_tokens: whether the model can divide its loss by the number of tokens of a whole step.
    """

    def __init__(self, *args: Any, divides_by_tokens: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not divides_by_tokens or not isinstance(self.train_dataset[0]["labels"], list):
            # Their loss is a mean whatever batch size the model is given, so Trainer has to divide.
            self.model_accepts_loss_kwargs = False

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return encoded_examples.in_dtype(super()._prepare_inputs(inputs), self.model)
