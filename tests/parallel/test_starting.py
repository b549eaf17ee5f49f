"""A run that torchrun started is joined, and joined again with keys of its own after a restart."""

from __future__ import annotations

import rank_endings
from processes import run


def test_a_restarted_run_has_keys_of_its_own() -> None:
    assert run(rank_endings.started_twice, joined=False) == [[(False, 2.0), (False, 2.0)]] * 2
