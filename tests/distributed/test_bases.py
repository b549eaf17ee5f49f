"""Adapters on bases that are divided over two ranks before `apply`: as in one process, or a clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import run
from support.ranks import bases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = tmp_path_factory.mktemp("bases")
    bases.write(found)
    return str(found)


def test_methods_that_read_the_base_on_a_sharded_one(folder: str) -> None:
    """First values that are read off weights (DoRA, PSOFT, DEFT, ...) are those of whole ones."""
    trains_base = {"bitfit", "ln-tuning"}
    for found in run(bases.table_on_shards, folder):
        refused = {case: far for case, far in found.items() if isinstance(far, str)}
        assert refused.keys() == {*trains_base, "qlora"}, refused
        assert all("Apply the adapter before sharding" in refused[case] for case in trains_base)
        assert "peftcore.load_sharded(folder, 'nf4')" in refused["qlora"]
        assert not {case: far for case, far in found.items() if case not in refused and far > 1e-6}


def test_read_computes_tensors_from_whole_weights(folder: str) -> None:
    for errors in run(bases.computed_from_weights, folder):
        assert len(errors) == 3 and max(errors) < 1e-6


def test_what_is_refused(folder: str) -> None:
    for told in run(bases.refused, folder):
        assert "pipeline stages (pp_size)" in told["stage"] and "peftcore.shard(model)" in told["stage"]
        assert "is sharded, so no rank has the full weight. Quantize before" in told["quantize"]
        assert told["merge"].startswith("cannot merge: the model is sharded")
        assert told["old PyTorch"].startswith("PyTorch 2.11.0 cannot shard the integer weights")


def test_ranks_that_trained_each_by_itself_are_not_saved(folder: str) -> None:
    for told in run(bases.drifted, folder, False):
        assert told.startswith("adapter 'default' was not saved: ") and "on rank 1 differs by" in told
        assert "Call peftcore.shard(model)" in told
    assert not (Path(folder) / "adapter").exists()
    assert run(bases.drifted, folder, True) == ["saved", "saved"]
    assert (Path(folder) / "adapter").exists()


def test_a_state_that_each_rank_has_of_its_own_is_not_saved(folder: str) -> None:
    for error in run(bases.drifted_state, folder, False):
        assert error.startswith("adapter 'default' was not saved: the buffer 'model.layers.0.self_attn.q_proj.seen' on")
        assert "rank 1 differs by 1 from rank 0" in error and "average it over the ranks in after_step" in error
    assert not (Path(folder) / "state").exists()
    assert run(bases.drifted_state, folder, True) == ["saved", "saved"]
