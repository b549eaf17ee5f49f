"""Read conversations with images or audio, in the formats of common data sets.

An image can be a part of a turn's content: `{"type": "image", "path": FILE}`, also with the key `image` or `url`, or
OpenAI's `{"type": "image_url", "image_url": {"url": FILE}}`. Or the row lists its images, `{"images": [FILE, ...],
"messages": ...}` (also `image`), and turns have `{"type": "image"}` or the text `<image>` in the place of each image.
Audio, for `--task audio-text` only, works the same way with `audio`, `audios` and `<audio>`. Paths are relative to the
folder of the data file.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from peftcore.errors import PeftcoreError
from peftcore_cli.data import audio_files, labels, turns
from peftcore_cli.data.row import Messages, Row

IMAGE_MARK, AUDIO_MARK = "<image>", "<audio>"  # placeholders in the text of rows that list their images or audio
IMAGE_PART, AUDIO_PART = {"type": "image"}, {"type": "audio"}  # content parts that chat templates take
_SOURCES = ("path", "image", "audio", "url", "image_url", "audio_url")


def has_images(fields: Mapping[str, Any]) -> bool:
    """Return whether a row is a conversation with images."""
    messages = fields.get("messages") or fields.get("conversations") or fields.get("prompt") or fields.get("chosen")
    has_files = bool(_files_of(fields))
    if not isinstance(messages, list):
        return has_files and {"chosen", "rejected"} <= fields.keys()
    return has_files or bool(_part_types(messages) & {"image", "image_url"}) or has_audio(fields)


def has_audio(fields: Mapping[str, Any]) -> bool:
    """Return whether a row is a conversation with audio."""
    messages = next((fields[key] for key in ("messages", "conversations", "prompt") if fields.get(key)), None)
    if not isinstance(messages, list):
        return False
    return bool(_files_of(fields, "audio")) or bool(_part_types(messages) & {"audio", "audio_url"})


def _part_types(messages: list[Any]) -> set[Any]:
    """Return the types of all content parts in messages, which are not validated yet."""
    types: set[Any] = set()
    for message in messages:
        if isinstance(message, dict):
            types.update(str(part.get("type")) for part in _parts(message.get("content")))
    return types


def row_of(location: str, fields: dict[str, Any], *, hears: bool = False) -> Row:
    """Return a conversation with the content parts that chat templates take, and the paths of its images and audio.

    Args:
        location: file and line, for messages.
        fields: fields of the line.
        hears: whether the model takes audio.

    Raises:
        PeftcoreError: the fields are not lists of messages, or an image is missing or not a local file. The message
            begins with `location`.
    """
    reader = _MediaReader(location, _files_of(fields), _files_of(fields, "audio") if hears else None)
    row = _conversation_of(location, fields, reader)
    reader.check_all_used()
    for i, message in enumerate(row.messages or []):
        content = message.get("content") or ()  # tool calls may have no content
        if message["role"] == "assistant" and (IMAGE_PART in content or AUDIO_PART in content):
            raise PeftcoreError(
                f"{location}: messages[{i}] is an assistant turn with an image or audio, but models only generate "
                "text. Remove the row"
            )
    return replace(row, images=tuple(reader.paths), sounds=tuple(reader.sounds))


def _conversation_of(location: str, fields: dict[str, Any], reader: _MediaReader) -> Row:
    """Return the conversation in `prompt` and `completion`, `messages`, or `conversations`, without paths of media."""
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
        prompt = reader.with_placeholders("prompt", fields["prompt"])
        completion = reader.with_placeholders("completion", fields["completion"])
        return turns.conversation(location, [*prompt, *completion], len(prompt), fields)
    if fields.get("messages") is not None:
        messages = reader.with_placeholders("messages", fields["messages"])
        return turns.conversation(location, messages, 0, fields)
    if fields.get("conversations") is not None:
        messages = turns.messages_of_sharegpt(location, fields["conversations"])
        return turns.conversation(location, reader.with_placeholders("conversations", messages), 0, fields)
    key = next(key for key in ("messages", "conversations", "prompt") if key in fields)
    requirement = "'prompt' and 'completion' must be lists" if key == "prompt" else f"'{key}' must be a list"
    raise PeftcoreError(f"{location}: {requirement} of messages, found {labels.short(fields[key])}")


def preference(location: str, fields: dict[str, Any]) -> Row:
    """Return a conversation with images and two answers. An answer is a text, a message or a list with one message.

    If the prompt is text without `<image>`, the images precede the text.

    Raises:
        PeftcoreError: an image is missing, or an answer is not a single assistant turn. The message begins with
            `location`.
    """
    answers = {key: _turns(location, key, fields[key], "assistant") for key in ("chosen", "rejected")}
    key = next((key for key in ("prompt", "conversations") if fields.get(key) is not None), None)
    if key is None:
        prompt, answers = _split_common_prompt(answers)
    else:
        prompt = _turns(location, key, fields[key], "user")
    image_files = _files_of(fields)
    prompt_text = fields.get(key or "")
    if isinstance(prompt_text, str) and image_files and IMAGE_MARK not in prompt_text:
        images = [dict(IMAGE_PART) for _ in image_files]
        prompt = [{"role": "user", "content": [*images, *_parts(prompt_text)]}]
    reader = _MediaReader(location, image_files)
    prompt = reader.with_placeholders(key or "chosen", prompt)
    reader.check_all_used()
    chosen, rejected = (_answer_turn(location, name, answer) for name, answer in answers.items())
    if chosen == rejected:
        raise PeftcoreError(f"{location}: 'chosen' and 'rejected' are the same answer. Remove the row")
    for answer in (chosen, rejected):
        conversation = turns.conversation(location, [*prompt, *answer], len(prompt), fields)
    return Row(
        location,
        "",
        turns.without_marks(chosen),
        turns.without_marks(rejected),
        messages=turns.without_marks(prompt),
        tools=conversation.tools,
        images=tuple(reader.paths),
    )


def _split_common_prompt(conversations: dict[str, Messages]) -> tuple[Messages, dict[str, Messages]]:
    """Split two whole conversations into the turns that they start with in common, and the remaining turns of each."""
    pairs = zip(conversations["chosen"], conversations["rejected"], strict=False)
    prompt = [turn for turn, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return prompt, {name: messages[len(prompt) :] for name, messages in conversations.items()}


def _answer_turn(location: str, name: str, answer: Messages) -> Messages:
    """Return the answer `name` with its content in parts.

    Raises:
        PeftcoreError: the answer is not a single assistant turn, or has an image.
    """
    messages = _MediaReader(location, []).with_placeholders(name, answer)
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise PeftcoreError(
            f"{location}: '{name}' must be a single assistant answer to the prompt, found {', '.join(roles)}"
        )
    return messages


def _turns(location: str, key: str, value: Any, role: str) -> list[dict[str, Any]]:
    """Convert a text, a message or a list of messages, also in ShareGPT's format, to messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list) and any(isinstance(turn, dict) and "from" in turn for turn in value):
        return turns.messages_of_sharegpt(location, value)
    return turns.messages_of(location, key, value, has_images=True)


