"""LoRA on experts of which each of two ranks has half: as in one process, or a clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import run
from support.ranks import bases, divided_experts


@pytest.mark.nightly
@pytest.mark.parametrize("targets", [["experts"], ["experts", "q_proj", "o_proj"]], ids="-".join)
@pytest.mark.parametrize("way", divided_experts.WAYS)
def test_lora_on_experts_is_as_in_one_process(way: str, targets: list[str], tmp_path: Path) -> None:
    bases.write(tmp_path)
    for measured in run(divided_experts.of_experts, str(tmp_path), way, targets):
        assert not {name: value for name, value in measured.items() if value > 1e-6}


@pytest.mark.nightly
def test_what_cannot_follow_divided_experts(tmp_path: Path) -> None:
    bases.write(tmp_path)
    for said in run(divided_experts.refused, str(tmp_path)):
        assert "Set dropout to 0 for these adapters" in said["dropout"]
        assert "which only low-rank adapters of single experts support" in said["another change"]
        assert said["merge"].startswith("cannot merge: the model is sharded")
