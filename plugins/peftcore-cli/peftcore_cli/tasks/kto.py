"""Kahneman-Tversky optimization on answers marked as good or bad, without pairs (`--task kto`).

Ethayarajh et al. 2024, arXiv 2402.01306, where w is --desirable-weight or --undesirable-weight:

    loss = w (1 - sigmoid(r - k)) for a good answer, w (1 - sigmoid(k - r)) for a bad one
    r = beta (log p(answer) - log q(answer)),   k = beta max(0, mean of log p - log q over mismatched answers)

p is the model with its adapter; q is the frozen base, or the initial adapter if training continues from one. The
mismatched answer of an example is the answer of the previous example, in the batch during training, and among all
examples during evaluation. A batch with a single example, such as the last batch of an epoch, also takes it from all
examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError
from peftcore_cli.data import labels as data_labels, turns
from peftcore_cli.data.disk_list import LazySequence
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.labels import text_of
from peftcore_cli.data.row import Row
from peftcore_cli.settings import RunOptions, Settings
from peftcore_cli.tasks import preferences
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.evaluation_mode import batched, evaluating
from peftcore_cli.tasks.judged import Judged, Likelihoods
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Evaluation

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask
    from peftcore_cli.training.trainers import Measuring


class KTO(Judged):
    """Answers marked as good or bad, trained on likelihoods relative to a reference model.

    `likelihoods` are the log-likelihoods of the answers and of the mismatched answers.
    """

    name = "kto"
    keys = (("prompt", "completion", "label"),)
    shown_keys = "prompt/completion/label"
    trl_name = "KTO"
    has_reference = True
    family = "writers"
    options = ("desirable_weight", "undesirable_weight")
    least_batch = 2
    figures = ("accuracy", "margin")
    step_loss = "kto"

    def recognises(self, lines: FirstLines) -> bool:
        return lines.media is None and lines.have("prompt", "completion", "label")

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        """Return an answer that is marked as good or bad. The label is a boolean, "true" or "false", or 1 or 0."""
        marks = {"true": True, "1": True, "false": False, "0": False}
        is_good = marks.get(str(fields["label"]).strip().lower())
        if is_good is None:
            raise PeftcoreError(
                f"{location}: 'label' must be true or false, found {data_labels.short(fields['label'])}"
            )
        if not isinstance(fields["prompt"], list):
            prompt, answer = (text_of(location, key, fields[key]) for key in ("prompt", "completion"))
            if not answer.strip():
                raise PeftcoreError(f"{location}: 'completion' is empty. Remove the row, or add an answer")
            return Row(location, prompt, completion=answer, is_good=is_good)
        prompt_turns, answer_turns = (turns.messages_of(location, key, fields[key]) for key in ("prompt", "completion"))
        if [message["role"] for message in answer_turns] != ["assistant"]:
            roles = ", ".join(message["role"] for message in answer_turns)
            raise PeftcoreError(f"{location}: 'completion' must be a single assistant answer, found {roles}")
        conversation = turns.conversation(location, [*prompt_turns, *answer_turns], len(prompt_turns), fields)
        answer_turns = turns.without_marks(answer_turns)
        return Row(
            location,
            "",
            answer_turns,
            messages=turns.without_marks(prompt_turns),
            tools=conversation.tools,
            is_good=is_good,
        )

    def check_options(self, run_options: RunOptions, data: Sequence[str], *, continues: bool) -> None:
        if run_options.batch_size < self.least_batch:
            raise PeftcoreError(
                "--task kto compares the answers in a batch, so --batch-size 1 is too small. Use --batch-size 2 or more"
            )

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise a PeftcoreError unless there are both good and bad answers, because KTO learns from the difference."""
        marks = {row.is_good for row in rows}
        if len(marks) < 2:
            mark, missing_mark = ("true", "false") if True in marks else ("false", "true")
            raise PeftcoreError(
                f"{rows[0].location}: every answer has the label {mark}, but --task kto needs good and bad answers. "
                f"Add answers with the label {missing_mark}, or train on the good answers alone, as prompts and "
                "completions"
            )

    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as `prompt_ids`, `completion_ids` and `label`. Long prompts are truncated at the beginning.

        Raises:
            PeftcoreError: a row has no tokens.
        """
        examples, truncated_count = [], 0
        for row in rows:
            example = preferences.with_answer(row, row.completion, processor)
            begin = preferences.first_learned_index(example)
            answer = preferences.learned_tokens(example, begin)
            truncated_count += begin + len(answer) > max_length
            answer = answer[: max_length - 1]
            prompt = example["input_ids"][max(0, begin + len(answer) - max_length) : begin]
            if not prompt:
                raise PeftcoreError(f"{row.location}: the prompt has no tokens. Remove the row")
            examples.append({"prompt_ids": prompt, "completion_ids": answer, "label": row.is_good})
        return Encoded(examples, truncated_count)

    def as_texts(self, examples: Sequence[Example]) -> list[Example]:
        """Return the good answers as examples of a language model, for methods that initialise from data."""
        good = [example for example in examples if example["label"]] or examples
        return [preferences.join_answer(example, "completion_ids") for example in good]

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of each prompt with its answer."""
        return [len(example["prompt_ids"]) + len(example["completion_ids"]) for example in examples]

    def likelihoods(
        self, model: nn.Module, examples: Sequence[Example], processor: Any, batch_size: int = 8
    ) -> Likelihoods:
        """Return the log-likelihoods of the answers and of the mismatched answers, each [examples]."""
        pairs = MismatchedAnswers(examples)
        return [
            _log_likelihoods(
                model, [preferences.join_answer(example, name) for example in pairs], processor, batch_size
            )
            for name in ("completion_ids", "KL_completion_ids")
        ]

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        evaluation: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        weighted_examples = with_weights(examples, evaluation.about.weights)
        return super().measure(model, weighted_examples, evaluation, answers=answers, reference=reference)

    def figures_of(
        self, policy: Likelihoods, reference: Likelihoods, examples: Sequence[Example], beta: float
    ) -> Metrics:
        """Return the loss, the fraction of answers on the correct side of `k`, `k`, and the margin of good over bad."""
        rewards = beta * (policy[0] - reference[0])
        divergence = beta * (policy[1] - reference[1]).mean().clamp(min=0)
        good = torch.tensor([bool(example["label"]) for example in examples])
        distance = torch.where(good, rewards - divergence, divergence - rewards)
        figures = {"accuracy": float((distance > 0).double().mean())}
        if good.any() and not good.all():
            figures["margin"] = float(rewards[good].mean() - rewards[~good].mean())
        figures["kl"] = float(divergence)
        weights = torch.tensor([example.get("weight", 1.0) for example in examples])
        return Metrics(float((weights * (1 - distance.sigmoid())).mean()), len(examples), figures)

    def arguments(self, settings: Settings) -> tuple[Any, dict[str, Any]]:
        kind, options = super().arguments(settings)
        return kind, {**options, **{name: getattr(settings, name) for name in self.options}}

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        arguments |= {
            "data_collator": trl_collator(processor),
            "train_dataset": MismatchedAnswers(arguments["train_dataset"]),
        }
        return super().trainer(arguments, settings, processor, about)


