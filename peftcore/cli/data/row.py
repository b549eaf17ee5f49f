"""Rows: examples as the files have them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peftcore.cli.data.labels import Label

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One example. `where` is `FILE:LINE`; `text` is the prompt if there is a completion.

    A conversation has messages as chat templates take them, and the tools that may be called; the assistant's turns
    from `learned_from` on are learned, except the indices `not_learned`. In a preference `completion` is chosen and
    `rejected` is not; if it is a conversation, `messages` are the prompt and the two answers are one message each.
    `source` is the index of the data set. `is_good` marks an answer for KTO, with the prompt as in a preference.
    `pair` is the second text of a pair to classify or to embed, `negative` the third of a triplet.
    `tokens` are (ids, labels) of a row that is tokenized already.
    `words` have the tags that are the label. `image` is the path of an image; `images` and `sounds` are those of a
    conversation.
    `audio` is the path of a recording.
    `columns` are fields for a function that judges answers.
    """

    where: str
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
        """Name of the example's fields."""
        if self.messages is not None:
            return "messages"
        if self.negative is not None:
            return "anchor/positive/negative"
        if self.pair is not None:
            return "sentence1/sentence2/score" if isinstance(self.label, float) else "anchor/positive"
        if self.tokens is not None:
            return "input_ids"
        return "text" if self.completion is None else "prompt/completion"
