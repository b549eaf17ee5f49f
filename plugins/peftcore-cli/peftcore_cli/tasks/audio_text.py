"""Conversations with audio (`--task audio-text`)."""

from __future__ import annotations

from peftcore_cli.data import image_turns
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.tasks.media_chats import MediaChats


class AudioText(MediaChats):
    """A model with audio and text as input, and text as output."""

    name = "audio-text"
    shown_keys = "messages with audio"
    model_class = "AutoModelForMultimodalLM"
    needed_model = (
        "a model that takes audio and text, such as Qwen2-Audio or Gemma 3n, found {}. For transcripts use --task "
        "asr with a Whisper model"
    )
    hears = True

    def recognises(self, lines: FirstLines) -> bool:
        return lines.media is not None and image_turns.has_audio(lines.media)
