"""Rows: examples as read from files, before encoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peftcore.errors import PeftcoreError
from peftcore_cli.data.labels import Label

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        location: `FILE:LINE`, for messages.
        text: the text; the prompt if there is a completion.
        completion: the answer to learn, or the chosen answer of a preference pair. In a conversation, a list with one
            message.
        rejected: the rejected answer of a preference pair.
        label: the label of a classifier, the score of a scored pair, or the tags of `words`.
        messages: a conversation in the format of chat templates. For preferences, the conversation is the prompt.
        learned_from: index of the first message from which assistant turns are learned.
        not_learned: indices of later turns that are not learned.
        tools: tools that the conversation may call.
        source: index of the data set.
        is_good: whether the answer is good (KTO).
        pair: the second text of a pair to classify or to embed.
        negative: the third text of a triplet.
        tokens: (ids, labels) of a row that is already tokenized.
        words: the words to tag.
        image: path of the image to classify.
        images: paths of a conversation's images.
        sounds: paths of a conversation's recordings.
        audio: path of the recording to transcribe.
        columns: fields that are passed to a reward function.
    """

    location: str
    text: str
    completion: str | Messages | None = None
    rejected: str | Messages | None = None
    label: Label | None = None
    messages: Messages | None = None
    learned_from: int = 0
    not_learned: tuple[int, ...] = ()
    tools: list[Any] | None = None
    source: int = 0
    is_good: bool | None = None
    pair: str | None = None
    negative: str | None = None
    tokens: tuple[list[int], list[int]] | None = None
    words: tuple[str, ...] = ()
    image: str | None = None
    images: tuple[str, ...] = ()
    sounds: tuple[str, ...] = ()
    audio: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Names of the example's fields, for messages."""
        if self.messages is not None:
            return "messages"
        if self.negative is not None:
            return "anchor/positive/negative"
        if self.pair is not None:
            return "sentence1/sentence2/score" if isinstance(self.label, float) else "anchor/positive"
        if self.tokens is not None:
            return "input_ids"
        return "text" if self.completion is None else "prompt/completion"


@contextmanager
def naming(location: str | None) -> Iterator[None]:
    """Inside the block, prefix a PeftcoreError with `location`, unless it is None."""
    try:
        yield
    except PeftcoreError as error:
        if location is None:
            raise
        raise PeftcoreError(f"{location}: {error}") from error
