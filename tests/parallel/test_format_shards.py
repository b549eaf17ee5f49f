"""Bases in each 4-bit format on two ranks: sharded by FSDP2, read in shards, trained and resumed as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantized
import rank_formats
from processes import run
from rank_cases import shards_integers
from whole import WHOLE

pytestmark = [shards_integers, pytest.mark.filterwarnings("ignore::FutureWarning")]


def test_shards_keep_the_bits_and_train_as_one_process(tmp_path: Path) -> None:
    forms = rank_formats.FORMATS if WHOLE else ["affine4"]
    for form in forms:
        rank_formats.base(form).save_pretrained(tmp_path / form)
    quantized.llama().save_pretrained(tmp_path / "dense")
    folders = {form: str(tmp_path / form) for form in ("dense", *forms)}
    for found in run(rank_formats.table, folders):
        assert found.keys() == set(forms)
        for form, (far, kept, read) in found.items():
            assert far < 1e-6 and kept and all(read), (form, far, kept, read)


@pytest.mark.nightly
@pytest.mark.parametrize("form", rank_formats.FORMATS)
def test_training_resumes_on_shards(form: str, tmp_path: Path) -> None:
    assert run(rank_formats.resumed, form, str(tmp_path)) == [[True, True]] * 2
