"""Conversations as the processors of Mistral's models with audio (Voxtral) prepare them, by mistral-common.

Such a processor has no chat template: it makes tokens, and the audio that belongs to them, of a conversation. What an
assistant's turn adds to the tokens before it is learned, with the token that ends the turn.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

import torch

from peftcore.errors import PeftcoreError
from peftcore_cli.data import audio_files
from peftcore_cli.data.row import Messages, Row, naming
from peftcore_cli.tasks.conversations import IGNORED, MISTRAL
from peftcore_cli.tasks.encoded_examples import Example

_PROCESSOR = "VoxtralProcessor"


def prepares(processor: Any) -> bool:
    """Return whether a processor makes tokens of conversations by mistral-common."""
    return type(processor).__name__ == _PROCESSOR


def checked(processor: Any) -> Any:
    """Return the processor.

    Raises:
        PeftcoreError: mistral-common or soundfile is not installed, or the tokenizer is another.
    """
    missing = [name for name in ("mistral_common", "soundfile") if importlib.util.find_spec(name) is None]
    if missing:
        raise PeftcoreError(
            f"{_PROCESSOR} makes tokens of conversations by mistral-common, and '{missing[0]}' is not installed. "
            "Install both: pip install 'mistral-common[audio]'"
        )
    if type(processor.tokenizer).__name__ != MISTRAL:
        raise PeftcoreError(
            f"{_PROCESSOR} has a {type(processor.tokenizer).__name__}, not mistral-common's tokenizer. Copy "
            "tekken.json from the model's original folder"
        )
    return processor


def examples(row: Row, processor: Any) -> list[Example]:
    """Return a conversation as an example, or one for each turn if later turns change the tokens of earlier ones.

    Raises:
        PeftcoreError: the processor rejects it, or turns cannot be separated from what came before.
    """
    messages = row.messages or []
    if row.images:
        raise PeftcoreError(f"{row.where}: {_PROCESSOR} takes no images. Use another model")
    if row.tools:
        raise PeftcoreError(f"{row.where}: {_PROCESSOR} does not write the tools. Remove 'tools', or use another model")
    turns = [i for i, each in enumerate(messages) if each["role"] == "assistant" and i >= row.learned_from]
    turns = [i for i in turns if i not in row.not_learned]
    found = [_turn(row, turn, processor) for turn in turns]
    whole = found[-1]["input_ids"] if found else []
    if any(each["input_ids"] != whole[: len(each["input_ids"])] for each in found):
        return found
    for each in found[:-1]:
        learned = found[-1]["labels"]
        learned[: len(each["labels"])] = [
            new if old == IGNORED else old for old, new in zip(each["labels"], learned, strict=False)
        ]
    return found[-1:]


def _turn(row: Row, turn: int, processor: Any) -> Example:
    """Return the conversation up to an assistant's turn, which is learned."""
    messages = row.messages or []
    if turn == 0:
        raise PeftcoreError(
            f"{row.where}: the first turn is the assistant's. Start with a turn of the user or the system"
        )
    before = _prepared(messages[:turn], row.sounds, processor, row.where)["input_ids"][0].tolist()
    after = _prepared(messages[: turn + 1], row.sounds, processor, row.where)["input_ids"][0].tolist()
    after.append(processor.tokenizer.eos_token_id)
    if after[: len(before)] != before:
        raise PeftcoreError(
            f"{row.where}: {_PROCESSOR} changes what came before messages[{turn}] when that turn follows, so the "
            "learned part cannot be determined. Remove the turn"
        )
    shown = messages[: turn + 1]
    return {
        "messages": shown,
        "images": [],
        "sounds": list(row.sounds[: _count(shown)]),
        "input_ids": after,
        "labels": [IGNORED] * len(before) + after[len(before) :],
    }


def _count(messages: Messages) -> int:
    """Return the number of recordings in a conversation."""
    parts = [message.get("content") or () for message in messages]
    return sum(part.get("type") == "audio" for each in parts if not isinstance(each, str) for part in each)


def _prepared(messages: Messages, sounds: Sequence[str], processor: Any, where: str | None = None) -> dict[str, Any]:
    """Return the inputs of one conversation, [1, length] and [windows, bins, frames]; an answer at its end is open."""
    paths, written = iter(sounds), []
    for message in messages:
        content = message.get("content")
        if content and not isinstance(content, str):
            parts = [_sound(next(paths), processor, where) if part["type"] == "audio" else part for part in content]
            is_text = all(part["type"] == "text" for part in parts)
            content = "".join(part["text"] for part in parts) if is_text else parts
        written.append({**message, "content": content})
    is_open = messages[-1]["role"] == "assistant"
    options = {"continue_final_message": is_open, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        return dict(processor.apply_chat_template(written, **options))
    except Exception as error:  # mistral-common's errors are of many classes, pydantic's among them
        begin = f"{where}: " if where else ""
        text = " ".join(str(error).split())[:400]
        raise PeftcoreError(f"{begin}mistral-common rejects the conversation: {text}. Change the row") from error


def _sound(path: str, processor: Any, where: str | None) -> dict[str, Any]:
    """Return a recording as a part of a message: a WAV file of the model's rate in base64."""
    rate = processor.feature_extractor.sampling_rate
    with naming(where):
        found = audio_files.samples(path, rate)
    soundfile: Any = importlib.import_module("soundfile")
    file = io.BytesIO()
    soundfile.write(file, found, rate, format="WAV", subtype="FLOAT")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def collate(examples: Sequence[Example], processor: Any) -> dict[str, Any]:
    """Return a batch, padded on the right: `input_features` [windows, bins, frames] of its recordings in order.

    Raises:
        PeftcoreError: a recording cannot be read any more.
    """
    length = max(len(example["input_ids"]) for example in examples)
    padding = processor.tokenizer.pad_token_id or 0
    ends = {"input_ids": padding, "labels": IGNORED, "attention_mask": 0}
    rows = [{**example, "attention_mask": [1] * len(example["input_ids"])} for example in examples]
    batch = {key: torch.tensor([e[key] + [end] * (length - len(e[key])) for e in rows]) for key, end in ends.items()}
    heard = [_prepared(e["messages"], e["sounds"], processor)["input_features"] for e in examples if e["sounds"]]
    return {**batch, "input_features": torch.cat(heard)} if heard else batch


def question(row: Row, processor: Any) -> dict[str, Any]:
    """Return a conversation as the inputs of a model that writes its next turn, [1, length].

    Raises:
        PeftcoreError: a recording cannot be read, or mistral-common rejects the conversation.
    """
    return _prepared(row.messages or [], row.sounds, processor, row.where)
