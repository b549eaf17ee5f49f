"""Positions of a model: some have a table of them, and a text with more tokens than the table has rows is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from peftcore.cli import data, models
from peftcore.cli.console import warn
from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    from peftcore.cli.settings import Settings
    from peftcore.cli.training_data import Examples

_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
_OTHERS = ("vision", "visual", "audio")  # parts of a model that read something other than tokens


def count(model: nn.Module) -> int | None:
    """Return the number of tokens that the model has positions for, or None if it has no table of positions."""
    found = []
    for path, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES
        if is_table and not any(part in path for part in _OTHERS):
            before = getattr(module, "offset", None)  # rows before the first position, as in OPT and BART
            if before is None:
                before = 0 if module.padding_idx is None else module.padding_idx + 1  # as in RoBERTa
            found.append(int(module.num_embeddings) - before)
    return min(found, default=None)


def check(model: nn.Module, tokens: int) -> None:
    """Raise a PeftcoreError if the model has no position for each of a text's tokens."""
    known = count(model)
    if known is not None and tokens > known:
        raise PeftcoreError(
            f"{type(model).__name__} has positions for {known:,} tokens, found texts of up to {tokens:,}. Pass "
            f"--max-length {known}"
        )


def check_examples(model: nn.Module, settings: Settings, examples: Examples) -> None:
    """Raise a PeftcoreError if the model has no position for each token of a run's examples, packed or not."""
    if settings.task in (data.IMAGE, *data.MULTIMODAL):
        return
    packed = [len(each["input_ids"]) for each in examples.train] if settings.pack else []
    check(model, max(packed, default=examples.longest))


def within(settings: Settings) -> Settings:
    """Return the settings of a run with `--streaming`, whose longest text is not known, with a length that fits."""
    if not settings.streaming:
        return settings
    try:
        model = models.empty_model(settings.model, settings.task)
    except PeftcoreError:  # code of the model's repository; `check_examples` compares --max-length
        return settings
    known = count(model)
    if known is None or settings.max_length <= known:
        return settings
    warn(
        f"{type(model).__name__} has positions for {known:,} tokens: texts are cut there, and not at --max-length "
        f"{settings.max_length}"
    )
    return replace(settings, max_length=known)


@contextlib.contextmanager
def of_answers(model: nn.Module, option: str) -> Iterator[None]:
    """Raise a PeftcoreError in place of the IndexError of an answer that goes past the model's last position.

    Args:
        model: the model.
        option: option of the longest answer.
    """
    try:
        yield
    except IndexError as error:
        known = count(model)
        if known is None or "out of range" not in str(error):
            raise
        raise PeftcoreError(
            f"{type(model).__name__} has positions for {known:,} tokens, and a prompt with its answer has more. Reduce "
            f"{option}, or pass shorter prompts"
        ) from error
