"""Answers marked as good or bad for `--task kto`: no answer needs a counterpart.

Ethayarajh et al. 2024, arXiv 2402.01306, where w is --desirable-weight or --undesirable-weight:

    loss = w (1 - sigmoid(r - k)) for a good answer, w (1 - sigmoid(k - r)) for a bad one
    r = beta (log p(answer) - log q(answer)),   k = beta max(0, mean of log p - log q over mismatched answers)

p is the model with its adapter; q is the frozen base, or the initial adapter if a run starts from one. A mismatched
answer is that of the example before, in training of the batch, in measuring of all examples. The example of a batch of
one, such as the last of an epoch, has that of the example before it among all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError
from peftcore_cli.data import labels as data_labels, turns
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
    """Answers marked as good or bad, in comparison with a reference.

    `likelihoods` are log p of the answers, and of the mismatched answers.
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

    def read_row(self, where: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        """Return an answer with the mark of whether it is good: true or false, also as text or 1 and 0."""
        marks = {"true": True, "1": True, "false": False, "0": False}
        is_good = marks.get(str(fields["label"]).strip().lower())
        if is_good is None:
            raise PeftcoreError(f"{where}: 'label' must be true or false, found {data_labels.short(fields['label'])}")
        if not isinstance(fields["prompt"], list):
            prompt, answer = (text_of(where, key, fields[key]) for key in ("prompt", "completion"))
            if not answer.strip():
                raise PeftcoreError(f"{where}: 'completion' is empty")
            return Row(where, prompt, completion=answer, is_good=is_good)
        asked, said = (turns.messages_of(where, key, fields[key]) for key in ("prompt", "completion"))
        if [message["role"] for message in said] != ["assistant"]:
            found = ", ".join(message["role"] for message in said)
            raise PeftcoreError(f"{where}: 'completion' must be one assistant answer, found {found}")
        whole = turns.conversation(where, [*asked, *said], len(asked), fields)
        said = turns.without_marks(said)
        return Row(where, "", said, messages=turns.without_marks(asked), tools=whole.tools, is_good=is_good)

    def check_options(self, given: RunOptions, data: Sequence[str], *, continues: bool) -> None:
        if given.batch_size < self.least_batch:
            raise PeftcoreError(
                "--task kto compares the answers of a batch, found --batch-size 1. Use --batch-size 2 or more"
            )

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise a PeftcoreError unless there are good and bad answers: KTO learns from the difference."""
        marks = {row.is_good for row in rows}
        if len(marks) < 2:
            mark, other = ("true", "false") if True in marks else ("false", "true")
            raise PeftcoreError(
                f"{rows[0].where}: every answer has the label {mark}, and --task kto needs both. Add answers with "
                f"{other}, or train on the good answers alone, as prompts and completions"
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
        """Return rows as `prompt_ids`, `completion_ids` and `label`; long prompts are cut at the beginning.

        Raises:
            PeftcoreError: a row has no tokens.
        """
        examples, truncated = [], 0
        for row in rows:
            example = preferences.answered(row, row.completion, processor)
            begin = preferences.first_learned(example)
            answer = preferences.learned(example, begin)
            truncated += begin + len(answer) > max_length
            answer = answer[: max_length - 1]
            prompt = example["input_ids"][max(0, begin + len(answer) - max_length) : begin]
            if not prompt:
                raise PeftcoreError(f"{row.where}: the prompt has no tokens")
            examples.append({"prompt_ids": prompt, "completion_ids": answer, "label": row.is_good})
        return Encoded(examples, truncated)

    def as_texts(self, examples: Sequence[Example]) -> list[Example]:
        """Return the good answers as examples of a language model, for methods that initialise from data."""
        good = [each for each in examples if each["label"]] or examples
        return [preferences.joined(each, "completion_ids") for each in good]

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of each prompt with its answer."""
        return [len(each["prompt_ids"]) + len(each["completion_ids"]) for each in examples]

    def likelihoods(
        self, model: nn.Module, examples: Sequence[Example], processor: Any, batch_size: int = 8
    ) -> Likelihoods:
        """Return the log-likelihoods of the answers and of the mismatched answers, each [examples]."""
        pairs = mismatched(examples)
        return [
            _log_likelihoods(model, [preferences.joined(each, name) for each in pairs], processor, batch_size)
            for name in ("completion_ids", "KL_completion_ids")
        ]

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        how: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        some = weighted(examples, how.about.weights)
        return super().measure(model, some, how, answers=answers, reference=reference)

    def figures_of(self, after: Likelihoods, before: Likelihoods, examples: Sequence[Example], beta: float) -> Metrics:
        """Return the loss, the share of answers on the right side of `k`, and `k`; of both marks the mean margin."""
        rewards = beta * (after[0] - before[0])
        divergence = beta * (after[1] - before[1]).mean().clamp(min=0)
        good = torch.tensor([bool(each["label"]) for each in examples])
        distance = torch.where(good, rewards - divergence, divergence - rewards)
        named = {"accuracy": float((distance > 0).double().mean())}
        if good.any() and not good.all():
            named["margin"] = float(rewards[good].mean() - rewards[~good].mean())
        named["kl"] = float(divergence)
        weights = torch.tensor([each.get("weight", 1.0) for each in examples])
        return Metrics(float((weights * (1 - distance.sigmoid())).mean()), len(examples), named)

    def arguments(self, settings: Settings) -> tuple[Any, dict[str, Any]]:
        kind, more = super().arguments(settings)
        return kind, {**more, **{name: getattr(settings, name) for name in self.options}}

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        arguments |= {"data_collator": trl_collator(processor), "train_dataset": mismatched(arguments["train_dataset"])}
        return super().trainer(arguments, settings, processor, about)


def weighted(examples: Sequence[Example], weights: Sequence[float] | None) -> list[Example]:
    """Return the examples with their weights, of which the first is that of good answers; None for 1."""
    good, bad = weights or (1.0, 1.0)
    return [{**each, "weight": good if each["label"] else bad} for each in examples]


def mismatched(examples: Sequence[Example]) -> list[Example]:
    """Return the examples, each with the answer of the one before as `KL_completion_ids`."""
    before = [examples[-1], *examples[:-1]]
    pairs = zip(examples, before, strict=True)
    return [{**each, "KL_completion_ids": other["completion_ids"]} for each, other in pairs]


def _log_likelihoods(
    model: nn.Module, examples: list[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Tensor:
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))  # little padding
    found = torch.zeros(len(examples))
    with evaluating(model):
        for some in batched(order, batch_size):
            found[some] = preferences.log_likelihoods(model, [examples[i] for i in some], tokenizer)
    return found


def trl_collator(tokenizer: Any) -> Any:
    """Return TRL's collator, after each example has the answer of the one before it in the batch.

    The example of a batch of one keeps its own `KL_completion_ids`.
    """
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    collate = DataCollatorForUnpairedPreference(pad_token_id=tokenizer.pad_token_id or 0)
    return lambda examples: collate(mismatched(examples) if len(examples) > 1 else examples)
