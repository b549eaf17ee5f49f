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


def invoke(*arguments: Any) -> Result:
    """Run `peftcore` with these arguments in this process. What it raises, but for SystemExit, is raised here."""
    from peftcore_cli.app import build
    from typer.testing import CliRunner

    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(build(words), words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def printed(*arguments: Any) -> tuple[int, str]:
    """Run a command as `invoke`, with lines of 200 characters, and return its exit status and what it printed."""
    from peftcore_cli import console

    console.out.width = 200
    result = invoke(*arguments)
    return result.exit_code, result.output


def printed_without_pictures(*arguments: Any) -> tuple[int, str]:
    """Run a command as `printed`, in a process of its own: every picture is an empty file."""
    from matplotlib.figure import Figure

    Figure.savefig = lambda self, *arguments, **options: None  # type: ignore[method-assign]
    return printed(*arguments)


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
