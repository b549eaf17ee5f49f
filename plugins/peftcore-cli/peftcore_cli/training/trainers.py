"""Trainers of the command line: transformers' Trainer, and a mixin for TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerControl

from peftcore.training import bare_model
from peftcore_cli.bases import precision
from peftcore_cli.console import say
from peftcore_cli.tasks import encoded_examples
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.training.sampler import LengthGroupedSampler

_Base: Any = Trainer if TYPE_CHECKING else object  # shared by several trainers


class Measuring(_Base):
    """Mixin that makes batches of similar lengths and evaluates with `measure`, as `peftcore eval` does.

    Args:
        measure: function from a model to metrics on held-out examples.
        lengths: number of tokens of each training example.
        weighted_sizes: (number of examples, weight) of each data set, see `mixture`.
    """

    def __init__(
        self,
        *args: Any,
        measure: Callable[[nn.Module], Metrics],
        lengths: Sequence[int],
        weighted_sizes: Sequence[tuple[int, float]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.measure, self.lengths, self.weighted_sizes = measure, lengths, weighted_sizes
        self.control: TrainerControl
        self.metrics_by_step: dict[int, Metrics] = {}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LengthGroupedSampler(self.lengths, self.args.train_batch_size, self.args.seed, self.weighted_sizes)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True  # the resumed run had already finished
            return
        super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        model = bare_model(self)
        with precision.in_model_dtype(model):
            held_out = self.measure(model)
        self.metrics_by_step[self.state.global_step] = held_out
        say(f"step {self.state.global_step}/{self.state.max_steps}  held out: {held_out}", "bold")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in held_out.as_dict().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class MeasuringTrainer(Measuring, Trainer):
    """Trainer on examples with `input_ids` and `labels`.

    Args:
        divides_by_tokens: whether the loss of a step is averaged over all tokens of the accumulated batches.
    """

    def __init__(self, *args: Any, divides_by_tokens: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not divides_by_tokens or not isinstance(self.train_dataset[0]["labels"], list):
            # The model returns the mean over its batch, so Trainer must average over accumulated batches.
            self.model_accepts_loss_kwargs = False

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return encoded_examples.in_dtype(super()._prepare_inputs(inputs), self.model)
