"""Answers of a classifier, tagger or image model on new examples, as JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcore.cli import task_names
from peftcore.cli.data import audio_files, data_files, image_files, image_turns, labels, row_reading
from peftcore.cli.data.row import Row
from peftcore.cli.tasks import (
    by_task,
    encoded_examples,
    image_chats,
    positions,
    sentence_pairs,
    text_generation,
    transcripts,
)
from peftcore.cli.tasks.conversations import IGNORED
from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    from peftcore.cli.bases.adapter_folders import AdapterTask


def read_rows(paths: Sequence[str], task: AdapterTask, columns: Mapping[str, str] | None) -> list[Row]:
    """Return examples without labels: any label, tag or subfolder that is there is not read.

    Raises:
        PeftcoreError: a file is missing, empty or of another kind, or a line is wrong.
    """
    if task.task == task_names.IMAGE:
        files = [file for path in paths for file in image_files.unlabelled(path)]
        return [Row(file, "", label=task.labels[0], image=file) for file in files]
    rows = []
    for path, records in zip(paths, row_reading.records_of_each(paths, columns), strict=True):
        if task.task in task_names.MULTIMODAL:
            found = [image_turns.asked_of(where, fields, task.task) for where, fields in records]
        elif task.task == task_names.SPEECH:
            found = [_recording(where, fields) for where, fields in records]
        elif task.task == task_names.EMBEDDING:
            found = [_text_row(where, fields) for where, fields in records]
        else:
            found = [_row(where, fields, task) for where, fields in records]
        if not found:
            raise PeftcoreError(f"'{path}' has no examples")
        rows += found
    return rows


def _row(where: str, fields: dict[str, Any], task: AdapterTask) -> Row:
    """Return a row with a label that encoding accepts, in place of the one to be predicted."""
    known = (
        ("tokens", "words")
        if task.task == task_names.TAGS
        else ("text", *(key for pair in row_reading.PAIRS for key in pair))
    )
    given = {key: fields[key] for key in known if fields.get(key) is not None}
    null = next((key for key in known if key in fields), None)
    if not given and null is not None:
        raise PeftcoreError(f"{where}: '{null}' is null, and predict needs a value. Fill it in, or remove the line")
    if not given:
        raise PeftcoreError(
            f"{where}: predict needs the key {known[0]} for {task.task}, found {data_files.listed(fields) or 'none'}. "
            f"If it has another name: --columns {known[0]}=NAME"
        )
    if task.task == task_names.TAGS:
        words = labels.names(next(iter(given.values()))) or ()
        return row_reading.row_of(where, {**given, "tags": [task.labels[0]] * len(words)}, task.task)
    label: Any = 0.0 if task.task == task_names.REGRESSION else task.labels[0]
    return row_reading.row_of(
        where, {**given, "label": [label] if task.task == task_names.MULTI_LABEL else label}, task.task
    )


@torch.no_grad()
def answers(
    model: nn.Module, rows: Sequence[Row], processor: Any, task: AdapterTask, length: int
) -> list[dict[str, Any]]:
    """Return the fields of each row with its answer, in the order of `rows`."""
    encoded = by_task.encode(rows, task.task, processor, length, task.labels).examples
    if task.task != task_names.IMAGE:
        positions.check(model, max(map(encoded_examples.length, encoded)))
    examples = [{**example, "place": i} for i, example in enumerate(encoded)]
    collate = by_task.collator(processor)
    device = next(model.parameters()).device
    found: dict[int, dict[str, Any]] = {}
    for some in encoded_examples.batches_of(examples, 16, 1 << 14):
        inputs = encoded_examples.in_dtype({name: value.to(device) for name, value in collate(some).items()}, model)
        places = inputs.pop("labels")
        logits = model(**inputs).logits.float().cpu()
        for example, scores, wanted in zip(some, logits, places.cpu(), strict=True):
            row = rows[example["place"]]
            found[example["place"]] = {**_fields(row), **_answer(scores, wanted, row, task)}
    return [found[i] for i in range(len(rows))]


def _text_row(where: str, fields: dict[str, Any]) -> Row:
    if "text" not in fields:
        raise PeftcoreError(
            f"{where}: predict needs the key text for pairs, found {data_files.listed(fields) or 'none'}. If it has "
            "another name: --columns text=NAME"
        )
    return Row(where, labels.text_of(where, "text", fields["text"]))


def _recording(where: str, fields: dict[str, Any]) -> Row:
    if "audio" not in fields:
        raise PeftcoreError(
            f"{where}: predict needs the key audio for asr, found {data_files.listed(fields) or 'none'}. If it has "
            "another name: --columns audio=NAME"
        )
    return Row(where, "", audio=audio_files.named(where, "audio", fields["audio"]))


def transcripts_of(model: nn.Module, rows: Sequence[Row], processor: Any) -> list[dict[str, Any]]:
    """Return each recording with its transcript."""
    paths = [row.audio for row in rows]
    found = transcripts.transcribed(model, paths, processor, processor.longest_text)
    return [{"audio": path, "text": text} for path, text in zip(paths, found, strict=True)]


def embeddings(
    model: nn.Module, rows: Sequence[Row], tokenizer: Any, task: AdapterTask, base: str, length: int
) -> list[dict[str, Any]]:
    """Return each text with its vector, of length 1."""
    pooling = task.pooling or sentence_pairs.pooling_of(base)
    ids = tokenizer([row.text for row in rows], truncation=True, max_length=length)["input_ids"]
    empty = next((row for row, tokens in zip(rows, ids, strict=True) if not tokens), None)
    if empty is not None:
        raise PeftcoreError(f"{empty.where}: the text has no tokens")
    positions.check(model, max(map(len, ids)))
    found = sentence_pairs.embedded(model, ids, tokenizer.pad_token_id or 0, pooling)
    return [
        {"text": row.text, "embedding": [round(each, 7) for each in vector.tolist()]}
        for row, vector in zip(rows, found, strict=True)
    ]


@torch.no_grad()
def texts(model: Any, rows: Sequence[Row], processor: Any, max_new_tokens: int) -> list[dict[str, Any]]:
    """Return the images and the last turn of each conversation with the model's greedy answer."""
    tokenizer, found = processor.tokenizer, []
    device = next(model.parameters()).device
    for row in rows:
        inputs = {name: value.to(device) for name, value in image_chats.question(row, processor).items()}
        tokens = model.generate(
            **encoded_examples.in_dtype(inputs, model),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=text_generation.ends(model, tokenizer),
        )
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        asked = "".join(part.get("text", "") for part in (row.messages or [])[-1]["content"])
        found.append({"images": list(row.images), "prompt": asked, "answer": answer})
    return found


def _fields(row: Row) -> dict[str, Any]:
    if row.image is not None:
        return {"image": row.image}
    if row.words:
        return {"tokens": list(row.words)}
    return {"text": row.text} if row.pair is None else {"text": row.text, "text_pair": row.pair}


def _answer(scores: Tensor, wanted: Tensor, row: Row, task: AdapterTask) -> dict[str, Any]:
    """Return the label with its probability, the labels above one half, the number, or the tags of a row."""
    if task.task == task_names.REGRESSION:
        return {"label": round(float(scores[0]), 6)}
    if task.task == task_names.MULTI_LABEL:
        chances = dict(zip(task.labels, (round(each, 6) for each in scores.sigmoid().tolist()), strict=True))
        return {"labels": [label for label, chance in chances.items() if chance > 0.5], "probabilities": chances}
    if task.task == task_names.TAGS:
        tags = [task.labels[i] for i in scores[wanted != IGNORED].argmax(-1).tolist()]
        return {"tags": tags + [None] * (len(row.words) - len(tags))}  # words beyond the length have none
    best = int(scores.argmax())
    return {"label": task.labels[best], "probability": round(float(scores.softmax(-1)[best]), 6)}
