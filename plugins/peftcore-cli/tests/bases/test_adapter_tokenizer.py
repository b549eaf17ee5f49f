"""A tokenizer that came with an adapter: its code is not run, and files of other types end in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from peftcore_cli.bases import adapter_tokenizer, models
from support.commands import Run, save_tokenizer

from peftcore import CheckpointError, PeftcoreError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer."""
    save_tokenizer(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_it_is_loaded(folder: Path) -> None:
    tokenizer = adapter_tokenizer.load(folder)
    assert tokenizer("the film")["input_ids"] == [4, 5] and tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize("name", ["Y", "TokenizersBackend"])
def test_code_that_came_with_it_is_neither_run_nor_asked_about(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run a stranger's code"))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Y: pass\n")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Y", "code.Y"]}, tokenizer_class=name)
    if name == "Y":
        with pytest.raises(PeftcoreError, match="requires the adapter's own code, which is never run"):
            models.load_tokenizer("base", folder)
    else:
        models.load_tokenizer("base", folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"model_max_length": ' + "9" * 5_000 + "}"),
        ("tokenizer_config.json", '{"model_max_length": "x"}'),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"pad_token": [[1]]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [3]}'),
        ("tokenizer_config.json", '{"unk_token": "\\ud800"}'),
        ("special_tokens_map.json", "3"),
        ("added_tokens.json", '"x"'),
        ("chat_template.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "3"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": [3], "merges": 3}}'),
    ],
    ids=lambda value: value[:30],
)
def test_files_of_other_types(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(PeftcoreError, match=rf"'{folder}.*(delete the adapter's|cannot be read|is not a JSON object)"):
        models.load_tokenizer("base", folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file(folder: Path, file: str, kind: str) -> None:
    (folder / file).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / file)
    elif kind == "device":
        (folder / file).symlink_to("/dev/zero")
    else:
        (folder / file).mkdir()
    with pytest.raises(CheckpointError, match=rf"{file}' is a {kind}, not a regular file"):
        models.load_tokenizer("base", folder)


def test_a_pattern_that_takes_the_tokenizer_too_long(run: Run, llama: Path, folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    bomb = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change(base / "tokenizer.json", pre_tokenizer=bomb)
    found = run("generate", "-m", base, "-p", "a" * 60 + "b", "--device", "cpu", code=1)
    assert "error: the tokenizer cannot read the text: Onig: Regex search error: retry-limit" in found.stderr
