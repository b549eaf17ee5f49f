"""Eight kinds of methods on bases that ranks divide in six ways, as tests/parallel/engines.csv says."""

from __future__ import annotations

from pathlib import Path

import engine_table
import pytest
import rank_bases
import rank_mesh
from processes import run


@pytest.mark.nightly
@pytest.mark.parametrize("way", rank_mesh.WAYS)
def test_methods_are_right_or_refused_as_the_table_says(way: str, tmp_path: Path) -> None:
    rank_bases.write(tmp_path)
    count = 4 if " and " in way else 2
    found = run(rank_mesh.table, way, str(tmp_path), ranks=count)
    for what in ("equal", "save", "resume"):
        engine_table.check(way, what, engine_table.worst(found, what))
    messages = run(rank_mesh.killed, way, str(tmp_path), ranks=count, dying=[1])[0]
    engine_table.check(way, "killed", messages)
    assert not list(tmp_path.glob("killed, *"))
