"""Base classes of classification, regression, multi-label and tags, which learn labels of texts or text pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError
from peftcore_cli.data import data_files
from peftcore_cli.data.labels import Label, text_of
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import encoded_examples, positions, row_labels, text_examples
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.evaluation_mode import evaluating
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Evaluation, Task

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask

PAIRS = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"))


def keys_with(label: str) -> tuple[tuple[str, ...], ...]:
    """Return the sets of fields for a text or a pair of texts with a label."""
    return (*((*pair, label) for pair in PAIRS), ("text", label))


class Headed(Task):
    """A base with a new head that predicts labels."""

    new_head = has_labels = predicts = True
    answers_texts = False
    no_chat = "is a classifier and cannot write text. Use peftcore generate"

    def figures_of(self, answers: Tensor, labels: Tensor) -> Metrics:
        """Return the metrics of logits, given labels: classes [n], zeros and ones [n, outputs], or numbers [n]."""
        raise NotImplementedError

    def fields_of(self, row: Row) -> dict[str, Any]:
        """Return the fields of a row to repeat in the JSON of its answer."""
        raise NotImplementedError

    def answer_of(self, scores: Tensor, targets: Tensor, row: Row, labels: Sequence[str]) -> dict[str, Any]:
        """Return the answer as fields of JSON.

        Args:
            scores: logits of one example.
            targets: labels of the example in the batch, which mark the words for a tagger.
            row: the example.
            labels: names of the outputs.
        """
        raise NotImplementedError

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        evaluation: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        loss, scores, targets = 0.0, list[Tensor](), list[Tensor]()
        for labels, output in text_examples.outputs(model, examples, self, evaluation):
            loss += float(output.loss) * len(labels)
            scores.append(output.logits.float().cpu())
            targets.append(labels.cpu())
        return replace(self.figures_of(torch.cat(scores), torch.cat(targets)), loss=loss / len(examples))

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Row], processor: Any, about: AdapterTask, *, answer_tokens: int
    ) -> list[dict[str, Any]]:
        encoded = self.encode(rows, processor, about.max_length, about.labels).examples
        if self.has_positions:
            positions.check(model, max(map(encoded_examples.length, encoded)))
        examples = [{**example, "place": i} for i, example in enumerate(encoded)]
        device = next(model.parameters()).device
        answers: dict[int, dict[str, Any]] = {}
        with evaluating(model):
            for batch_examples in encoded_examples.batches_of(examples, 16, 1 << 14):
                batch = {name: value.to(device) for name, value in self.collate(batch_examples, processor).items()}
                inputs = encoded_examples.in_dtype(batch, model)
                targets = inputs.pop("labels").cpu()
                logits = model(**inputs).logits.float().cpu()
                for example, scores, labels in zip(batch_examples, logits, targets, strict=True):
                    row = rows[example["place"]]
                    answer = self.answer_of(scores, labels, row, about.labels)
                    answers[example["place"]] = {**self.fields_of(row), **answer}
        return [answers[i] for i in range(len(rows))]


class Labelled(Headed):
    """A base with a new head on texts or pairs of texts."""

    keys = keys_with("label")
    shown_keys: ClassVar[str | None] = "text/label"
    columns_example = "text=review,label=stars"
    model_class = "AutoModelForSequenceClassification"
    takes_pairs = True

    def label_of(self, location: str, key: str, value: Any) -> Label:
        """Convert the value of a file to a label.

        Raises:
            PeftcoreError: the value is not a label. The message begins with `location`.
        """
        raise NotImplementedError

    def any_label(self, labels: Sequence[str]) -> Label:
        """Return any label of the model, as a placeholder for the label to predict."""
        raise NotImplementedError

    def format_answer(self, logits: Tensor, labels: Sequence[str]) -> str:
        """Format the answer to a text for `peftcore generate`."""
        raise NotImplementedError

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        text, *pair = (text_of(location, key, fields[key]) for key in keys[:-1])
        label = self.label_of(location, keys[-1], fields[keys[-1]])
        return Row(location, text, label=label, pair=pair[0] if pair else None)

    def read_question(self, location: str, fields: dict[str, Any], about: AdapterTask) -> Row:
        values = given_fields(location, fields, ("text", *(key for pair in PAIRS for key in pair)), self)
        keys = next((pair for pair in PAIRS if all(key in values for key in pair)), ("text",))
        if keys[0] not in values:
            raise missing_key(location, fields, "text", self)
        text, *pair = (text_of(location, key, values[key]) for key in keys)
        return Row(location, text, label=self.any_label(about.labels), pair=pair[0] if pair else None)

    def encode(
        self,
        rows: Sequence[Row],
        processor: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as `input_ids`, `labels` and, for pairs, `token_type_ids`. Texts are truncated at the end.

        Raises:
            PeftcoreError: a row has no tokens, or its label is unknown.
        """
        targets = row_labels.targets(list(rows), list(labels))
        examples, truncated_count = [], 0
        rows_with_targets = zip(rows, targets, strict=True)
        for has_pair, group in itertools.groupby(rows_with_targets, key=lambda pair: pair[0].pair is not None):
            batch_rows = list(group)
            texts = [
                [row.text for row, _ in batch_rows],
                *([[row.pair or "" for row, _ in batch_rows]] if has_pair else []),
            ]
            encoding = processor(*texts)
            long_count = sum(len(tokens) > max_length for tokens in encoding["input_ids"])
            if long_count:
                encoding = processor(*texts, truncation=True, max_length=max_length)
            truncated_count += long_count
            names = [name for name in ("input_ids", *(["token_type_ids"] if has_pair else [])) if name in encoding]
            for (row, label), *values in zip(batch_rows, *(encoding[name] for name in names), strict=True):
                if not values[0]:
                    raise PeftcoreError(f"{row.location}: the text has no tokens. Remove the row")
                examples.append({**dict(zip(names, values, strict=True)), "labels": label})
        return Encoded(examples, truncated_count)

    def fields_of(self, row: Row) -> dict[str, Any]:
        return {"text": row.text} if row.pair is None else {"text": row.text, "text_pair": row.pair}

    @torch.no_grad()
    def answer(
        self,
        model: PreTrainedModel,
        processor: Any,
        prompt: str,
        about: AdapterTask,
        *,
        chat: bool = False,
        pair: str | None = None,
        **sampling: Any,
    ) -> str:
        """Return the answer to a text and its `pair`: the most likely label, all likely labels, or a number.

        Raises:
            PeftcoreError: the text has no tokens, or more than the model has positions for.
        """
        texts = (prompt,) if pair is None else (prompt, pair)
        inputs = processor(*texts, return_tensors="pt", truncation=True, max_length=about.max_length)
        if not inputs["input_ids"].shape[1]:
            raise PeftcoreError("the text has no tokens. Pass another text")
        positions.check(model, inputs["input_ids"].shape[1], "Pass a shorter text")
        names = ("input_ids", "attention_mask", *(["token_type_ids"] if pair is not None else []))
        inputs = {name: inputs[name].to(next(model.parameters()).device) for name in names if name in inputs}
        return self.format_answer(model(**inputs).logits[0].float(), about.labels)


def given_fields(location: str, fields: dict[str, Any], keys: Sequence[str], task: Task) -> dict[str, Any]:
    """Return the fields with the text to classify.

    Raises:
        PeftcoreError: the line has no such field, or a null value. The message begins with `location`.
    """
    values = {key: fields[key] for key in keys if fields.get(key) is not None}
    null_key = next((key for key in keys if key in fields), None)
    if not values and null_key is not None:
        raise PeftcoreError(
            f"{location}: '{null_key}' is null, but predict needs a value. Fill in the value, or remove the line"
        )
    if not values:
        raise missing_key(location, fields, keys[0], task)
    return values


def missing_key(location: str, fields: dict[str, Any], key: str, task: Task) -> PeftcoreError:
    """Return the error for a line without the required field."""
    return PeftcoreError(
        f"{location}: predict needs the key {key} for {task.name}, found {data_files.listed(fields) or 'none'}. If the "
        f"column has another name, map it: --columns {key}=NAME"
    )
