"""Counts of parameters and bytes, before `apply` and after."""

import pytest
import tiny
import torch

import peftcore

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
    assert "b: train, active, 0 modules, 1 parameters of the base" in str(found)
