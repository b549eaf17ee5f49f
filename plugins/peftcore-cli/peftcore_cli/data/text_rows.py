"""Rows for language models: a text, a prompt with its completion, a conversation, or token ids."""

from __future__ import annotations

from typing import Any

from peftcore.errors import PeftcoreError
from peftcore_cli.data import turns
from peftcore_cli.data.data_files import alpaca_prompt
from peftcore_cli.data.labels import text_of
from peftcore_cli.data.row import Row
from peftcore_cli.data.token_rows import tokens_of


def row_of(location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
    """Return the row of a line that has the fields `keys`.

    Raises:
        PeftcoreError: a field is invalid. The message begins with `location`.
    """
    if keys == ("messages",):
        return turns.conversation(location, turns.messages_of(location, "messages", fields["messages"]), 0, fields)
    if keys == ("conversations",):
        return turns.conversation(location, turns.messages_of_sharegpt(location, fields["conversations"]), 0, fields)
    if keys == ("prompt", "completion") and isinstance(fields["prompt"], list):
        prompt, answer = (turns.messages_of(location, key, fields[key]) for key in keys)
        return turns.conversation(location, [*prompt, *answer], len(prompt), fields)
    if keys == ("input_ids",):
        return Row(location, "", tokens=tokens_of(location, fields))
    return plain(location, fields, keys)


def plain(location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
    """Return the row of a text, or of a prompt with its completion. Alpaca's format is also read.

    Raises:
        PeftcoreError: a field is not text, or the last field is empty. The message begins with `location`.
    """
    if keys == ("instruction", "output"):
        prompt = alpaca_prompt(text_of(location, "instruction", fields["instruction"]), fields.get("input"))
        fields, keys = {"prompt": prompt, "completion": fields["output"]}, ("prompt", "completion")
    texts = [text_of(location, key, fields[key]) for key in keys]
    if not texts[-1].strip():
        raise PeftcoreError(f"{location}: '{keys[-1]}' is empty. Remove the row, or add a text")
    return Row(location, texts[0], completion=texts[1] if len(texts) > 1 else None)
