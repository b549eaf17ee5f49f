"""A rank that is killed in a training step or in `save`: the other one raises, and what was saved is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import run
from support.ranks import bases, killing

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def cell(moment: str, said: str) -> str:
    if moment == "in save":
        return "named" if "PeftcoreError" in said and "If another rank has exited, check its output" in said else said
    return "raised" if said.startswith(("RuntimeError", "Dist")) and "gloo" in said else said  # by PyTorch


@pytest.mark.nightly
def test_methods_end_as_the_table_says(tmp_path: Path) -> None:
    bases.write(tmp_path)
    found = run(killing.killed, str(tmp_path), joined=False)[0]
    for moment in killing.MOMENTS:
        cells = [cell(moment, said) for said in found[moment].values()]
        assert f"| {moment} | {' | '.join(cells)} |" in PAGE.read_text()
