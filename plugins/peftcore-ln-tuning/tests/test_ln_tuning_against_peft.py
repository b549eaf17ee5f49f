"""Hugging Face PEFT reads what is saved here, and the other way round, with the same logits."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tiny
from beside_peft import TASKS, both_ways

import peftcore


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_files(kind: str, tmp_path: Path) -> None:
    """Every norm of ours, those of PEFT's table or named ones of theirs; a classifier's head with both."""
    ours = peftcore.apply(tiny.MODELS[kind](), "ln-tuning")
    names = ["LayerNorm"] if kind == "bert" else None
    both_ways(tiny.MODELS[kind], tmp_path, ours, peft.LNTuningConfig(task_type=TASKS[kind], target_modules=names))


def test_norms_with_statistics_are_left_alone() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="target_modules"):
        peftcore.apply(tiny.batchnorm_net(), "ln-tuning")
