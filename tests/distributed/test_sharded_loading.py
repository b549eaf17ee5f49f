"""Bases in each 4-bit format on two ranks: sharded by FSDP2, read in shards, trained and resumed as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import quantized
from support.processes import run
from support.ranks import sharded_formats
from support.ranks.cases import shards_integers
from support.whole_run import WHOLE

pytestmark = [shards_integers, pytest.mark.filterwarnings("ignore::FutureWarning")]


def test_shards_keep_the_bits_and_train_as_one_process(tmp_path: Path) -> None:
    forms = sharded_formats.FORMATS if WHOLE else ["affine4"]
    for form in forms:
        sharded_formats.base(form).save_pretrained(tmp_path / form)
    quantized.llama().save_pretrained(tmp_path / "dense")
    folders = {form: str(tmp_path / form) for form in ("dense", *forms)}
    for found in run(sharded_formats.table, folders):
        assert found.keys() == set(forms)
        for form, (far, kept, read) in found.items():
            assert far < 1e-6 and kept and all(read), (form, far, kept, read)


@pytest.mark.nightly
@pytest.mark.parametrize("form", sharded_formats.FORMATS)
def test_training_resumes_on_shards(form: str, tmp_path: Path) -> None:
    assert run(sharded_formats.resumed, form, str(tmp_path)) == [[True, True]] * 2
