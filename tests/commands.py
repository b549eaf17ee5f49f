"""What tests of the command line share: a tiny tokenizer, files of examples, the type of `run`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result

WORDS = [
    "the",
    "film",
    "is",
    "good",
    "bad",
    "a",
    "very",
    "dull",
    "bright",
    "story",
    "with",
    "no",
    "heart",
    "and",
    "much",
]
WORDS += ["fun", "it", "was", "not"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]

Run = Callable[..., Result]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
