"""Ranks that have a stage of a pipeline each, or a part of every sequence each: as in one process, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.processes import run
from support.ranks import parts
from support.releases import TORCH_2_9


@pytest.mark.skipif(TORCH_2_9, reason="pipelines of PyTorch 2.9 fail on Gloo when they exchange shapes")
def test_the_adapters_of_stages_are_joined_and_saved(tmp_path: Path) -> None:
    for measured in run(parts.piped, str(tmp_path)):
        assert measured.pop("before") > 1e-3
        assert "no stage contains the adapter parameter" in str(measured.pop("a copy"))
        assert "the stages of ranks [0, 1] share the adapter parameter" in str(measured.pop("shared"))
        assert max(float(value) for value in measured.values()) < 1e-6


@pytest.mark.nightly
def test_ranks_with_parts_of_sequences() -> None:
    for measured in run(parts.of_tokens):
        said = {name: value for name, value in measured.items() if isinstance(value, str)}
        assert said.keys() == {"prompt-tuning", "prefix-tuning", "reft", "alora"}
        assert all("needs full sequences, but context_parallel splits them" in text for text in said.values())
        assert max(value for value in measured.values() if not isinstance(value, str)) < 1e-6
