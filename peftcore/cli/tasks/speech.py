"""Recordings and their transcripts (`--task asr`), by models with Whisper's inputs.

Recordings are read batch by batch, so that a data set need not fit into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftcore.cli.data import audio_files
from peftcore.cli.data.row import Row, naming
from peftcore.cli.tasks.conversations import IGNORED
from peftcore.cli.tasks.encoded_examples import Example
from peftcore.errors import PeftcoreError


def check(model: str, config: Any) -> None:
    """Raise a PeftcoreError unless the model is of Whisper's kind."""
    if config.model_type != "whisper":
        raise PeftcoreError(
            f"--task asr needs a model of Whisper's kind with its feature extractor and tokenizer, found '{model}' "
            f"({config.model_type}). Use one such as openai/whisper-small"
        )


def checked(processor: Any, config: Any) -> Any:
    """Return the processor of a model, with the largest number of tokens of a transcript as `longest_text`."""
    processor.longest_text = int(config.max_target_positions)
    return processor


def set_language(processor: Any, language: str | None, generation: Any) -> None:
    """Make the tokenizer begin transcripts as the model does in `language`.

    Raises:
        PeftcoreError: the model needs a language and none is given, or does not know it.
    """
    several = getattr(generation, "is_multilingual", None) is True
    if language is None:
        if several:
            raise PeftcoreError("this model knows many languages. Pass that of the recordings: --language english")
        return
    if not several or not hasattr(processor.tokenizer, "set_prefix_tokens"):
        raise PeftcoreError(f"this model knows one language only, found --language {language}. Leave it out")
    try:
        processor.tokenizer.set_prefix_tokens(language=language, task="transcribe")
    except ValueError as error:
        raise PeftcoreError(f"--language {language} is not known: {str(error)[:300]}") from error


def encode(rows: Sequence[Row], processor: Any, max_length: int) -> list[Example]:
    """Return rows as `audio`, the path of a file, and `labels`, the tokens of the transcript.

    Raises:
        PeftcoreError: a recording cannot be read or is longer than the model reads, or a transcript is too long.
    """
    examples, longest = [], min(max_length, processor.longest_text)
    for row in rows:
        _read(processor, row.audio, row.where)
        labels = list(processor.tokenizer(str(row.text))["input_ids"])
        if len(labels) > longest:
            raise PeftcoreError(
                f"{row.where}: the transcript has {len(labels):,} tokens; at most {longest:,} fit (--max-length, and "
                "the model's limit). Split the recording"
            )
        examples.append({"audio": row.audio, "labels": labels})
    return examples


def _read(processor: Any, path: Any, where: str | None = None) -> Any:
    extractor = processor.feature_extractor
    with naming(where):
        return audio_files.samples(str(path), extractor.sampling_rate, extractor.n_samples)


def features(paths: Sequence[Any], processor: Any) -> Any:
    """Return the inputs of the model for recordings."""
    extractor = processor.feature_extractor
    arrays = [_read(processor, path) for path in paths]
    return extractor(arrays, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]


def collate(examples: Sequence[Example], processor: Any) -> dict[str, Any]:
    """Return a batch: `input_features`, and `labels` [batch, length].

    The model puts its start token before the labels, so labels that begin with it are given without it.
    """
    start = getattr(processor.tokenizer, "prefix_tokens", [None])[0]
    labels = [each["labels"][1:] if each["labels"][0] == start else each["labels"] for each in examples]
    length = max(map(len, labels))
    padded = torch.tensor([[*each, *[IGNORED] * (length - len(each))] for each in labels])
    return {"input_features": features([each["audio"] for each in examples], processor), "labels": padded}
