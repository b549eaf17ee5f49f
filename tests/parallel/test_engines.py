"""Engines train, save and resume eight kinds of methods as one process does, as the table in docs/distributed.md says.

DeepSpeed's rows are run by `make test-engines`, the others in `make test-all`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import rank_engines
import rank_work
from processes import run

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
ZERO = ["ZeRO-1", "ZeRO-2", "ZeRO-3"]
with_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


def row(engine: str, found: dict[str, dict[str, float] | str]) -> str:
    """The line of an engine in the table of docs/distributed.md."""
    cells = []
    for measured in found.values():
        if isinstance(measured, str):
            cells.append("refused")
        else:
            worst = max(measured.values())
            cells.append("right" if worst <= 1e-6 else f"wrong by {worst}")
    return f"| {engine} | {' | '.join(cells)} |"


def check(engine: str, found: dict[str, dict[str, float] | str]) -> None:
    line = row(engine, found)
    assert line in PAGE.read_text().splitlines(), f"docs/distributed.md lacks {line}\n{found}"


def test_the_table_names_the_methods() -> None:
    lines = PAGE.read_text().splitlines()
    assert f"| engine | {' | '.join(rank_engines.METHODS)} |" in lines
    assert all(any(line.startswith(f"| {engine} |") for line in lines) for engine in ("DDP", "FSDP2", "Trainer", *ZERO))


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "accelerate"])
def test_a_loop_of_ones_own(engine: str, tmp_path: Path) -> None:
    for found in run(rank_engines.table, [engine], str(tmp_path)):
        check(engine, found[engine])


@pytest.mark.nightly
def test_trainer(tmp_path: Path) -> None:
    folder = str(tmp_path)
    [alone] = run(rank_engines.trained_by_trainer, f"{folder}/alone", True, ranks=1, joined=False)
    two = run(rank_engines.trained_by_trainer, folder, False, joined=False)
    [resumed] = run(rank_engines.trained_by_trainer, folder, True, ranks=1, joined=False)
    for of_rank in two:
        found = {
            name: {
                "equal": rank_work.farthest(of_rank[name], wanted),
                "resume": rank_work.farthest(resumed[name], wanted),
            }
            for name, wanted in alone.items()
        }
        check("Trainer", found)


@with_deepspeed
@pytest.mark.parametrize("engine", ZERO)
def test_deepspeed(engine: str, tmp_path: Path) -> None:
    for found in run(rank_engines.table, [engine], str(tmp_path), seconds=600):
        check(engine, found[engine])
    [told] = run(rank_engines.zero_on_one_rank, int(engine[-1]), f"{tmp_path}/{engine}/LoRA", ranks=1)
    assert "used a DP world size of 2 but the current world size is 1" in told
