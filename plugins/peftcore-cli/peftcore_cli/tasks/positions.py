"""Check the number of tokens for models with a table of positions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.plugin import number_of_positions as number_of_positions


def check(model: nn.Module, tokens: int, advice: str = "Pass --max-length {}") -> None:
    """Raise a PeftcoreError if a text has more tokens than the model has positions.

    Args:
        model: the model.
        tokens: number of tokens of the longest text.
        advice: what the user can do; `{}` is replaced by the number of positions.
    """
    limit = number_of_positions(model)
    if limit is not None and tokens > limit:
        raise PeftcoreError(
            f"{type(model).__name__} has positions for {limit:,} tokens, found a text with {tokens:,}. "
            f"{advice.format(limit)}"
        )


@contextlib.contextmanager
def generation_within(model: nn.Module, option: str) -> Iterator[None]:
    """Inside the block, convert the IndexError of an answer that exceeds the model's positions to a PeftcoreError.

    Args:
        model: the model.
        option: option that limits answers, for the message.
    """
    try:
        yield
    except IndexError as error:
        limit = number_of_positions(model)
        if limit is None or "out of range" not in str(error):
            raise
        raise PeftcoreError(
            f"{type(model).__name__} has positions for {limit:,} tokens, but a prompt and its answer exceed them. "
            f"Reduce {option}, or pass shorter prompts"
        ) from error
