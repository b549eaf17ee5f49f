"""Saving, loading and resuming on other numbers of ranks; what cannot work is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from support.processes import kill_one, run
from support.ranks import bases, cases, endings, work
from support.ranks.cases import shards_integers
from support.whole_run import WHOLE, nightly_but

import peftcore
from peftcore.engine import adapter_parameters


@pytest.mark.parametrize("how", ["replicate", "shard"])
@pytest.mark.parametrize("case", [pytest.param("lora, 4 bits", marks=shards_integers), "bitfit", "prefix-tuning"])
def test_a_sharded_adapter_is_saved_whole_and_loads_in_one_process(case: str, how: str, tmp_path: Path) -> None:
    first, second = run(work.saved, case, how, str(tmp_path / "adapter"))
    assert work.farthest(first, second) == 0
    kind, _, quantized = cases.CASES[case]
    base = work.model(kind)
    if quantized:
        peftcore.quantize(base)
    loaded = peftcore.load(base, tmp_path / "adapter")
    assert work.farthest(dict(adapter_parameters(loaded, "default")), first) == 0


def test_every_rank_learns_that_rank_0_could_not_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for told in run(work.save_where_rank_0_cannot, str(tmp_path / "file")):
        assert "the adapter could not be saved" in told


def test_rank_0_writes_in_ddp(tmp_path: Path) -> None:
    run(work.save_in_ddp, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_rank_killed_in_a_save_leaves_a_whole_adapter(tmp_path: Path) -> None:
    """SIGKILL while a sharded model is saved, later each time: 3 times, in `make test-all` 50."""
    base, attempts = work.model(), 50 if WHOLE else 3
    for attempt in range(attempts):
        kill_one(endings.saving, str(tmp_path), after=0.03 * attempt / attempts)
        peftcore.load(base, tmp_path)
        found = {value for _, p in adapter_parameters(base, "default") for value in p.unique().tolist()}
        assert found in ({1.0}, {2.0}), attempt
        peftcore.remove(base)


@pytest.mark.parametrize("how", nightly_but(["fsdp2", "tensor parallelism"], ["fsdp2"]))
def test_a_rank_that_dies_in_a_save_is_named(how: str, tmp_path: Path) -> None:
    if how != "fsdp2":
        bases.write(tmp_path)
    base = None if how == "fsdp2" else bases.base(str(tmp_path), "llama")
    message, _ = run(
        endings.saving_with_a_dying_rank,
        str(tmp_path / "adapter"),
        None if how == "fsdp2" else str(tmp_path),
        dying=[1],
    )
    assert "is consistent: it has either the old adapter or the new one): " in message
    assert "If another rank has exited, check its output" in message
    peftcore.load(base or work.model(), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("r", r"ranks have different adapters: 'default' is lora, .*r=3.* on rank 0, but lora, .*r=4.* on rank 1"),
        ("targets", r"'default' is lora, .*v_proj.* on rank 0, but lora, .*q_proj.* on rank 1"),
        ("base", r"'base' is Llama.* on rank 0, but GPT2LMHeadModel with .* on rank 1"),
    ],
)
def test_ranks_that_differ(what: str, message: str) -> None:
    for told in run(work.different, what):
        assert re.search(message, told), told


def test_what_a_sharded_model_refuses() -> None:
    for told in run(work.refused):
        merging, removing, wrong, late, trained = told
        assert merging.startswith("cannot merge: the model is sharded")
        assert removing.startswith("cannot remove 'default': the model is sharded")
        assert wrong == "adapter_placement must be one of replicate, shard, found 'both'"
        assert late.startswith("the base is already sharded")
        assert "is already sharded and cannot be trained. Apply the adapter before sharding" in trained


def test_shard_needs_a_distributed_run() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"no distributed run has begun.*torchrun"):
        peftcore.shard(work.adapted())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of six steps in one process."""
    [found] = run(work.curve, "alone", str(tmp_path_factory.mktemp("whole")), 0, 6, ranks=1)
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("replicate", 2), ("alone", 1)),
        (("alone", 1), ("replicate", 2)),
        (("shard", 2), ("replicate", 1)),
        (("ddp", 2), ("shard", 2)),
        (("shard", 2), ("shard", 3)),
    ],
    ids=str,
)
def test_resume_on_another_number_of_ranks_continues_the_curve(
    before: tuple[str, int], after: tuple[str, int], whole: list[float], tmp_path: Path
) -> None:
    folder = str(tmp_path / "checkpoint")
    first = run(work.curve, before[0], folder, 0, 3, ranks=before[1])[0]
    second = run(work.curve, after[0], folder, 3, 6, ranks=after[1])[0]
    assert [*first, *second] == pytest.approx(whole, abs=1e-5)
    assert len(set(whole)) == 6


def test_resume_on_another_base_changes_nothing(tmp_path: Path) -> None:
    run(work.curve, "replicate", str(tmp_path), 0, 1)
    [told] = run(work.resume_on_another_base, str(tmp_path), ranks=1)
    assert "the checkpoint was saved on another base: the values of" in told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    work.model().save_pretrained(found, max_shard_size="20KB")
    return found


@pytest.mark.parametrize("quant_type", [None, pytest.param("nf4", marks=shards_integers)])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt_oss"])  # experts one by one in the file, and together
def test_a_model_is_sharded_as_it_is_read(folder: Path, tmp_path: Path, kind: str, quant_type: str | None) -> None:
    base = work.model(kind)
    if kind != "llama":
        folder = tmp_path
        base.save_pretrained(folder, max_shard_size="20KB")
    if quant_type:
        peftcore.quantize(base, quant_type)
    wanted = dict(base.named_parameters())
    losses = []
    for whole, found, held in run(work.load_sharded, str(folder), quant_type):
        assert whole.keys() == wanted.keys()
        assert all(torch.equal(whole[name], wanted[name]) for name in wanted)
        assert held["here"] < (0.53 if kind == "llama" else 0.62) * held["all"]  # of three experts one rank has two
        losses.append(found)
    assert losses[0][1] < losses[0][0] + 1 and losses[0] != losses[1]


@shards_integers
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_bits_of_a_quantized_checkpoint_stay(tmp_path: Path, kind: str) -> None:
    quantized = peftcore.quantize(work.model(kind))
    quantized.save_pretrained(tmp_path)
    wanted = dict(quantized.named_parameters())
    whole, _, _ = run(work.load_sharded, str(tmp_path), None)[0]
    assert all(torch.equal(whole[name], wanted[name]) for name in wanted)


def test_a_checkpoint_that_lacks_a_file_or_a_tensor(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "file")
    file = sorted((tmp_path / "file").glob("model-*.safetensors"))[1]
    file.unlink()
    for told in run(work.damaged, str(tmp_path / "file")):
        assert "is incomplete" in told and file.name in told

    shutil.copytree(folder, tmp_path / "tensor")
    index = json.loads((tmp_path / "tensor" / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / "tensor" / "model.safetensors.index.json").write_text(json.dumps(index))
    for told in run(work.damaged, str(tmp_path / "tensor")):
        assert "1 tensors are missing, such as 'model.norm.weight'" in told


def test_the_reference_of_a_sharded_model() -> None:
    for moved, off in run(work.reference, "replicate"):
        assert moved > 1e-3 and off < 1e-6
    for told in run(work.reference, "shard"):
        assert told.startswith("cannot keep a reference of sharded adapters")
