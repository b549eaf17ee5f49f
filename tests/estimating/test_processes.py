"""Predicted step of one of two processes, under DDP and FSDP2, compared with a real one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import run
from support.step_memory import divided_on_a_rank, on_a_rank, predicted
from support.whole_run import WHOLE, nightly_but
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.estimating import Step

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=3, vocab_size=321)  # no rank has half of such a vocabulary
ON_TWO = {"batch_size": 2, "length": 24, "ranks": 2}
CASES: dict[str, tuple[Any, Step, dict[str, Any]]] = {
    "ddp": ("lora", Step(**ON_TWO), {}),
    "ddp, every parameter": (None, Step(**ON_TWO), {}),
    "ddp, checkpointing": ("lora", Step(**ON_TWO, gradient_checkpointing=True), {}),
    "ddp, two batches": ("lora", Step(**ON_TWO, gradient_accumulation=2), {}),
    "fsdp2": ("lora", Step(**ON_TWO, shard=True), {}),
    "fsdp2, adapters in shards": ("lora", Step(**ON_TWO, shard={"adapter_placement": "shard"}), {}),
    "fsdp2, whole until the backward": ("lora", Step(**ON_TWO, shard={"reshard_after_forward": False}), {}),
    "fsdp2, checkpointing": ("lora", Step(**ON_TWO, shard=True, gradient_checkpointing=True), {}),
    "fsdp2, older checkpointing": ("lora", Step(**ON_TWO, shard=True, gradient_checkpointing="reentrant"), {}),
    "fsdp2, two batches": ("lora", Step(**ON_TWO, shard={"adapter_placement": "shard"}, gradient_accumulation=2), {}),
    "fsdp2, 4 bits": ("lora", Step(**ON_TWO, shard=True), {"quantize": "nf4"}),
    "fsdp2, every parameter": (None, Step(**ON_TWO, shard=True), {}),
}
with_plans = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "_resolve_parallel_plans"), reason="transformers 5.24 divides models by plans"
)
ON_PARTS = {"batch_size": 2, "length": 24, "tp_size": 2}
OF_TENSORS: dict[str, tuple[Any, Step, dict[str, Any]]] = {
    "tensor parallel": ("lora", Step(**ON_PARTS, ranks=2), {}),
    "tensor parallel, checkpointing": ("lora", Step(**ON_PARTS, ranks=2, gradient_checkpointing=True), {}),
    "tensor parallel, two batches": ("lora", Step(**ON_PARTS, ranks=2, gradient_accumulation=2), {}),
    "tensor parallel, ia3": ("ia3", Step(**ON_PARTS, ranks=2), {}),
    "tensor parallel, trained norms": ("ln-tuning", Step(**ON_PARTS, ranks=2), {}),
    "tensor parallel, adapter": ("adapter", Step(**ON_PARTS, ranks=2), {}),
    "tensor parallel and fsdp2": ("lora", Step(**ON_PARTS, ranks=4, shard=True), {}),
    "tensor parallel and fsdp2, checkpointing": (
        "lora", Step(**ON_PARTS, ranks=4, shard=True, gradient_checkpointing=True), {},
    ),
}  # fmt: skip
IN_BLOCKS = {**SIZES, "hidden_size": 128, "intermediate_size": 256}  # parts of rows are whole blocks
IN_4_BITS: dict[str, tuple[Any, Step, dict[str, Any]]] = {
    "nf4": ("lora", Step(**ON_PARTS, ranks=2), {"quantize": "nf4"}),
    "nf4, checkpointing": ("lora", Step(**ON_PARTS, ranks=2, gradient_checkpointing=True), {"quantize": "nf4"}),
    "mxfp4": ("lora", Step(**ON_PARTS, ranks=2), {"quantize": "mxfp4"}),
    "affine4": ("lora", Step(**ON_PARTS, ranks=2), {"quantize": "affine4"}),
    "qlora": ("qlora", Step(**ON_PARTS, ranks=2), {}),
}
DAILY = ("ddp", "fsdp2", "fsdp2, checkpointing")


def all_on_a_rank(config: Any, cases: dict[str, tuple[Any, Step, dict[str, Any]]]) -> dict[str, tuple[int, int]]:
    return {name: on_a_rank(config, *case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, int]]:
    """Of the first rank, which has the largest shards."""
    cases = CASES if WHOLE else {name: CASES[name] for name in DAILY}
    return run(all_on_a_rank, CONFIG, cases)[0]


@pytest.mark.parametrize("case", nightly_but(CASES, DAILY))
def test_is_what_the_allocator_of_a_rank_reports(case: str, measured: dict[str, tuple[int, int]]) -> None:
    method, step, fields = CASES[case]
    found = peftcore.estimate(CONFIG, method, step=step, **fields)
    most, present = measured[case]
    assert found.parts["base"] + found.parts["adapters"] == pytest.approx(present, rel=1e-3)
    # gloo's threads give some messages back late.
    late = 2 * max((s.bytes for s in found.storages if s.kind == "between ranks"), default=0) if step.is_sharded else 0
    assert 0.98 * most - late <= predicted(found) <= 1.02 * most


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("sizes", "cases"),
    [
        (SIZES, {name: case for name, case in OF_TENSORS.items() if case[1].ranks == 2}),
        (SIZES, {name: case for name, case in OF_TENSORS.items() if case[1].ranks == 4}),
        (IN_BLOCKS, IN_4_BITS),
    ],
    ids=["dense", "dense and fsdp2", "4 bits"],
)
def test_is_what_a_rank_of_tensor_parallelism_holds(
    sizes: dict[str, int], cases: dict[str, tuple[Any, Step, dict[str, Any]]], tmp_path: Path
) -> None:
    """Both where layers are divided, and where FSDP2 shards the parts over a second dimension of the mesh."""
    config = LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=320)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    count = next(iter(cases.values()))[1].ranks
    measured = run(divided_on_a_rank, str(tmp_path), cases, ranks=count)[0]
    for name, (method, step, fields) in cases.items():
        found = peftcore.estimate(config, method, step=step, **fields)
        most, present = measured[name]
        assert found.parts["base"] + found.parts["adapters"] == present, name
        sent = [s for s in found.storages if s.kind == "between ranks" or "c10d" in found.operations[s.born].name]
        late = 2 * max(s.bytes for s in sent)
        assert 0.98 * most - late <= predicted(found) <= 1.02 * most, (name, predicted(found), most)


@with_plans
def test_a_rank_of_tensor_parallelism_has_parts() -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=1, vocab_size=320)
    whole, part = (peftcore.estimate(config, "lora", batch_size=2, length=8, ranks=n, tp_size=n) for n in (1, 2))
    assert part.parts["adapters"] == whole.parts["adapters"] and not torch.distributed.is_initialized()
    norms = 4 * (3 * 64 + 16)  # and the frequencies of rotary embeddings, twice
    assert 2 * (part.parts["base"] - norms) == whole.parts["base"] - norms
    assert "one of 2 ranks (tensor parallel over 2)" in str(part)


@with_plans
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 6, "tp_size": 4}, "ranks must be a multiple of tp_size .4., found 6"),
        ({"ranks": 4, "tp_size": 2}, "form several tensor-parallel groups, .* Add shard=True, or .* ranks=2"),
        ({"ranks": 4, "tp_size": 4}, "tp_size=4 does not divide the 2 heads .num_key_value_heads.. Choose a divisor"),
        (
            {"ranks": 2, "tp_size": 2, "quantize": "nf4"},
            "is sharded over 2 ranks after 32 columns, which is not a multiple of the 64 values that share a scale",
        ),
        ({"ranks": 2, "tp_size": 2, "method": None}, "tp_size=2 can only be estimated with adapters, .* Pass a method"),
    ],
)
def test_what_is_not_followed_of_tensor_parallelism(options: dict[str, Any], message: str) -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=1, vocab_size=320)
    with pytest.raises(PeftcoreError, match=message):
        peftcore.estimate(config, options.pop("method", "lora"), batch_size=2, length=8, **options)
    assert not torch.distributed.is_initialized()


def test_what_ranks_change() -> None:
    alone, ddp, fsdp2 = (
        peftcore.estimate(CONFIG, "lora", batch_size=2, length=24, **more)
        for more in ({}, {"ranks": 4}, {"ranks": 4, "shard": True})
    )
    trained = alone.parts["adapters"]
    assert ddp.parts["between ranks"] == trained  # all gradients once more, as wide as the adapters
    assert ddp.parts["base"] == alone.parts["base"] > 3.9 * fsdp2.parts["base"]
    assert fsdp2.parts["gathered weights"] > 0 and fsdp2.parts["adapters"] == trained
    assert "one of 4 ranks (FSDP2)" in str(fsdp2) and "one of 4 ranks (DDP)" in str(ddp)


def test_all_ranks_of_a_machine_take_of_its_memory() -> None:
    one, four = (peftcore.estimate(CONFIG, "lora", batch_size=2, length=24, device="cpu", ranks=n) for n in (1, 4))
    assert one.device is not None and four.device is not None
    from dataclasses import replace

    room = replace(four.device, memory=2 * four.needed)
    assert replace(one, device=room).fits and not replace(four, device=room).fits


def test_methods_that_act_beside_the_blocks() -> None:
    for method in ("prompt-tuning", "prefix-tuning", "vera"):
        found = peftcore.estimate(CONFIG, method, **ON_TWO, shard=True)
        assert found.parts["base"] < 0.6 * peftcore.estimate(CONFIG, method, **ON_TWO).parts["base"]


def test_what_is_not_followed() -> None:
    with pytest.raises(PeftcoreError, match=r"shard: .offload. is not supported.*\. Use only: adapter_placement"):
        peftcore.estimate(CONFIG, "lora", ranks=2, shard={"offload": True})
