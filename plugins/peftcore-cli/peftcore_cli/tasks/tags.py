"""Token classification: a tag per word, such as named entities or parts of speech (`--task tags`).

The tag of a word is learned, predicted and measured at the word's first token. Entities are marked by `B-X` and `I-X`,
optionally with `E-X` (last word of an entity) and `S-X` (entity with one word). They are counted as in conlleval (Tjong
Kim Sang and Buchholz 2000) and seqeval: an entity is correct if its type, beginning and end are correct, and `I-X`
after another type or `O` starts an entity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcore.errors import PeftcoreError, nearest
from peftcore_cli.data import labels as data_labels
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.row import Row, naming
from peftcore_cli.data.row_reading import row_of
from peftcore_cli.tasks import metrics, positions, text_examples
from peftcore_cli.tasks.classification import names_of
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.labelled import Headed, given_fields
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Evaluation

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask

_MARKS = ("B-", "I-", "E-", "S-")


class Tags(Headed):
    """A base with a new head that classifies every token."""

    name = "tags"
    keys = (("tokens", "tags"), ("tokens", "ner_tags"), ("words", "tags"))
    shown_keys = "tokens/tags"
    columns_example = "tokens=words"
    model_class = "AutoModelForTokenClassification"
    divides_by_tokens = False
    figures = ("accuracy", "macro_f1", "entity_f1")

    def recognises(self, lines: FirstLines) -> bool:
        return lines.media is None and any(lines.have(*keys) for keys in self.keys)

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        words, tags = tagged_words(location, (keys[0], keys[1]), *(fields[key] for key in keys))
        return Row(location, " ".join(words), label=tags, words=words)

    def read_question(self, location: str, fields: dict[str, Any], about: AdapterTask) -> Row:
        values = given_fields(location, fields, ("tokens", "words"), self)
        words = data_labels.names(next(iter(values.values()))) or ()
        row = row_of(location, {**values, "tags": ["O"] * len(words)}, self)
        return replace(row, label=(about.labels[0],) * len(words))  # placeholder tags, which are predicted

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        return names_of(labels)

    def encode(
        self,
        rows: Sequence[Row],
        processor: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as `input_ids` and `labels`. Words beyond `max_length` tokens are dropped.

        Raises:
            PeftcoreError: a tag is unknown, or the tokenizer cannot map tokens to words.
        """
        index = {label: i for i, label in enumerate(labels)}
        examples, truncated_count = [], 0
        for row in rows:
            tags = row.label if isinstance(row.label, tuple) else ()
            unknown = next((tag for tag in tags if tag not in index), None)
            if unknown is not None:
                raise PeftcoreError(
                    f"{row.location}: unknown tag '{unknown}'{nearest(unknown, labels)}. The model's tags are "
                    f"{', '.join(labels)}. Correct the tag, or train with examples of it"
                )
            with naming(row.location):
                ids, firsts = tokens_of(row.words, processor, max_length)
            truncated_count += len(firsts) < len(row.words)
            targets = [IGNORE_INDEX] * len(ids)
            for place, tag in zip(firsts, tags, strict=False):
                targets[place] = index[tag]
            if not firsts:
                raise PeftcoreError(
                    f"{row.location}: no word fits into --max-length {max_length}. Increase --max-length"
                )
            examples.append({"input_ids": ids, "labels": targets})
        return Encoded(examples, truncated_count)

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        evaluation: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        loss, answers_by_sentence, tags_by_sentence = 0.0, list[Tensor](), list[Tensor]()
        for labels, output in text_examples.outputs(model, examples, self, evaluation):
            loss += float(output.loss) * int((labels != IGNORE_INDEX).sum())
            for predictions, target in zip(output.logits.argmax(-1).cpu(), labels.cpu(), strict=True):
                answers_by_sentence.append(predictions[target != IGNORE_INDEX])
                tags_by_sentence.append(target[target != IGNORE_INDEX])
        return replace(
            figures(answers_by_sentence, tags_by_sentence, evaluation.about.labels),
            loss=loss / sum(map(len, tags_by_sentence)),
        )

    def fields_of(self, row: Row) -> dict[str, Any]:
        return {"tokens": list(row.words)}

    def answer_of(self, scores: Tensor, targets: Tensor, row: Row, labels: Sequence[str]) -> dict[str, Any]:
        tags = [labels[i] for i in scores[targets != IGNORE_INDEX].argmax(-1).tolist()]
        return {"tags": tags + [None] * (len(row.words) - len(tags))}  # words beyond the length have no tag

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
        """Return the words of a text, each followed by its most likely tag: `word/TAG`.

        Raises:
            PeftcoreError: the text has no words, or more tokens than the model has positions for.
        """
        words = prompt.split()
        ids, firsts = tokens_of(words, processor, about.max_length)
        if not firsts:
            raise PeftcoreError("the text has no words. Pass another text")
        positions.check(model, len(ids), "Pass a shorter text")
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        tags = model(input_ids=inputs).logits[0].argmax(-1).tolist()
        return " ".join(f"{word}/{about.labels[tags[place]]}" for word, place in zip(words, firsts, strict=False))


