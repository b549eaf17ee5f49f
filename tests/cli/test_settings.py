"""Settings of a run, compared when it is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import peftcore
from peftcore.cli.settings import RUN_FILE, Settings, prepare_folder

SETTINGS = Settings(model="m", data="d", task="causal-lm", method="lora", batch_size=4)


def written(folder: Path, **changes: object) -> None:
    """Write `run.json` with these changes; None leaves an entry out."""
    entries = {**SETTINGS.to_json(), **changes}
    (folder / RUN_FILE).write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))


def test_a_run_from_before_an_option_existed_resumes_with_its_default(tmp_path: Path) -> None:
    written(tmp_path, weight_decay=None, pack=None)
    prepare_folder(tmp_path, SETTINGS, resume=True, overwrite=False)


def test_a_run_with_flags_that_have_become_choices_resumes(tmp_path: Path) -> None:
    for flag, choice in ((True, "on"), (False, "off")):
        written(tmp_path, fuse=flag, lazy_logits=flag)
        prepare_folder(tmp_path, replace(SETTINGS, fuse=choice, lazy_logits=choice), resume=True, overwrite=False)


def test_a_choice_that_is_none() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="--fuse must be one of auto, on, off, found 'yes'"):
        replace(SETTINGS, fuse="yes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fuse": None}, r"had fuse='off', now it is 'auto'"),
        ({"batch_size": None}, r"had batch_size=8, now it is 4"),
        ({"weight_decay": 0.1}, r"had weight_decay=0.1, now it is 0.0"),
        ({"of_a_later_release": 3}, r"had of_a_later_release=3, now it is None"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    written(tmp_path, **changes)
    with pytest.raises(peftcore.PeftcoreError, match=message):
        prepare_folder(tmp_path, SETTINGS, resume=True, overwrite=False)
