"""Conversations for Mistral's audio models (Voxtral), whose processor uses mistral-common.

This processor has no chat template. It converts a conversation to tokens and audio features. The tokens of the
assistant's turns are learned, including the token that ends each turn.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import io
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from peftcore.errors import PeftcoreError
from peftcore_cli.data import audio_files
from peftcore_cli.data.row import Messages, Row, naming
from peftcore_cli.tasks.conversations import IGNORE_INDEX, MISTRAL
from peftcore_cli.tasks.encoded_examples import Example

_PROCESSOR = "VoxtralProcessor"


def is_used_by(processor: Any) -> bool:
    """Return whether a processor tokenizes conversations with mistral-common."""
    return type(processor).__name__ == _PROCESSOR


def check_processor(processor: Any) -> Any:
    """Return the processor after checking it.

    Raises:
        PeftcoreError: mistral-common or soundfile is not installed, or the tokenizer is not mistral-common's.
    """
    missing_modules = [name for name in ("mistral_common", "soundfile") if importlib.util.find_spec(name) is None]
    if missing_modules:
        raise PeftcoreError(
            f"{_PROCESSOR} tokenizes conversations with mistral-common, but '{missing_modules[0]}' is not installed. "
            "Install it: pip install 'mistral-common[audio]'"
        )
    if type(processor.tokenizer).__name__ != MISTRAL:
        raise PeftcoreError(
            f"{_PROCESSOR} needs mistral-common's tokenizer, found {type(processor.tokenizer).__name__}. Copy "
            "tekken.json from the model's original folder"
        )
    return processor


def examples(row: Row, processor: Any) -> list[Example]:
    """Encode a conversation as one example, or one per turn if later turns change the tokens of earlier turns.

    Raises:
        PeftcoreError: the processor rejects the conversation, or a turn cannot be separated from the tokens before it.
    """
    messages = row.messages or []
    if row.images:
        raise PeftcoreError(f"{row.location}: {_PROCESSOR} does not support images. Use another model")
    if row.tools:
        raise PeftcoreError(
            f"{row.location}: {_PROCESSOR} does not support tools. Remove 'tools', or use another model"
        )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= row.learned_from]
    turns = [i for i in turns if i not in row.not_learned]
    turn_examples = [_turn(row, turn, processor) for turn in turns]
    last_ids = turn_examples[-1]["input_ids"] if turn_examples else []
    if any(example["input_ids"] != last_ids[: len(example["input_ids"])] for example in turn_examples):
        return turn_examples
    # Every turn is a prefix of the last one, so a single example can learn all turns.
    for example in turn_examples[:-1]:
        labels = turn_examples[-1]["labels"]
        for i, label in enumerate(example["labels"]):
            if label != IGNORE_INDEX:
                labels[i] = label
    return turn_examples[-1:]


def _turn(row: Row, turn: int, processor: Any) -> Example:
    """Encode a conversation up to and including an assistant turn, which is learned."""
    messages = row.messages or []
    if turn == 0:
        raise PeftcoreError(
            f"{row.location}: the conversation starts with an assistant turn. Start with a user or system turn"
        )
    prefix = _process(messages[:turn], row.sounds, processor, row.location)["input_ids"][0].tolist()
    ids = _process(messages[: turn + 1], row.sounds, processor, row.location)["input_ids"][0].tolist()
    ids.append(processor.tokenizer.eos_token_id)
    if ids[: len(prefix)] != prefix:
        raise PeftcoreError(
            f"{row.location}: {_PROCESSOR} rewrites earlier turns when messages[{turn}] is added, so the tokens to "
            "learn cannot be located. Remove the turn"
        )
    conversation = messages[: turn + 1]
    return {
        "messages": conversation,
        "images": [],
        "sounds": list(row.sounds[: _count_recordings(conversation)]),
        "input_ids": ids,
        "labels": [IGNORE_INDEX] * len(prefix) + ids[len(prefix) :],
    }


def _count_recordings(messages: Messages) -> int:
    """Return the number of recordings in a conversation."""
    count = 0
    for message in messages:
        content = message.get("content") or ()
        if not isinstance(content, str):
            count += sum(part.get("type") == "audio" for part in content)
    return count


def _process(messages: Messages, sounds: Sequence[str], processor: Any, location: str | None = None) -> dict[str, Any]:
    """Return the inputs of a conversation, [1, length] and [windows, bins, frames]; a final answer stays open."""
    paths, prepared_messages = iter(sounds), []
    for message in messages:
        content = message.get("content")
        if content and not isinstance(content, str):
            parts = [
                _audio_part(next(paths), processor, location) if part["type"] == "audio" else part for part in content
            ]
            is_text = all(part["type"] == "text" for part in parts)
            content = "".join(part["text"] for part in parts) if is_text else parts
        prepared_messages.append({**message, "content": content})
    is_open = messages[-1]["role"] == "assistant"
    options = {"continue_final_message": is_open, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        return dict(processor.apply_chat_template(prepared_messages, **options))
    except Exception as error:  # mistral-common raises errors of many classes, including pydantic's
        begin = f"{location}: " if location else ""
        text = " ".join(str(error).split())[:400]
        raise PeftcoreError(f"{begin}mistral-common rejects the conversation: {text}. Change the row") from error


def _audio_part(path: str, processor: Any, location: str | None) -> dict[str, Any]:
    """Return a recording as part of a message: a base64 WAV file at the model's sampling rate."""
    rate = processor.feature_extractor.sampling_rate
    with naming(location):
        samples = audio_files.samples(path, rate)
    soundfile: Any = importlib.import_module("soundfile")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def collate(examples: Sequence[Example], processor: Any) -> dict[str, Any]:
    """Return a right-padded batch with the `input_features` [windows, bins, frames] of its recordings.

    Raises:
        PeftcoreError: a recording cannot be read.
    """
    length = max(len(example["input_ids"]) for example in examples)

    def pad(sequences: Iterable[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([sequence + [value] * (length - len(sequence)) for sequence in sequences])

    ids = [example["input_ids"] for example in examples]
    batch = {
        "input_ids": pad(ids, processor.tokenizer.pad_token_id or 0),
        "labels": pad([example["labels"] for example in examples], IGNORE_INDEX),
        "attention_mask": pad([[1] * len(sequence) for sequence in ids], 0),
    }
    features = []
    for example in examples:
        if example["sounds"]:
            inputs = _process(example["messages"], example["sounds"], processor)
            features.append(inputs["input_features"])
    return {**batch, "input_features": torch.cat(features)} if features else batch


def question(row: Row, processor: Any) -> dict[str, Any]:
    """Return a conversation as model inputs to generate its next turn, [1, length].

    Raises:
        PeftcoreError: a recording cannot be read, or mistral-common rejects the conversation.
    """
    return _process(row.messages or [], row.sounds, processor, row.location)
