"""Trainers of the command line: transformers' Trainer and TRL's trainers on judged answers, with our metrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerControl

from peftcore.cli import task_names
from peftcore.cli.bases import precision
from peftcore.cli.console import require, say
from peftcore.cli.data import streamed
from peftcore.cli.tasks import encoded_examples, image_preferences, odds, rewards, rollouts, sentence_pairs, unpaired
from peftcore.cli.tasks.metrics import Metrics
from peftcore.cli.training.sampler import LengthGroupedSampler
from peftcore.engine import state_of
from peftcore.errors import PeftcoreError
from peftcore.training.integrations.reference_model import reference_model
from peftcore.training.integrations.trainer_optimizer import bare_model

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


class EmbeddingTrainer(MeasuringTrainer):
    """Trainer on pairs of texts (`sentence_pairs`)."""

    def __init__(self, *args: Any, pooling: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pooling = pooling

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_args: Any, **_kwargs: Any) -> Any:
        found = sentence_pairs.vectors(model, inputs, self.pooling)
        return sentence_pairs.loss(found, inputs["labels"], inputs.get("same"))


def trl_classes(task: str) -> tuple[Any, Any]:
    """Return (trainer, config) of TRL for a task in `task_names.COMPARED`.

    Raises:
        PeftcoreError: TRL is not installed, or this release has no such trainer.
    """
    require("trl", extra="dpo")
    import trl

    if task != task_names.ODDS:
        names = {task_names.UNPAIRED: "KTO", task_names.REWARD: "Reward", task_names.ROLLOUTS: "GRPO"}
        name = names.get(task, "DPO")
        return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL calls its package experimental
        try:
            from trl.experimental import orpo
        except ImportError as error:
            raise PeftcoreError(
                f"--task orpo needs TRL's ORPOTrainer, which TRL {trl.__version__} does not have: {error}. Use "
                "--task dpo, or another release of trl"
            ) from error
    return orpo.ORPOTrainer, orpo.ORPOConfig


def comparing_trainer(task: str, **arguments: Any) -> Measuring:
    """Return TRL's trainer of a task in `task_names.COMPARED` for encoded examples (see `comparisons`).

    The reference is the current model; no second one is loaded (`peftcore.reference_model`).
    """
    require("trl", extra="dpo")
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()  # it cannot hash methods, which matters to its cache only
    base: Any = trl_classes(task)[0]

    class MeasuringComparison(Measuring, base):
        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset  # already tokens, with the end of the answer if it is learned

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if task != task_names.ROLLOUTS:
                return Measuring._get_train_sampler(self, train_dataset)
            sampler = base._get_train_sampler(self, train_dataset)  # GRPO repeats each prompt
            # TRL's order depends on the epochs before; a resumed run has not drawn these.
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
            return sampler

        def _prepare_inputs(self, inputs: Any) -> Any:
            found = super()._prepare_inputs(inputs)
            return encoded_examples.in_dtype(found, self.model) if task == task_names.IMAGE_PREFERENCES else found

        def tokenize_row(self, row: Any, *_args: Any, **_kwargs: Any) -> Any:
            return row

    if task == task_names.UNPAIRED:
        arguments["data_collator"] = unpaired.collator(arguments["processing_class"])
        arguments["train_dataset"] = unpaired.mismatched(arguments["train_dataset"])
    if task == task_names.IMAGE_PREFERENCES:
        arguments["data_collator"] = image_preferences.collator(arguments["processing_class"])
    for name in ("train_dataset", "eval_dataset"):
        columns = {
            task_names.ODDS: odds.columns,
            task_names.REWARD: rewards.columns,
            task_names.ROLLOUTS: rollouts.columns,
        }
        if task in columns:
            arguments[name] = columns[task](arguments[name])
        arguments[name] = datasets.Dataset.from_list(arguments[name])
    if state_of(arguments["model"]) is None:  # all weights train
        return MeasuringComparison(**arguments)
    if task in (task_names.PREFERENCES, task_names.IMAGE_PREFERENCES, task_names.UNPAIRED):
        arguments["ref_model"] = reference_model(arguments["model"])
    if task != task_names.ROLLOUTS or arguments["args"].beta == 0:
        return MeasuringComparison(**arguments)
    # GRPO's trainer takes no reference: with beta=0 it does not load the base a second time.
    beta, arguments["args"].beta = arguments["args"].beta, 0.0
    trainer: Any = MeasuringComparison(**arguments)
    trainer.beta = trainer.args.beta = beta
    trainer.ref_model = reference_model(arguments["model"])
    return trainer