def tagged_words(
    location: str, keys: tuple[str, str], words: Any, tags: Any
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (words, tags) of a row.

    Raises:
        PeftcoreError: the fields are not lists of the same length, or a tag is NaN. The message begins with `location`.
    """
    lists: list[tuple[str, ...]] = []
    for key, value in zip(keys, (words, tags), strict=True):
        names = data_labels.names(value)
        if not names or any(len(name.split()) != 1 for name in names):
            raise PeftcoreError(
                f"{location}: '{key}' must be a list of words without spaces, found {data_labels.short(value)}"
            )
        lists.append(tuple(names))
    word_list, tag_list = lists
    if len(word_list) != len(tag_list):
        raise PeftcoreError(
            f"{location}: '{keys[0]}' has {len(word_list)} words, but '{keys[1]}' has {len(tag_list)} tags. Pass one "
            "tag per word"
        )
    return word_list, tuple(data_labels.class_name(location, keys[1], tag) for tag in tag_list)


def tokens_of(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], list[int]]:
    """Return (tokens, index of the first token of each word) for the words that fit.

    Raises:
        PeftcoreError: the tokenizer has no offsets, or no token starts at a word.
    """
    if not tokenizer.is_fast:
        raise PeftcoreError(
            f"--task tags needs a fast tokenizer, which maps tokens to characters, found "
            f"{type(tokenizer).__name__}. Use a model with a tokenizer.json"
        )
    text = " ".join(words)
    encoding = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    token_at: dict[int, int] = {}  # {index of the first character: token}
    for i, (begin, end) in enumerate(encoding["offset_mapping"]):
        begin += len(text[begin:end]) - len(text[begin:end].lstrip())
        if begin < end:
            token_at.setdefault(begin, i)
    last_end = max((end for _, end in encoding["offset_mapping"]), default=0)
    firsts, begin = [], 0
    for word in words:
        if begin >= last_end:
            break
        if begin not in token_at:
            raise PeftcoreError(f"no token starts at the start of the word '{word}'. Join it to the word before")
        firsts.append(token_at[begin])
        begin += len(word) + 1
    return list(encoding["input_ids"]), firsts


def figures(answers: Sequence[Tensor], tags: Sequence[Tensor], names: Sequence[str]) -> Metrics:
    """Return accuracy and macro F1 over words, and the F1 of entities if tags mark entities, with a loss of zero.

    Args:
        answers: predicted tags, per sentence.
        tags: true tags, per sentence.
        names: names of the tags.
    """
    word_metrics = metrics.of_classes(torch.cat(list(answers)), torch.cat(list(tags)), len(names))
    if not any(name.startswith(("B-", "I-")) for name in names):
        return word_metrics
    return replace(word_metrics, figures={**word_metrics.figures, "entity_f1": entity_f1(answers, tags, names)})


def entity_f1(answers: Sequence[Tensor], targets: Sequence[Tensor], names: Sequence[str]) -> float:
    """Return the F1 of entities over all sentences, given the indices of tags in each."""
    correct = count = 0
    for predicted_tags, true_tags in zip(answers, targets, strict=True):
        predicted_entities = set(entities([names[i] for i in predicted_tags.tolist()]))
        true = set(entities([names[i] for i in true_tags.tolist()]))
        correct += len(predicted_entities & true)
        count += len(predicted_entities) + len(true)
    return 2 * correct / count if count else 0.0


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (type, begin, end) of each entity."""
    kind: str | None = None
    begin, previous_mark = 0, "O"
    for i, tag in enumerate([*tags, "O"]):
        mark, _, type_ = tag.partition("-") if tag[:2] in _MARKS else ("O", "", "")
        if kind is not None and (mark in "BSO" or previous_mark in "ES" or type_ != kind):
            yield kind, begin, i
            kind = None
        if mark != "O" and kind is None:
            kind, begin = type_, i
        previous_mark = mark