def with_weights(examples: Sequence[Example], weights: Sequence[float] | None) -> list[Example]:
    """Return the examples with their weights, given (weight of good answers, weight of bad answers); None means 1."""
    good, bad = weights or (1.0, 1.0)
    return [{**example, "weight": good if example["label"] else bad} for example in examples]


class MismatchedAnswers(LazySequence[Example]):
    """The examples, each with the previous example's answer as `KL_completion_ids`."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def item(self, index: int) -> Example:
        """Return an example with the answer of the previous example; the first example gets the last answer."""
        return {**self.examples[index], "KL_completion_ids": self.examples[index - 1]["completion_ids"]}


def _log_likelihoods(
    model: nn.Module, examples: list[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Tensor:
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))  # to reduce padding
    values = torch.zeros(len(examples))
    with evaluating(model):
        for batch in batched(order, batch_size):
            values[batch] = preferences.log_likelihoods(model, [examples[i] for i in batch], tokenizer)
    return values


def trl_collator(tokenizer: Any) -> Any:
    """Return a collator for TRL, which takes mismatched answers from the batch.

    In a batch with a single example, the example keeps its `KL_completion_ids`.
    """
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    collate = DataCollatorForUnpairedPreference(pad_token_id=tokenizer.pad_token_id or 0)
    return lambda examples: collate(list(MismatchedAnswers(examples)) if len(examples) > 1 else examples)
