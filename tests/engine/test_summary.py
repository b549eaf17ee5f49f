"""Counts of parameters and bytes, before `apply` and after."""

from typing import Any

import pytest
import torch
from support import tiny
from support.mixtures import mixture

import peftcore
from peftcore.engine.summary import Mixture
from peftcore.plugin import OnWeight

pytestmark = pytest.mark.usefixtures("toys")


def test_plan_counts_what_apply_places() -> None:
    model = tiny.llama()
    before = model.state_dict().keys()
    plan = peftcore.plan(model, "around", target_modules=("q_proj", "layers.0.mlp.up_proj"))
    assert plan.matches == {"q_proj": 2, "layers.0.mlp.up_proj": 1}
    assert (plan.trainable_parameters, plan.trainable_bytes) == (3, 12)
    assert plan.base_parameters == sum(p.numel() for p in model.parameters())
    assert model.state_dict().keys() == before and all(p.requires_grad for p in model.parameters())
    assert "3 x Scaled" in str(plan) and "q_proj: 2 modules" in str(plan)
    peftcore.apply(model, plan.config)
    assert peftcore.summary(model).trainable_parameters == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_adapters_share_and_their_buffers_are_counted_once(dtype: torch.dtype) -> None:
    model = tiny.llama()
    plan = peftcore.plan(model, "shared", dtype=dtype)
    assert [count for _, _, count, _ in plan.rows] == [2 * 32 + 2, 2]  # the bank and a gate; a gate
    assert (plan.trainable_parameters, plan.trainable_bytes) == (68, 68 * dtype.itemsize)
    assert (plan.buffers, plan.buffer_bytes) == (64, 64 * dtype.itemsize)
    (found,) = peftcore.summary(peftcore.apply(model, "shared", dtype=dtype)).adapters
    assert (found.parameters, found.bytes) == (68, 68 * dtype.itemsize)
    assert (found.buffers, found.buffer_bytes) == (64, 64 * dtype.itemsize)
    assert peftcore.summary(model).trainable_parameters == 68
    for text in (str(plan), str(peftcore.summary(model))):
        assert f", and 64 numbers in buffers, {'0.3' if dtype.itemsize == 4 else '0.5'} kB" in text
    assert "buffers" not in str(peftcore.plan(tiny.llama(), "around"))


def test_plan_names_what_changes_weights() -> None:
    plan = peftcore.plan(tiny.llama(), "on-weight", names=("model.layers.0.self_attn.q_proj:weight",))
    assert "WeightChanges" not in str(plan) and {kind for _, kind, _, _ in plan.rows} == {"LowRank"}


def test_plan_refuses_what_apply_refuses() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="matches no module"):
        peftcore.plan(tiny.llama(), "around", target_modules=("nothing",))


def test_summary() -> None:
    model = tiny.llama().to(torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    empty = peftcore.summary(model)
    assert (empty.adapters, empty.base_parameters, empty.trainable_parameters) == ((), count, count)
    peftcore.apply(model, "around", adapter="a")
    peftcore.apply(model, "train", names=("lm_head.weight",), adapter="b")
    peftcore.activate(model, "b")
    found = peftcore.summary(model)
    a, b = found.adapters
    assert (found.base_parameters, found.base_bytes) == (count, 2 * count)
    assert (a.active, a.modules, a.parameters, a.bytes) == (False, 2, 2, 8)
    assert (b.active, b.trained, b.parameters, b.bytes) == (True, 1, 96 * 32, 96 * 32 * 2)
    assert found.trainable_parameters == 96 * 32
    assert "b: train, active, 0 modules, 1 tensor of the base" in str(found)


def test_whether_experts_are_fused_and_why_not_is_reported() -> None:
    for kind, way in (
        ("qwen3_moe", "in all; fused\n"),
        ("llama4_text", "Llama4TextExperts: its forward is custom"),
    ):
        model = mixture(kind)
        assert "fused" not in str(peftcore.summary(model)) and "copies" not in str(peftcore.summary(model))
        assert way in str(peftcore.plan(model, "lora"))
        assert way in str(peftcore.summary(peftcore.apply(model, "lora"))) + "\n"
    model = peftcore.quantize(mixture("qwen3_moe"))
    assert str(peftcore.summary(model)).endswith(
        "100 % in 4 bits; a token meets 2 of 4, 50,016 parameters in all; fused"
    )
    model.config._experts_implementation = "mine"
    assert "_experts_implementation='mine' is not one of transformers" in str(peftcore.plan(model, "lora"))


def test_experts_and_four_bits_are_reported() -> None:
    model = mixture("qwen3_moe", num_experts=6)
    count, experts = sum(p.numel() for p in model.parameters()), 2 * 6 * 3 * 32 * 64
    found = peftcore.plan(model, "around", target_modules=("q_proj",)).experts
    assert found == Mixture(
        modules=2, count=6, per_token=2, weights=experts, packed=0, adapted=0, idle=experts * 4 // 6
    )
    peftcore.quantize(model, double_quant=False, skip=["layers.0.mlp.experts", "lm_head", "self_attn"])
    place = lambda *_: [OnWeight("model.layers.1.mlp.experts", "down_proj", tiny.LowRank(6, 64, 32))]  # noqa: E731
    with tiny.installed(tiny.method("down", place)):
        plan = peftcore.plan(model, "down")
        peftcore.apply(model, "down")
    summary = peftcore.summary(model)
    assert plan.experts == summary.experts
    assert plan.experts == Mixture(
        modules=2,
        count=6,
        per_token=2,
        weights=experts,
        packed=experts // 2,
        adapted=experts // 6,
        idle=experts * 4 // 6,
        unfused="Qwen3MoeExperts: its adapter is not a low-rank product",
    )
    assert str(plan).count("; on dense copies of all weights, without dropout: Qwen3MoeExperts: its adapter is no") == 1
    assert summary.base_parameters == count and summary.packed_parameters == experts // 2
    assert summary.packed_bytes == experts // 4 + 4 * experts // 2 // 64 + 2 * 64
    assert summary.base_bytes == 4 * (count - experts // 2) + summary.packed_bytes
    line = "experts: 2 modules of 6, 74.2 % of the parameters; 16.7 % with an adapter, 50 % in 4 bits; a token"
    assert plan.coverage.reached == experts // 6  # and not all that the module holds
    assert line in str(plan) and line in str(summary)
    bits = 8 * summary.packed_bytes / summary.packed_parameters
    assert f"in 4 bits: 36,864 of them (37.08 %), {bits:.3f} bits each with scales" in str(summary)
    assert repr(model.model.layers[1].mlp.experts).count("down_proj=[6, 64, 32] nf4, blocksize=64") == 1
    assert "experts" not in str(peftcore.summary(tiny.llama()))


@pytest.mark.parametrize(("method", "fields"), [("lora", {}), ("shira", {"r": 1}), ("fourierft", {"n_frequency": 9})])
def test_nothing_is_drawn_for_a_model_without_memory(
    method: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = tiny.llama()
    monkeypatch.delattr(torch, "randperm")  # of all numbers of a weight, in each of its layers
    before = torch.random.get_rng_state()
    peftcore.apply(model, method, **fields)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert not torch.empty(0).is_meta
