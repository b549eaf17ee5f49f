"""What classification, regression and multi-label have in common: texts, or pairs of texts, with labels."""

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
    """Return the fields of a text or a pair with a label."""
    return (*((*pair, label) for pair in PAIRS), ("text", label))


class Headed(Task):
    """A base with a new head, whose outputs are labels: one answer to each example."""

    new_head = has_labels = predicts = True
    answers_texts = False
    no_chat = "is a classifier and cannot write text. Use peftcore generate"

    def figures_of(self, answers: Tensor, labels: Tensor) -> Metrics:
        """Return the figures of logits by labels: classes [n], zeros and ones [n, outputs], or numbers [n]."""
        raise NotImplementedError

    def fields_of(self, row: Row) -> dict[str, Any]:
        """Return the fields of a row in the JSON of its answer."""
        raise NotImplementedError

    def answer_of(self, scores: Tensor, wanted: Tensor, row: Row, labels: Sequence[str]) -> dict[str, Any]:
        """Return the fields of an answer.

        Args:
            scores: logits of one example.
            wanted: its labels in the batch, which mark the words of a tagger.
            row: the example.
            labels: names of the outputs.
        """
        raise NotImplementedError

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        how: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        loss, scores, wanted = 0.0, list[Tensor](), list[Tensor]()
        for labels, output in text_examples.outputs(model, examples, self, how):
            loss += float(output.loss) * len(labels)
            scores.append(output.logits.float().cpu())
            wanted.append(labels.cpu())
        return replace(self.figures_of(torch.cat(scores), torch.cat(wanted)), loss=loss / len(examples))

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Row], processor: Any, about: AdapterTask, *, answer_tokens: int
    ) -> list[dict[str, Any]]:
        encoded = self.encode(rows, processor, about.max_length, about.labels).examples
        if self.has_positions:
            positions.check(model, max(map(encoded_examples.length, encoded)))
        examples = [{**example, "place": i} for i, example in enumerate(encoded)]
        device = next(model.parameters()).device
        found: dict[int, dict[str, Any]] = {}
        with evaluating(model):
            for some in encoded_examples.batches_of(examples, 16, 1 << 14):
                batch = {name: value.to(device) for name, value in self.collate(some, processor).items()}
                inputs = encoded_examples.in_dtype(batch, model)
                wanted = inputs.pop("labels").cpu()
                logits = model(**inputs).logits.float().cpu()
                for example, scores, labels in zip(some, logits, wanted, strict=True):
                    row = rows[example["place"]]
                    answer = self.answer_of(scores, labels, row, about.labels)
                    found[example["place"]] = {**self.fields_of(row), **answer}
        return [found[i] for i in range(len(rows))]


class Labelled(Headed):
    """A base that reads a text, or a pair of texts."""

    keys = keys_with("label")
    shown_keys: ClassVar[str | None] = "text/label"
    columns_example = "text=review,label=stars"
    model_class = "AutoModelForSequenceClassification"
    takes_pairs = True

    def label_of(self, where: str, key: str, value: Any) -> Label:
        """Return the label as the file has it.

        Raises:
            PeftcoreError: it is not a label; the message begins with `where`.
        """
        raise NotImplementedError

    def any_label(self, labels: Sequence[str]) -> Label:
        """Return a label of the model, in place of the one to be predicted."""
        raise NotImplementedError

    def said(self, logits: Tensor, labels: Sequence[str]) -> str:
        """Return the answer to one text as `peftcore generate` prints it."""
        raise NotImplementedError

    def read_row(self, where: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        text, *pair = (text_of(where, key, fields[key]) for key in keys[:-1])
        label = self.label_of(where, keys[-1], fields[keys[-1]])
        return Row(where, text, label=label, pair=pair[0] if pair else None)

    def read_question(self, where: str, fields: dict[str, Any], about: AdapterTask) -> Row:
        given = given_fields(where, fields, ("text", *(key for pair in PAIRS for key in pair)), self)
        keys = next((pair for pair in PAIRS if all(key in given for key in pair)), ("text",))
        if keys[0] not in given:
            raise missing_key(where, fields, "text", self)
        text, *pair = (text_of(where, key, given[key]) for key in keys)
        return Row(where, text, label=self.any_label(about.labels), pair=pair[0] if pair else None)

    def encode(
        self,
        rows: Sequence[Row],
        processor: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Return rows as `input_ids`, of pairs also `token_type_ids`, and `labels`; texts are cut at the end.

        Raises:
            PeftcoreError: a row has no tokens, or its label is unknown.
        """
        targets = row_labels.targets(list(rows), list(labels))
        examples, truncated = [], 0
        labelled = zip(rows, targets, strict=True)
        for has_pair, group in itertools.groupby(labelled, key=lambda each: each[0].pair is not None):
            some = list(group)
            texts = [[row.text for row, _ in some], *([[row.pair or "" for row, _ in some]] if has_pair else [])]
            whole, cut = processor(*texts), processor(*texts, truncation=True, max_length=max_length)
            truncated += sum(len(tokens) > max_length for tokens in whole["input_ids"])
            names = [name for name in ("input_ids", *(["token_type_ids"] if has_pair else [])) if name in cut]
            for (row, label), *values in zip(some, *(cut[name] for name in names), strict=True):
                if not values[0]:
                    raise PeftcoreError(f"{row.where}: the text has no tokens")
                examples.append({**dict(zip(names, values, strict=True)), "labels": label})
        return Encoded(examples, truncated)

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
        """Return the most likely label of a text (and `pair`) with its probability, all above one half, or a number.

        Raises:
            PeftcoreError: the text has no tokens, or more than the model has positions for.
        """
        texts = (prompt,) if pair is None else (prompt, pair)
        inputs = processor(*texts, return_tensors="pt", truncation=True, max_length=about.max_length)
        if not inputs["input_ids"].shape[1]:
            raise PeftcoreError("the text has no tokens. Pass another one")
        positions.check(model, inputs["input_ids"].shape[1], "Pass a shorter text")
        names = ("input_ids", "attention_mask", *(["token_type_ids"] if pair is not None else []))
        inputs = {name: inputs[name].to(next(model.parameters()).device) for name in names if name in inputs}
        return self.said(model(**inputs).logits[0].float(), about.labels)


def given_fields(where: str, fields: dict[str, Any], known: Sequence[str], task: Task) -> dict[str, Any]:
    """Return the fields of a line to answer, of those that are known.

    Raises:
        PeftcoreError: it has none of them, or their value is null; the message begins with `where`.
    """
    given = {key: fields[key] for key in known if fields.get(key) is not None}
    null = next((key for key in known if key in fields), None)
    if not given and null is not None:
        raise PeftcoreError(f"{where}: '{null}' is null, and predict needs a value. Fill it in, or remove the line")
    if not given:
        raise missing_key(where, fields, known[0], task)
    return given


def missing_key(where: str, fields: dict[str, Any], key: str, task: Task) -> PeftcoreError:
    """Return the error of a line to answer without its field."""
    return PeftcoreError(
        f"{where}: predict needs the key {key} for {task.name}, found {data_files.listed(fields) or 'none'}. If it has "
        f"another name: --columns {key}=NAME"
    )
