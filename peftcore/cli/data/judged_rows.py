"""Rows with judged answers: preference pairs, marked answers, and prompts to answer."""

from __future__ import annotations

import itertools
from typing import Any

from peftcore.cli.data import labels, turns
from peftcore.cli.data.labels import text_of
from peftcore.cli.data.row import Row
from peftcore.errors import PeftcoreError


def preference(where: str, fields: dict[str, Any]) -> Row:
    """Return a prompt with a chosen and a rejected answer.

    Raises:
        PeftcoreError: an answer is empty or both are equal; the message begins with `where`.
    """
    row = _compared_turns(where, fields) if isinstance(fields["chosen"], list) else _compared_texts(where, fields)
    if row.completion == row.rejected:
        raise PeftcoreError(f"{where}: 'chosen' and 'rejected' are the same")
    return row


def asked(where: str, fields: dict[str, Any]) -> Row:
    """Return a prompt to answer, with the other fields of its line."""
    columns = {name: value for name, value in fields.items() if name != "prompt"}
    if columns.get("tools"):
        raise PeftcoreError(f"{where}: tools are not supported by --task grpo. Remove 'tools'")
    if isinstance(fields["prompt"], list):
        asked = turns.without_marks(turns.messages_of(where, "prompt", fields["prompt"]))
        if asked[-1]["role"] == "assistant":
            raise PeftcoreError(f"{where}: 'prompt' must end with a turn to answer, found one of the assistant")
        return Row(where, "", messages=asked, columns=columns)
    return Row(where, text_of(where, "prompt", fields["prompt"]), columns=columns)


def marked_answer(where: str, fields: dict[str, Any]) -> Row:
    """Return an answer with the mark of whether it is good: true or false, also as text or 1 and 0 as in CSV files."""
    marks = {"true": True, "1": True, "false": False, "0": False}
    is_good = marks.get(str(fields["label"]).strip().lower())
    if is_good is None:
        raise PeftcoreError(f"{where}: 'label' must be true or false, found {labels.short(fields['label'])}")
    if not isinstance(fields["prompt"], list):
        prompt, answer = (text_of(where, key, fields[key]) for key in ("prompt", "completion"))
        if not answer.strip():
            raise PeftcoreError(f"{where}: 'completion' is empty")
        return Row(where, prompt, completion=answer, is_good=is_good)
    asked, said = (turns.messages_of(where, key, fields[key]) for key in ("prompt", "completion"))
    if [message["role"] for message in said] != ["assistant"]:
        found = ", ".join(message["role"] for message in said)
        raise PeftcoreError(f"{where}: 'completion' must be one assistant answer, found {found}")
    whole = turns.conversation(where, [*asked, *said], len(asked), fields)
    said = turns.without_marks(said)
    return Row(where, "", said, messages=turns.without_marks(asked), tools=whole.tools, is_good=is_good)


def _compared_texts(where: str, fields: dict[str, Any]) -> Row:
    prompt, chosen, rejected = (text_of(where, key, fields.get(key)) for key in ("prompt", "chosen", "rejected"))
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise PeftcoreError(f"{where}: '{key}' is empty")
    return Row(where, prompt, completion=chosen, rejected=rejected)


def _compared_turns(where: str, fields: dict[str, Any]) -> Row:
    answers = {key: turns.messages_of(where, key, fields[key]) for key in ("chosen", "rejected")}
    if fields.get("prompt") is not None:
        asked = turns.messages_of(where, "prompt", fields["prompt"])
    else:  # both contain the whole conversation
        pairs = zip(answers["chosen"], answers["rejected"], strict=False)
        asked = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        answers = {key: messages[len(asked) :] for key, messages in answers.items()}
        if not asked:
            raise PeftcoreError(f"{where}: 'chosen' and 'rejected' must begin with the same prompt")
    for key, answer in answers.items():
        if [message["role"] for message in answer] != ["assistant"]:
            found = ", ".join(message["role"] for message in answer) or "nothing"
            raise PeftcoreError(f"{where}: '{key}' must be one assistant answer to the same prompt, found {found}")
    answers = {key: turns.without_marks(answer) for key, answer in answers.items()}
    whole = turns.conversation(where, [*asked, *answers["chosen"]], len(asked), fields)
    return Row(
        where, "", answers["chosen"], answers["rejected"], messages=turns.without_marks(asked), tools=whole.tools
    )
