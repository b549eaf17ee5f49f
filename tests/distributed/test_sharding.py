"""Two ranks compute what one process computes, for every method, on dense and 4-bit bases."""

from __future__ import annotations

import pytest
from support.processes import run
from support.ranks import cases, rested, work
from support.whole_run import WHOLE, nightly_but

from peftcore.plugin.registry import registry


def test_every_method_is_tried() -> None:
    assert {case.partition(",")[0] for case in cases.CASES} == set(registry.methods())


ALL = list(cases.CASES)
KINDS = ALL if WHOLE else list(cases.KINDS)
# In `make test-all` every method is tried sharded; those of each kind also on a base in 4 bits, and in the other ways.
SHARDED = [case for case in ALL if case in KINDS or not case.endswith(", 4 bits")] if WHOLE else KINDS
HOWS = [["ddp"], ["replicate"], ["shard"], ["replicate checkpointing", "offload"]]


@pytest.mark.parametrize("hows", nightly_but(HOWS, [["ddp"], ["shard"]]), ids=str)
def test_gradients_and_a_step_are_those_of_one_process(hows: list[str]) -> None:
    chosen = SHARDED if hows == ["shard"] else KINDS
    chosen = chosen if hows == ["ddp"] else cases.shardable(chosen)
    for found in run(work.all_against_one_process, hows, chosen):
        assert len(found) == len(chosen) * len(hows)
        wrong = {name: far for name, far in found.items() if max(far) > 1e-6}
        assert not wrong


def test_gradients_where_accelerate_shards() -> None:
    for found in run(work.sharded_by_accelerate, cases.shardable(KINDS)):
        assert [*found] == cases.shardable(KINDS) and max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("how", ["replicate", "shard"])
def test_an_adapter_that_rested_when_the_model_was_sharded_trains_later(how: str, trained_before: bool) -> None:
    assert max(run(rested.awakened, how, trained_before)) <= 1e-6


def test_a_layer_that_no_rank_calls_gets_no_gradient() -> None:
    assert run(rested.uncalled) == [({"layers.0"}, {"default"})] * 2


def test_terms_and_shared_modules_are_those_of_one_process() -> None:
    for found in run(rested.all_against_one_process):
        refused = {name: far for name, far in found.items() if isinstance(far, str)}
        assert refused.keys() == {"seeing, shard", "seeing, shard keeping"}
        assert all("depends on a forward" in far and "adapter_placement='replicate'" in far for far in refused.values())
        wrong = {name: far for name, far in found.items() if name not in refused and max(far) > 1e-6}
        assert not wrong
