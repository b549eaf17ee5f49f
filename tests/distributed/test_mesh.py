"""Eight kinds of methods on bases that ranks divide in six ways, as tests/distributed/engines.csv says."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import engine_table
from support.processes import run
from support.ranks import bases, meshes


@pytest.mark.nightly
@pytest.mark.parametrize("way", meshes.WAYS)
def test_methods_are_right_or_refused_as_the_table_says(way: str, tmp_path: Path) -> None:
    bases.write(tmp_path)
    count = 4 if " and " in way else 2
    found = run(meshes.table, way, str(tmp_path), ranks=count)
    for what in ("equal", "save", "resume"):
        engine_table.check(way, what, engine_table.worst(found, what))
    messages = run(meshes.killed, way, str(tmp_path), ranks=count, dying=[1])[0]
    engine_table.check(way, "killed", messages)
    assert not list(tmp_path.glob("killed, *"))
