"""Terms of the loss, and a module that adapters share, on two ranks as in one process."""

from __future__ import annotations

from support.processes import run
from support.ranks import rested


def test_terms_and_shared_modules_are_those_of_one_process() -> None:
    for found in run(rested.all_against_one_process):
        refused = {name: far for name, far in found.items() if isinstance(far, str)}
        assert refused.keys() == {"seeing, shard", "seeing, shard keeping"}
        assert all("depends on a forward" in far and "adapter_placement='replicate'" in far for far in refused.values())
        wrong = {name: far for name, far in found.items() if name not in refused and max(far) > 1e-6}
        assert not wrong
