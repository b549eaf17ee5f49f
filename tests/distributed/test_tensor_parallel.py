"""Adapters on a base that transformers' tensor parallelism divides over two ranks: as in one process, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.processes import run
from support.ranks import bases, dimensions, tensor_parallel
from support.whole_run import WHOLE
from transformers import PreTrainedModel

pytestmark = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "_resolve_parallel_plans"), reason="transformers 5.24 divides models by plans"
)

CASES = [case for case in bases.DENSE if "," not in case]
DAILY = ["lora", "qlora", "dora", "ia3", "prefix-tuning", "bitfit", "adaption-prompt"]
HOOKS = {
    "hooks, saved modules": "'lm_head.weight' is already sharded and cannot be trained",
    "hooks, tokens": "shards the tokens of 'model.layers.0.self_attn'",
    "hooks, shard": "peftcore.shard is not needed",
}
PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = tmp_path_factory.mktemp("bases")
    bases.write(found)
    return str(found)


@pytest.fixture(scope="module")
def found(folder: str) -> list[Any]:
    """(differences of methods, of LoRA) on each rank; the ranks start once."""
    return run(tensor_parallel.everything, folder, CASES if WHOLE else DAILY, WHOLE)


def row(case: str, measured: dict[str, float | str]) -> str:
    """The line of a method in the table of docs/distributed.md."""
    if "refused" in measured:
        return f"| {case} | refused | | | |"
    names = ["gradients", "step", "ranks"], ["loaded by one"], ["loaded by two"], ["merged"]
    cells = []
    for group in names:
        values = [measured[name] for name in group]
        refused = any(isinstance(value, str) for value in values)
        cells.append("refused" if refused else "right" if max(values) <= 2e-6 else f"wrong by {max(values)}")
    return f"| {case} | {' | '.join(cells)} |"


def test_methods_are_right_or_refused_as_the_table_says(found: list[Any]) -> None:
    page = PAGE.read_text().splitlines()
    for table, _ in found:
        assert [line for line in (row(*each) for each in table.items()) if line not in page] == []
        assert max(each.get("ranks", 0.0) for each in table.values()) == 0.0
        assert [case for case, each in table.items() if "refused" in each] == []


def test_lora_in_every_way_that_a_layer_is_divided(found: list[Any]) -> None:
    for _, measured in found:
        said = {name: value for name, value in measured.items() if isinstance(value, str)}
        assert said.keys() == {"random states", "batches", "shard", "a norm of heads", *HOOKS}
        assert "Use the same seed on all ranks" in said["random states"]
        assert "Give all ranks the same batch" in said["batches"]
        assert "peftcore.shard is not needed" in said["shard"]
        assert "shards the work of 'model.layers.0.self_attn.q_norm'" in said["a norm of heads"]
        assert all(part in said[name] for name, part in HOOKS.items())
        values = {name: value for name, value in measured.items() if not isinstance(value, str)}
        assert values.pop("float64") < 1e-14
        assert values.pop("random start") == 0.0
        assert not {name: value for name, value in values.items() if value > 1e-6}


def test_trained_parameters_start_equal_on_all_ranks(folder: str) -> None:
    assert run(tensor_parallel.random_start_of_trained, folder) == [0.0, 0.0]


def check(measured: dict[str, float | str], refused: dict[str, str]) -> None:
    said = {name: value for name, value in measured.items() if isinstance(value, str)}
    assert said.keys() == refused.keys()
    assert all(part in said[name] for name, part in refused.items())
    assert max(value for value in measured.values() if not isinstance(value, str)) < 2e-6


@pytest.mark.nightly
def test_a_mesh_of_fsdp_and_tensor_parallelism(folder: str) -> None:
    for measured in run(dimensions.of_mesh, folder, ranks=4):
        check(
            measured,
            {
                "mesh, merge": "cannot merge: the model is sharded",
                "mesh, modules": "is already sharded and cannot be trained",
            },
        )


@pytest.mark.nightly
def test_experts_that_the_ranks_share_out(folder: str) -> None:
    for measured in run(dimensions.of_experts, folder):
        check(measured, {})
