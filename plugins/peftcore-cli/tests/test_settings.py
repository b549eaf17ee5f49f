"""Settings of a run, compared when it is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from peftcore_cli.settings import RUN_FILE, RunOptions, Settings, for_these_ranks, prepare_folder

import peftcore

SETTINGS = Settings(model="m", data="d", task="causal-lm", method="lora", batch_size=4)


def written(folder: Path, **changes: object) -> None:
    """Write `run.json` with these changes; None leaves an entry out."""
    entries = {**SETTINGS.to_json(), **changes}
    (folder / RUN_FILE).write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


def test_a_run_from_before_an_option_existed_resumes_with_its_default(tmp_path: Path) -> None:
    written(tmp_path, weight_decay=None, pack=None)
    prepare_folder(tmp_path, SETTINGS, resume=True, overwrite=False)


def test_a_run_that_samples_answers_resumes_on_as_many_ranks(tmp_path: Path) -> None:
    one = replace(SETTINGS, task="grpo")
    prepare_folder(tmp_path, one, resume=False, overwrite=False)
    assert for_these_ranks(tmp_path, one) == one
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot be resumed on 2 ranks.*Resume on 1 ranks"):
        for_these_ranks(tmp_path, replace(one, ranks=2))


def test_a_choice_that_is_none() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="--fuse must be one of auto, on, off, found 'yes'"):
        replace(SETTINGS, fuse="yes")


def test_the_report_shows_what_was_chosen_before_the_defaults() -> None:
    chosen = replace(SETTINGS, data=["d", "e"], fields={"r": 8, "use_dora": False}, pack=True, lr=2e-4)
    *rows, (last, defaults) = chosen.rows()
    assert rows == [
        ("model", "m"),
        ("data", "d, e"),
        ("task", "causal-lm"),
        ("method", "lora"),
        ("set r", "8"),
        ("set use_dora", "false"),
        ("batch_size", "4"),
        ("lr", "0.0002"),
        ("pack", "true"),
    ]
    assert last == "defaults" and defaults.startswith("holdout 0.1, epochs 3.0, ") and "generations 8" in defaults
    assert "None" not in defaults and "batch_size" not in defaults


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fuse": None}, r"has fuse='off', but this command has fuse='auto'"),
        ({"batch_size": None}, r"has batch_size=8, but this command has batch_size=4"),
        ({"weight_decay": 0.1}, r"has weight_decay=0.1, but this command has weight_decay=0.0"),
        ({"of_a_later_release": 3}, r"has of_a_later_release=3, but this command has of_a_later_release=None"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    written(tmp_path, **changes)
    with pytest.raises(peftcore.PeftcoreError, match=message):
        prepare_folder(tmp_path, SETTINGS, resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("ranks", "given", "grad_accum"), [(1, 2, 8), (2, 2, 4), (4, 2, 2), (8, 2, 1), (8, 1, 1), (2, 4, 4)]
)
def test_another_number_of_ranks_keeps_the_batches_of_a_step(
    tmp_path: Path, ranks: int, given: int, grad_accum: int
) -> None:
    written(tmp_path, ranks=4, grad_accum=2, parallel="ddp")
    parallel = "fsdp2" if ranks > 1 else None
    settings = for_these_ranks(tmp_path, replace(SETTINGS, ranks=ranks, grad_accum=given, parallel=parallel))
    assert settings.grad_accum == grad_accum
    prepare_folder(tmp_path, settings, resume=True, overwrite=False)


def test_ranks_that_cannot_share_the_batches_of_a_step(tmp_path: Path) -> None:
    written(tmp_path, ranks=4, grad_accum=2)
    with pytest.raises(peftcore.PeftcoreError, match=r"3 ranks cannot share .*on 1, 2, 4, 8 ranks, or"):
        for_these_ranks(tmp_path, replace(SETTINGS, ranks=3, grad_accum=2))
    with pytest.raises(peftcore.PeftcoreError, match=r"has grad_accum=2, but this command has grad_accum=3"):
        prepare_folder(tmp_path, replace(SETTINGS, ranks=2, grad_accum=3), resume=True, overwrite=False)


def test_the_first_start_of_a_run_that_is_to_be_resumed_keeps_its_settings(tmp_path: Path) -> None:
    assert for_these_ranks(tmp_path, SETTINGS) == SETTINGS


def test_examples_that_are_measured_have_no_weight() -> None:
    named = {"model": "m", "data": "d", "task": "causal-lm", "method": "lora"}
    with pytest.raises(peftcore.PeftcoreError, match=r"--eval-data cannot be weighted, .* 'e.jsonl:2'"):
        Settings.from_options(RunOptions(eval_data="e.jsonl:2"), **named)
    assert Settings.from_options(RunOptions(eval_data="e.jsonl:1"), **named).eval_data == "e.jsonl:1"
