"""Conversations with images or audio: both in the forms that data sets have them, as paths in order.

A part of a turn's content: `{"type": "image", "path": FILE}`, also as `image` or `url`, or OpenAI's `{"type":
"image_url", "image_url": {"url": FILE}}`. Or a row names its images, `{"images": [FILE, ...], "messages": ...}` (also
`image`), and each turn has `{"type": "image"}` or the text `<image>` where one is shown. Audio, for `--task audio-text`
alone, is written in the same ways with `audio`, `audios` and `<audio>`. Paths are relative to the folder of the file
that names them.
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
from peftcore_cli.data.row import Row

MARK, HEARD = "<image>", "<audio>"  # in texts of rows that name their images or audio
PLACE, AUDIO_PLACE = {"type": "image"}, {"type": "audio"}  # what chat templates take
_SOURCES = ("path", "image", "audio", "url", "image_url", "audio_url")


def has_images(fields: Mapping[str, Any]) -> bool:
    """Return whether a row is a conversation with images."""
    found = fields.get("messages") or fields.get("conversations") or fields.get("prompt") or fields.get("chosen")
    if not isinstance(found, list):
        return bool(_named(fields)) and {"chosen", "rejected"} <= fields.keys()
    parts = (part for turn in found if isinstance(turn, dict) for part in _parts(turn.get("content")))
    return (
        bool(_named(fields)) or any(part.get("type") in ("image", "image_url") for part in parts) or has_audio(fields)
    )


def has_audio(fields: Mapping[str, Any]) -> bool:
    """Return whether a row is a conversation with audio."""
    found = next((fields[key] for key in ("messages", "conversations", "prompt") if fields.get(key)), None)
    if not isinstance(found, list):
        return False
    parts = (part for turn in found if isinstance(turn, dict) for part in _parts(turn.get("content")))
    return bool(_named(fields, "audio")) or any(part.get("type") in ("audio", "audio_url") for part in parts)


def row_of(where: str, fields: dict[str, Any], *, hears: bool = False) -> Row:
    """Return a conversation whose messages have the parts of chat templates, and the images and audio that they show.

    Args:
        where: file and line, for messages.
        fields: of the line.
        hears: whether the model takes audio.

    Raises:
        PeftcoreError: the fields are not lists of messages, or an image is missing or not a local file; the message
            begins with `where`.
    """
    images = _Images(where, _named(fields), _named(fields, "audio") if hears else None)
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
        asked, said = (images.placed(key, fields[key]) for key in ("prompt", "completion"))
        row = turns.conversation(where, [*asked, *said], len(asked), fields)
    elif fields.get("messages") is not None:
        row = turns.conversation(where, images.placed("messages", fields["messages"]), 0, fields)
    elif fields.get("conversations") is not None:
        given = turns.of_sharegpt(where, fields["conversations"])
        row = turns.conversation(where, images.placed("conversations", given), 0, fields)
    else:
        key = next(key for key in ("messages", "conversations", "prompt") if key in fields)
        what = "'prompt' and 'completion' must be lists" if key == "prompt" else f"'{key}' must be a list"
        raise PeftcoreError(f"{where}: {what} of messages, found {labels.short(fields[key])}")
    images.check_all_shown()
    for i, message in enumerate(row.messages or []):
        content = message.get("content") or ()  # a turn of tool calls may have none
        if message["role"] == "assistant" and (PLACE in content or AUDIO_PLACE in content):
            raise PeftcoreError(
                f"{where}: messages[{i}] is the assistant's and has an image or audio, but models write texts"
            )
    return replace(row, images=tuple(images.paths), sounds=tuple(images.sounds))


def preference(where: str, fields: dict[str, Any]) -> Row:
    """Return a conversation with images and two answers to it, which are texts, messages or a list of one.

    A text as the prompt that does not say where its images are shown shows them first.

    Raises:
        PeftcoreError: an image is missing, or an answer is not one of the assistant; the message begins with `where`.
    """
    answers = {key: _turns(where, key, fields[key], "assistant") for key in ("chosen", "rejected")}
    key = next((key for key in ("prompt", "conversations") if fields.get(key) is not None), None)
    if key is not None:
        asked = _turns(where, key, fields[key], "user")
    else:  # both contain the whole conversation
        pairs = zip(answers["chosen"], answers["rejected"], strict=False)
        asked = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        answers = {key: messages[len(asked) :] for key, messages in answers.items()}
    named = _named(fields)
    if isinstance(fields.get(key or ""), str) and named and MARK not in fields[key or ""]:
        asked = [{"role": "user", "content": [*(dict(PLACE) for _ in named), *_parts(fields[key or ""])]}]
    images = _Images(where, named)
    asked = images.placed(key or "chosen", asked)
    images.check_all_shown()
    said = {}
    for name, answer in answers.items():
        said[name] = _Images(where, []).placed(name, answer)
        if [message["role"] for message in said[name]] != ["assistant"]:
            found = ", ".join(message["role"] for message in said[name])
            raise PeftcoreError(f"{where}: '{name}' must be one assistant answer to the same prompt, found {found}")
    if said["chosen"] == said["rejected"]:
        raise PeftcoreError(f"{where}: 'chosen' and 'rejected' are the same")
    for answer in said.values():
        whole = turns.conversation(where, [*asked, *answer], len(asked), fields)
    chosen, rejected = map(turns.without_marks, said.values())
    messages = turns.without_marks(asked)
    return Row(where, "", chosen, rejected, messages=messages, tools=whole.tools, images=tuple(images.paths))


def _turns(where: str, key: str, found: Any, role: str) -> list[dict[str, Any]]:
    """Return a text, a message or a list of messages as messages, also in ShareGPT's form."""
    if isinstance(found, str):
        return [{"role": role, "content": found}]
    found = [found] if isinstance(found, dict) else found
    if isinstance(found, list) and any(isinstance(each, dict) and "from" in each for each in found):
        return turns.of_sharegpt(where, found)
    return turns.messages_of(where, key, found, has_images=True)


