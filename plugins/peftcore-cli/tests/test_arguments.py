"""Values that no command can use, and paths that the operating system refuses, end in a sentence."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from peftcore_cli import arguments
from peftcore_cli.settings import Settings
from support.commands import Run

from peftcore import PeftcoreError

TRAIN = ("train", "--method", "lora", "--device", "cpu", "--steps", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lr", "nan"), "error: --lr must be a finite number, found nan"),
        (("--lr", "inf"), "error: --lr must be a finite number, found inf"),
        (("--lr", "-1"), "error: --lr and --epochs must be above 0, found -1.0"),
        (("--epochs", "nan"), "error: --epochs must be a finite number, found nan"),
        (("--warmup", "inf"), "error: --warmup must be a finite number, found inf"),
        (("--weight-decay", "inf"), "error: --weight-decay must be a finite number, found inf"),
        (("--holdout", "nan"), "error: --holdout must be a finite number, found nan"),
        (("--beta", "nan"), "error: --beta must be a finite number, found nan"),
        (("--steps", "1" + "0" * 30), "error: --steps must be below 4.6e+18, found a number with 100 bits"),
        (("--seed", "-1"), "error: --seed must be between 0 and 4294967295, found -1"),
        (("--seed", str(2**40)), "error: --seed must be between 0 and 4294967295"),
        (("--sample", "a\0b"), "error: --sample contains a NUL character"),
        (("--chat-template", "\ud800"), "error: --chat-template contains an unpaired surrogate"),
    ],
)
def test_a_value_that_no_run_can_use(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    found = run(*TRAIN, "-m", llama, "-d", reviews, "-o", tmp_path / "run", *options, code=1)
    assert message in found.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["x" * 5_000, "file/run"])
@pytest.mark.parametrize("command", ["train", "merge", "export", "info", "generate", "chat", "plan"])
def test_a_path_that_names_no_folder(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, command: str, name: str
) -> None:
    (tmp_path / "file").write_text("mine")
    path = tmp_path / name
    words = {
        "train": (*TRAIN, "-m", llama, "-d", reviews, "-o", path),
        "merge": ("merge", path, "-o", tmp_path / "out"),
        "export": ("export", "--format", "gguf", path, "-o", tmp_path / "out"),
        "info": ("info", path),
        "generate": ("generate", path, "-p", "the"),
        "chat": ("chat", path),
        "plan": ("plan", "-m", path, "--method", "lora"),
    }[command]
    found = run(*words, code=1)
    assert "error: " in found.stderr and len(found.stderr) < 6_000 and str(path)[:100] in found.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_nested_toml(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("data = " + "[" * 20_000 + "]" * 20_000)
    assert "nested too deeply" in run("train", "--config", file, code=2).stderr.replace("\n", " ")


def test_what_is_not_about_a_file_is_not_explained() -> None:
    assert arguments.refusal(BrokenPipeError(errno.EPIPE, "Broken pipe", "x")) is None
    assert arguments.refusal(OSError("something")) is None
    full = arguments.refusal(OSError(errno.ENOSPC, "No space left on device"))
    assert full == "No space left on device. Free some space, or pass another folder"
    long = arguments.refusal(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5_000))
    assert long == f"cannot use '{'x' * 200}...': File name too long. Pass another path"


def test_settings_of_a_run_are_checked() -> None:
    for name, value in (("lr", float("nan")), ("warmup", float("inf")), ("lr", 0.0), ("epochs", -1.0)):
        with pytest.raises(PeftcoreError, match=name):
            Settings("m", "d", "causal-lm", "lora", **{name: value})


def test_options_of_an_adapter_need_one(run: Run, llama: Path) -> None:
    for words in (("--compare",), ("--labels", "a,b")):
        found = run("generate", "-m", llama, "-p", "the", *words, code=1)
        assert f"error: {words[0]} needs an adapter. Pass one, or remove {words[0]}" in found.stderr


def test_options_of_another_task(run: Run, llama: Path, reviews: Path, tmp_path: Path) -> None:
    for words, message in (
        (("--language", "english"), "--language only works with asr"),
        (("--undesirable-weight", 2), "--undesirable-weight only works with kto"),
        (("--generations", 4), "--generations only works with grpo"),
        (("--temperature", 0.5), "--temperature only works with grpo"),
    ):
        found = run(*TRAIN, "-m", llama, "-d", reviews, "-o", tmp_path / "run", *words, code=1)
        assert f"error: {message} (the task is causal-lm). Remove {words[0]}" in found.stderr
