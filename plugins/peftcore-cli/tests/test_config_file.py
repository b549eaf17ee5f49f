"""`--config`: options from a file, and a run's file, from which it is repeated."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from peftcore_cli import config_file
from safetensors.torch import load_file
from support.commands import Run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = st.text(min_size=1, max_size=12)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
SCALARS = st.booleans() | NUMBERS | st.text(st.characters(codec="utf-8"))


def lists_and_tables(of: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(of, max_size=3) | st.dictionaries(KEYS, of, max_size=3)


VALUES = st.recursive(SCALARS, lists_and_tables, max_leaves=5)


@given(st.dictionaries(st.sampled_from(("model", "steps", "data")), SCALARS), st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_is_written_is_read(options: dict[str, Any], fields: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        config_file.write(file, {**options, "seed": None, "set": fields})
        assert tomllib.loads(file.read_text("utf-8")) == {**options, **({"set": fields} if fields else {})}


def test_a_path_that_is_no_text_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file.write(tmp_path / "run.toml", {"data": "a\udcff"})
    assert not (tmp_path / "run.toml").exists() and "'\\udcff' is not valid UTF-8" in capsys.readouterr().err


def test_a_run_is_repeated_from_its_file(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    method = ("--method", "lora", "--set", "r=4", "--set", "target_modules=q_proj,v_proj", "--set", "lora_dropout=0.1")
    sample = 'the "film"\n\\ é'
    run(
        "train",
        "-m",
        llama,
        "-d",
        reviews,
        "-o",
        first,
        *method,
        "--steps",
        3,
        "--seed",
        3,
        "--sample",
        sample,
        "--sample-tokens",
        2,
    )
    run("train", "--config", first / "run.toml", "-o", second)
    assert same(first, second)
    settings = [json.loads((folder / "run.json").read_text()) for folder in (first, second)]
    assert settings[0] == settings[1]
    # The command line wins, field by field; steps of the file do not hold beside epochs of the command line.
    run("train", "--config", second / "run.toml", "-o", other, "--set", "r=2", "--epochs", 1)
    found = json.loads((other / "run.json").read_text())
    assert found["fields"] == {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
    assert (found["steps"], found["seed"]) == (None, 3)


def same(*runs: Path) -> bool:
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sze = 3", "unknown option 'batch_sze' (nearest: 'batch_size'"),
        ("config = 'a'", "unknown option 'config'"),
        ("batch-size = 8.5", "'batch-size': "),
        ("steps = true", "'steps' takes text or a number, found True"),
        ("steps = 0", "'steps': "),
        ("gradient-checkpointing = 1", "'gradient-checkpointing' takes true or false, found 1"),
        ("model = ['a', 'b']", "'model' takes text or a number, found ['a', 'b']"),
        ("model = 'a'\nmodel = 'b'", "is not valid TOML"),
        ("set = ['r=4', 3.5]\ndata = 2020-01-01", "'data' takes text or a number, found datetime.date(2020, 1, 1)"),
        ("model = 'a'", "Missing option '--data'"),
        ("[lora]\nr = 3", "unknown option 'lora'"),
    ],
)
def test_a_wrong_file(run: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    shown = run("train", "--config", tmp_path / "run.toml", "-o", tmp_path / "run", code=2).output
    assert message in " ".join(shown.replace("│", " ").split())


def test_a_file_that_is_not_there(run: Run) -> None:
    assert "cannot read 'no.toml': No such file" in run("train", "--config", "no.toml", code=2).output


def test_fields_of_the_file(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    lines = [f'model = "{llama}"', f'data = "{reviews}"', 'method = "lora"', "steps = 1", "[set]", "rr = 4"]
    (tmp_path / "run.toml").write_text("\n".join(lines))
    shown = run("train", "--config", tmp_path / "run.toml", "-o", tmp_path / "run", code=1).output
    assert "LoraConfig has no field 'rr' (nearest: 'r')" in shown
