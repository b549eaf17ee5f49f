"""Load the tokenizer that is saved with an adapter. The files are untrusted, so their code is never run.

Trainers save a tokenizer with the adapter because it may have tokens that the base's tokenizer lacks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.plugin import safe_reading
from peftcore_cli.bases.adapter_folders import TEMPLATE_CHARACTERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_BYTES = 1 << 28  # maximum size of a file; the largest known vocabularies have 40 MB
_TABLES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_READ = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm")
_PROBE = "A text, 1 or 2."


def load(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in an adapter's folder. If it has no padding token, padding uses the end-of-text token.

    Raises:
        PeftcoreError: a file is invalid, or needs the adapter's own code.
    """
    from transformers import AutoTokenizer

    _check_files(folder)
    with _explaining_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        _check(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        ids = tokenizer(_PROBE)["input_ids"]
        tokenizer.decode(ids, skip_special_tokens=True)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raise a CheckpointError for pipes, devices, files that are too large, and JSON that is not an object."""
    try:
        paths = [folder / name for name in os.listdir(folder)]
        templates = folder / "additional_chat_templates"
        paths += [templates / name for name in os.listdir(templates)] if templates.is_dir() else []
        for file in paths:
            if file.suffix not in _READ or not os.path.lexists(file):
                continue
            status = os.stat(file)
            safe_reading.require_regular(file, status.st_mode)
            if status.st_size > _MAX_BYTES:
                raise CheckpointError(
                    f"'{file}' has {status.st_size:,} bytes, but the limit is {_MAX_BYTES:,}. To use the base's "
                    "tokenizer, delete the adapter's tokenizer files"
                )
    except OSError as error:
        raise CheckpointError(
            f"cannot read '{folder}': {error.strerror or error}. Check the permissions of the folder"
        ) from error
    for name in _TABLES:
        if os.path.lexists(folder / name) and not isinstance(_value(folder / name), dict):
            raise CheckpointError(
                f"'{folder / name}' is not a JSON object. To use the base's tokenizer, delete the adapter's "
                "tokenizer files"
            )


def _value(file: Path) -> Any:
    try:
        return safe_reading.parse_json(safe_reading.read_bytes(file, safe_reading.JSON_BYTES), file)
    except FileNotFoundError as error:  # a broken link
        raise CheckpointError(
            f"cannot read '{file}', which is a broken link. Delete it, or restore its target"
        ) from error


def _check(tokenizer: Any) -> None:
    """Raise a ValueError for attributes of the wrong type, which the files can set."""
    template = getattr(tokenizer, "chat_template", None)
    texts = [] if template is None else [template]
    if isinstance(template, dict):
        texts = list(template.values())
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"chat_template must be text, found {type(text).__name__}")
        if len(text) > TEMPLATE_CHARACTERS:
            raise ValueError(f"chat_template has {len(text):,} characters, but the limit is {TEMPLATE_CHARACTERS:,}")
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise ValueError(f"model_max_length must be a number, found {type(tokenizer.model_max_length).__name__}")


@contextlib.contextmanager
def _explaining_errors(folder: Path) -> Iterator[None]:
    """Turn any error that transformers or tokenizers raise on invalid files into a PeftcoreError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, PeftcoreError):
        raise
    except BaseException as error:  # tokenizers' Rust code panics with a BaseException
        message = (
            ("a file is nested too deeply") if isinstance(error, RecursionError) else " ".join(str(error).split())[:400]
        )
        asks_for_code = "trust_remote_code" in str(error)
        reason = "the tokenizer requires the adapter's own code, which is never run" if asks_for_code else message
        raise PeftcoreError(
            f"cannot load the tokenizer in '{folder}': {reason or type(error).__name__}. To use the base's "
            "tokenizer, delete the adapter's tokenizer files"
        ) from error