def row_to_answer(location: str, fields: dict[str, Any], task: str, *, hears: bool = False) -> Row:
    """Return a conversation to answer, without its existing answer.

    Args:
        location: file and line, for messages.
        fields: fields of the line.
        task: name of the task, for messages.
        hears: whether the model takes audio.

    Raises:
        PeftcoreError: the conversation has no turn to answer, or an image is missing. The message begins with
            `location`.
    """
    key = next((key for key in ("messages", "conversations", "prompt") if isinstance(fields.get(key), list)), None)
    if key is None:
        raise PeftcoreError(f"{location}: predict needs the key 'messages' for {task}, found {', '.join(fields)}")
    messages_to_answer = turns.messages_of_sharegpt(location, fields[key]) if key == "conversations" else fields[key]
    reader = _MediaReader(location, _files_of(fields), _files_of(fields, "audio") if hears else None)
    prompt = reader.with_placeholders(key, _without_answer(messages_to_answer))
    reader.check_all_used()
    return Row(
        location, "", messages=turns.without_marks(prompt), images=tuple(reader.paths), sounds=tuple(reader.sounds)
    )


def _without_answer(messages: Any) -> Any:
    """Remove assistant turns at the end of `messages`, which may be anything that a file contains."""
    if not isinstance(messages, list):
        return messages
    end = len(messages)
    while end and isinstance(messages[end - 1], dict) and messages[end - 1].get("role") == "assistant":
        end -= 1
    return messages[:end]


