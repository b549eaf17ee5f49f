"""A run that torchrun started is joined, and joined again with keys of its own after a restart."""

from __future__ import annotations

from support.processes import run
from support.ranks import endings


def test_a_restarted_run_has_keys_of_its_own() -> None:
    assert run(endings.started_twice, joined=False) == [[(False, 2.0), (False, 2.0)]] * 2
