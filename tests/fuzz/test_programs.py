"""Programs of this folder that take longer than tests may: a part of each, or in the full run all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fuzz import corpus

from peftcore import ops


def run(program: str, *arguments: Any) -> list[str]:
    """The lines of a program that ended well."""
    done = corpus.program(program, *arguments)
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if "WRONG" in line]
    assert done.returncode == 0 and lines[-1].startswith("done"), f"{lines[-1:]}: {done.stderr[-2000:]}"
    assert not wrong, "\n".join(wrong)
    return lines


@pytest.mark.skipif(ops.extension is None, reason="no _C")
def test_levels_agree() -> None:
    """2,000 calls at every SIMD level, or 200: the same within rounding, or a refusal in the same words."""
    first = 1_000_000 + corpus.SEED * 2000
    run("levels", first, first + 2000, 1 if corpus.WHOLE else 10)


def test_mutated_gguf_files(tmp_path: Path) -> None:
    """1,000 of them, or 10."""
    run("gguf_files", tmp_path, 1000, 1 if corpus.WHOLE else 100, corpus.SEED)


@pytest.mark.skipif(not corpus.WHOLE, reason="ten minutes and 11 GB, for the full run")
@pytest.mark.skipif(ops.extension is None, reason="the reference takes several times the memory")
def test_more_than_2_to_the_31_elements() -> None:
    run("large")


@pytest.mark.skipif(not corpus.WHOLE, reason="ten minutes, for the full run")
@pytest.mark.skipif(ops.extension is None, reason="no _C: no paged optimizers")
def test_killed_trainings(tmp_path: Path) -> None:
    run("killed_training", tmp_path, 100, corpus.SEED)
