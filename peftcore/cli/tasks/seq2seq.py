"""Sources and targets for encoder-decoder models (`--task seq2seq`), such as T5 and BART."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from peftcore.cli.data.row import Row
from peftcore.errors import PeftcoreError


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, Any]], int]:
    """Return (rows as `input_ids` and `labels`, number of truncated rows); both are cut at the end.

    The model makes the decoder's input of the labels. A target that is not truncated ends with the end-of-text token.

    Raises:
        PeftcoreError: a source or a target has no tokens.
    """
    examples, truncated = [], 0
    for row in rows:
        source = list(tokenizer(row.text)["input_ids"])
        target = list(tokenizer(text_target=str(row.completion))["input_ids"])
        end = tokenizer.eos_token_id
        if not source or not set(target) - {end}:
            raise PeftcoreError(f"{row.where}: the {'source' if not source else 'target'} has no tokens")
        if end is not None and target[-1] != end:
            target.append(end)
        truncated += len(source) > max_length or len(target) > max_length
        examples.append({"input_ids": source[:max_length], "labels": target[:max_length]})
    return examples, truncated