def asked_of(where: str, fields: dict[str, Any], task: str, *, hears: bool = False) -> Row:
    """Return a conversation to answer: the row without an answer that is there.

    Args:
        where: file and line, for messages.
        fields: of the line.
        task: name of the task, for messages.
        hears: whether the model takes audio.

    Raises:
        PeftcoreError: the conversation has no turn to answer, or an image is missing; the message begins with `where`.
    """
    key = next((key for key in ("messages", "conversations", "prompt") if isinstance(fields.get(key), list)), None)
    if key is None:
        raise PeftcoreError(f"{where}: predict needs the key messages for {task}, found {', '.join(fields)}")
    given = turns.of_sharegpt(where, fields[key]) if key == "conversations" else fields[key]
    while isinstance(given, list) and given and isinstance(given[-1], dict) and given[-1].get("role") == "assistant":
        given = given[:-1]
    images = _Images(where, _named(fields), _named(fields, "audio") if hears else None)
    messages = turns.without_marks(images.placed(key, given))
    images.check_all_shown()
    return Row(where, "", messages=messages, images=tuple(images.paths), sounds=tuple(images.sounds))


class _Images:
    """Images and audio of a row, collected while its messages are read; `heard` is None if audio is not read."""

    def __init__(self, where: str, named: list[Any], heard: list[Any] | None = None) -> None:
        self.where, self.named, self.paths = where, named, list[str]()
        self.heard, self.sounds = heard, list[str]()

    def placed(self, key: str, found: Any) -> list[dict[str, Any]]:
        """Return messages whose content is a list of parts, with `PLACE` for each image."""
        messages = turns.messages_of(self.where, key, found, has_images=True)
        for index, message in enumerate(messages):
            if "content" in message:
                parts = _parts(message["content"])
                message["content"] = [p for part in parts for p in self._placed(f"{key}[{index}]", part)]
        return messages

    def _placed(self, place: str, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            marks = [mark for mark, named in ((MARK, self.named), (HEARD, self.heard)) if named]
            for piece in re.split(f"({'|'.join(marks)})", part["text"]) if marks else [part["text"]]:
                if piece == MARK and self.named:
                    self._show(place, None)
                    yield dict(PLACE)
                elif piece == HEARD and self.heard:
                    self._hear(place, None)
                    yield dict(AUDIO_PLACE)
                elif piece:
                    yield {"type": "text", "text": piece}
        elif kind in ("image", "image_url"):
            source = next((part[name] for name in _SOURCES if part.get(name) is not None), None)
            self._show(place, source.get("url") if isinstance(source, dict) else source)
            yield dict(PLACE)
        elif kind in ("audio", "audio_url") and self.heard is not None:
            source = next((part[name] for name in _SOURCES if part.get(name) is not None), None)
            self._hear(place, source.get("url") if isinstance(source, dict) and "url" in source else source)
            yield dict(AUDIO_PLACE)
        else:
            known = "text and image" if self.heard is None else "text, image and audio"
            hint = ". Audio is read by --task audio-text" if kind in ("audio", "audio_url") else ""
            raise PeftcoreError(
                f"{self.where}: {place} has a part of another kind than {known}, found {labels.short(part)}{hint}"
            )

    def _hear(self, place: str, source: Any) -> None:
        if source is None:
            if len(self.sounds) >= len(self.heard or ()):
                raise PeftcoreError(
                    f"{self.where}: {place} has recording {len(self.sounds) + 1}, and the row names "
                    f'{len(self.heard or ())}. Name it: {{"type": "audio", "path": FILE}}, or in "audios": [FILE, ...]'
                )
            source = (self.heard or [])[len(self.sounds)]
        self.sounds.append(audio_files.named(self.where, place, source))

    def _show(self, place: str, source: Any) -> None:
        if source is None:
            if len(self.paths) >= len(self.named):
                raise PeftcoreError(
                    f"{self.where}: {place} shows image {len(self.paths) + 1}, and the row names {len(self.named)}. "
                    'Name it: {"type": "image", "path": FILE}, or in "images": [FILE, ...]'
                )
            source = self.named[len(self.paths)]
        self.paths.append(self._path(place, source))

    def _path(self, place: str, source: Any) -> str:
        if not isinstance(source, str):
            raise PeftcoreError(
                f"{self.where}: {place} has an image that is not a path of a file, found {type(source).__name__}. Save "
                "it as a file and name that"
            )
        if source.startswith(("http://", "https://", "data:")):
            raise PeftcoreError(
                f"{self.where}: {place} has the image '{source[:60]}', which is not a local file. Download it and name "
                "the file"
            )
        folder = os.path.dirname(self.where.rpartition(":")[0])
        path = os.path.join(folder, os.path.expanduser(source.removeprefix("file://")))
        if not os.path.isfile(path):
            raise PeftcoreError(
                f"{self.where}: the image '{path}' does not exist. Paths are relative to the folder of the data file"
            )
        return path

    def check_all_shown(self) -> None:
        if self.named and len(self.paths) != len(self.named):
            raise PeftcoreError(
                f"{self.where}: the row names {len(self.named)} images, and its turns show {len(self.paths)}. Put "
                f'{{"type": "image"}} or the text {MARK} where each is shown'
            )
        if self.heard and len(self.sounds) != len(self.heard):
            raise PeftcoreError(
                f"{self.where}: the row names {len(self.heard)} recordings, and its turns have {len(self.sounds)}. Put "
                f'{{"type": "audio"}} or the text {HEARD} where each is heard'
            )


def _parts(content: Any) -> list[dict[str, Any]]:
    """Return content as parts; a text as one."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part if isinstance(part, dict) else {"type": type(part).__name__} for part in content or ()]


def _named(fields: Mapping[str, Any], kind: str = "image") -> list[Any]:
    """Return the images, or audio, that a row names for all its turns."""
    found = fields.get(f"{kind}s") if fields.get(f"{kind}s") is not None else fields.get(kind)
    return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [found]
