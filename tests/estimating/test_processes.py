"""Predicted step of one of two processes, under DDP and FSDP2, compared with a real one."""

from typing import Any

import pytest
from processes import run
from step_memory import on_a_rank, predicted
from transformers import LlamaConfig
from whole import WHOLE, nightly_but

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
    with pytest.raises(PeftcoreError, match=r"shard: .offload. is not followed.*\. Use only: adapter_placement"):
        peftcore.estimate(CONFIG, "lora", ranks=2, shard={"offload": True})
