"""Conversations with images (`--task image-text`)."""

from __future__ import annotations

from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.tasks.media_chats import MediaChats

REQUIRED_MODEL = (
    "a model that takes images and text, such as SmolVLM, Qwen2.5-VL or LLaVA, found {}. For texts use --task "
    "causal-lm or dpo"
)


class ImageText(MediaChats):
    """A model with images and text as input, and text as output."""

    name = "image-text"
    shown_keys = "messages with images"
    model_class = "AutoModelForImageTextToText"
    needed_model = REQUIRED_MODEL
    family = "seeing"

    def recognises(self, lines: FirstLines) -> bool:
        return lines.media is not None
