"""4-bit weights of which each of two ranks has a part, under tensor parallelism: the bits and values of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.processes import run
from support.ranks import bases, divided_weights


@pytest.mark.nightly
@pytest.mark.parametrize(
    "work", [divided_weights.of_formats, divided_weights.of_methods, divided_weights.in_other_orders]
)
def test_parts_are_those_of_one_process(work: Any, tmp_path: Path) -> None:
    bases.write(tmp_path)
    for measured in run(work, str(tmp_path)):
        said = {name: value for name, value in measured.items() if isinstance(value, str)}
        assert {
            name: part for name, part in divided_weights.REFUSALS.items() if part in said.get(name, "")
        }.keys() == said.keys()
        assert max(value for value in measured.values() if not isinstance(value, str)) < 1e-6
        assert all(value == 0.0 for name, value in measured.items() if name.endswith("weights"))
