"""Engines train, save and resume eight kinds of methods as one process does, as tests/distributed/engines.csv says.

Rows of DeepSpeed, Lightning and Ray are run by `make test-engines`, the others in `make test-all`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import engine_table
from support.processes import run
from support.ranks import engines, work

ZERO = ["ZeRO-1", "ZeRO-2", "ZeRO-3"]


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}")


def check(engine: str, of_ranks: list[dict[str, Any]], *whats: str) -> None:
    for what in whats:
        engine_table.check(engine, what, engine_table.worst(of_ranks, what))


def test_the_page_is_made_of_the_facts() -> None:
    page = engine_table.PAGE.read_text()
    assert engine_table.of_page(page)[1] == engine_table.table(), "run in tests/: python -m support.engine_table"


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "accelerate"])
def test_a_loop_of_ones_own(engine: str, tmp_path: Path) -> None:
    check(engine, run(engines.table, engine, str(tmp_path / "table")), "equal", "save", "resume")
    engine_table.check(engine, "killed", run(engines.killed, engine, str(tmp_path / "killed"), dying=[1])[0])


@pytest.mark.parametrize(
    "engine", [pytest.param("Trainer", marks=pytest.mark.nightly), pytest.param("Lightning", marks=needs("lightning"))]
)
def test_an_engine_with_a_loop_of_its_own(engine: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "two")
    [alone] = run(engines.by_engine, engine, str(tmp_path / "alone"), True, ranks=1, joined=False)
    for name, case in engines.METHODS.items():
        assert work.farthest(alone[name], work.values(work.adapted(case))) > 1e-3  # it has learned
    two = run(engines.by_engine, engine, folder, False, joined=False)
    [loaded] = run(engines.loaded_of_each, folder, ranks=1, joined=False)
    [resumed] = run(engines.by_engine, engine, folder, True, ranks=1, joined=False)
    found = [
        {
            name: {
                "equal": work.farthest(of_rank[name], wanted),
                "save": work.farthest(loaded[name], of_rank[name]),
                "resume": work.farthest(resumed[name], wanted),
            }
            for name, wanted in alone.items()
        }
        for of_rank in two
    ]
    check(engine, found, "equal", "save", "resume")
    messages = run(engines.killed, engine, str(tmp_path / "killed"), joined=False, dying=[1])[0]
    engine_table.check(engine, "killed", messages)


@needs("deepspeed")
@pytest.mark.parametrize("engine", ZERO)
def test_deepspeed(engine: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "table")
    found = run(engines.table, engine, folder, seconds=600)
    check(engine, found, "equal", "save")
    assert all(float(value) <= engine_table.LIMIT for value in engine_table.worst(found, "resume on as many").values())
    [refused] = run(engines.zero_on_one_rank, engine, folder, ranks=1, seconds=600)
    engine_table.check(engine, "resume", refused)
    messages = run(engines.killed, engine, str(tmp_path / "killed"), dying=[1], seconds=600)[0]
    engine_table.check(engine, "killed", messages)


@needs("ray")
def test_ray_train_of_an_engine(tmp_path: Path) -> None:
    """A worker is killed after the table: both start again, and take the third step from the checkpoint."""
    start = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "support.ranks.ray_workers", str(tmp_path)]
    environment = {**os.environ, **start, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, again = (
        [json.loads((tmp_path / f"{attempt} {rank}.json").read_text()) for rank in (0, 1)]
        for attempt in ("first", "again")
    )
    check("Ray Train", first, "equal", "save", "resume")
    engine_table.check("Ray Train", "killed", {name: max(rank[name] for rank in again) for name in again[0]})