class _MediaReader:
    """Collects the images and audio of a row from its messages; `audio_files` is None for models without audio."""

    def __init__(self, location: str, image_files: list[Any], audio_files_of_row: list[Any] | None = None) -> None:
        self.location, self.image_files, self.paths = location, image_files, list[str]()
        self.audio_files, self.sounds = audio_files_of_row, list[str]()

    def with_placeholders(self, key: str, turn_list: Any) -> list[dict[str, Any]]:
        """Return the messages with content in parts, and a placeholder part for each image and recording."""
        messages = turns.messages_of(self.location, key, turn_list, has_images=True)
        for index, message in enumerate(messages):
            if "content" in message:
                content: list[dict[str, Any]] = []
                for part in _parts(message["content"]):
                    content += self._replace_media(f"{key}[{index}]", part)
                message["content"] = content
        return messages

    def _replace_media(self, place: str, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the parts that replace a content part, and collect its images and recordings."""
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            yield from self._split_at_marks(place, part["text"])
        elif kind in ("image", "image_url"):
            self._add_image(place, _source_of(part))
            yield dict(IMAGE_PART)
        elif kind in ("audio", "audio_url") and self.audio_files is not None:
            self._add_audio(place, _source_of(part))
            yield dict(AUDIO_PART)
        else:
            supported_kinds = "text or image" if self.audio_files is None else "text, image or audio"
            hint = ". Use --task audio-text for audio" if kind in ("audio", "audio_url") else ""
            raise PeftcoreError(
                f"{self.location}: the parts of {place} must be {supported_kinds}, found {labels.short(part)}{hint}"
            )

    def _split_at_marks(self, place: str, text: str) -> Iterator[dict[str, Any]]:
        """Yield the pieces of a text, with a placeholder part for each mark of a listed image or recording."""
        marks = []
        if self.image_files:
            marks.append(IMAGE_MARK)
        if self.audio_files:
            marks.append(AUDIO_MARK)
        # The parentheses keep the marks in the result of `re.split`.
        for piece in re.split(f"({'|'.join(marks)})", text) if marks else [text]:
            if piece == IMAGE_MARK and self.image_files:
                self._add_image(place, None)
                yield dict(IMAGE_PART)
            elif piece == AUDIO_MARK and self.audio_files:
                self._add_audio(place, None)
                yield dict(AUDIO_PART)
            elif piece:
                yield {"type": "text", "text": piece}

    def _add_audio(self, place: str, source: Any) -> None:
        if source is None:
            if len(self.sounds) >= len(self.audio_files or ()):
                raise PeftcoreError(
                    f"{self.location}: {place} refers to recording {len(self.sounds) + 1}, but the row lists "
                    f'{len(self.audio_files or ())}. Pass the recording as {{"type": "audio", "path": FILE}} or in '
                    '"audios": [...]'
                )
            source = (self.audio_files or [])[len(self.sounds)]
        self.sounds.append(audio_files.path_of(self.location, place, source))

    def _add_image(self, place: str, source: Any) -> None:
        if source is None:
            if len(self.paths) >= len(self.image_files):
                raise PeftcoreError(
                    f"{self.location}: {place} refers to image {len(self.paths) + 1}, but the row lists "
                    f'{len(self.image_files)}. Pass the image as {{"type": "image", "path": FILE}} or in "images": '
                    "[FILE, ...]"
                )
            source = self.image_files[len(self.paths)]
        self.paths.append(self._image_path(place, source))

    def _image_path(self, place: str, source: Any) -> str:
        if not isinstance(source, str):
            raise PeftcoreError(
                f"{self.location}: the image in {place} must be the path of a file, found {type(source).__name__}. "
                "Save the image to a file and pass its path"
            )
        if source.startswith(("http://", "https://", "data:")):
            raise PeftcoreError(
                f"{self.location}: the image '{source[:60]}' in {place} is not a local file. Download the image and "
                "pass its path"
            )
        folder = os.path.dirname(self.location.rpartition(":")[0])
        path = os.path.join(folder, os.path.expanduser(source.removeprefix("file://")))
        if not os.path.isfile(path):
            raise PeftcoreError(
                f"{self.location}: the image '{path}' does not exist. Pass a path relative to the folder of the data "
                "file"
            )
        return path

    def check_all_used(self) -> None:
        if self.image_files and len(self.paths) != len(self.image_files):
            raise PeftcoreError(
                f"{self.location}: the row lists {len(self.image_files)} images, but its turns refer to "
                f'{len(self.paths)}. Mark the place of each image with {{"type": "image"}} or the text {IMAGE_MARK}'
            )
        if self.audio_files and len(self.sounds) != len(self.audio_files):
            raise PeftcoreError(
                f"{self.location}: the row lists {len(self.audio_files)} recordings, but its turns refer to "
                f'{len(self.sounds)}. Mark the place of each recording with {{"type": "audio"}} or the text '
                f"{AUDIO_MARK}"
            )


def _source_of(part: dict[str, Any]) -> Any:
    """Return the image or recording of a content part: a path, the path in OpenAI's {"url": PATH}, or None."""
    source = next((part[name] for name in _SOURCES if part.get(name) is not None), None)
    return source.get("url", source) if isinstance(source, dict) else source


def _parts(content: Any) -> list[dict[str, Any]]:
    """Return content as a list of parts. Text becomes a single part."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part if isinstance(part, dict) else {"type": type(part).__name__} for part in content or ()]


def _files_of(fields: Mapping[str, Any], kind: str = "image") -> list[Any]:
    """Return the images or audio that a row lists outside its turns."""
    value = fields.get(f"{kind}s") if fields.get(f"{kind}s") is not None else fields.get(kind)
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
