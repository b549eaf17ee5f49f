"""Eight kinds of methods on bases that ranks divide in six ways, as the table of docs/distributed.md says."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_bases
import rank_mesh
from processes import run

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
REFUSALS: dict[str, tuple[str, ...]] = {  # by method: a part of its sentence, for every way that refuses it
    "QLoRA": ("is sharded, and no rank has the whole weight. Quantize before sharding",),
    "prefixes": ("no stage has the adapter parameter", "needs whole sequences, and context_parallel"),
    "BitFit": ("is sharded and cannot be trained from here on",),
    "LoRA on experts": ("spread over processes (tensor or expert parallelism)",),
}


def cell(found: dict[str, float] | str) -> str:
    """A cell of the table: the largest difference is held below 1e-6."""
    if isinstance(found, str):
        return "refused"
    return "right" if max(found.values()) < 1e-6 else f"wrong by {found}"


@pytest.mark.nightly
@pytest.mark.parametrize("way", rank_mesh.WAYS)
def test_methods_are_right_or_refused_as_the_table_says(way: str, tmp_path: Path) -> None:
    rank_bases.write(tmp_path)
    count = 4 if " and " in way else 2
    for found in run(rank_mesh.table, way, str(tmp_path), ranks=count):
        for name, value in found.items():
            assert not isinstance(value, str) or any(part in value for part in REFUSALS[name]), (name, value)
        assert f"| {way} | {' | '.join(map(cell, found.values()))} | named |" in PAGE.read_text()
    message = run(rank_mesh.killed, way, str(tmp_path), ranks=count, dying=[1])[0]
    assert any(f"{names} not answered for 2 s" in message for names in ("rank 1 has", "ranks 1, 3 have"))  # 3 may wait
