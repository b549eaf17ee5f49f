"""Hugging Face PEFT loads adapters saved here, and vice versa; training takes the same course."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import TASKS, both_ways, logits, moved, quiet
from support.whole_run import nightly_but

import peftcore
from peftcore.engine import adapter_parameters

TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"], "bert": ["query", "output.dense"], "t5": ["q", "wo"]}
SCHEDULE = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 10}


@pytest.mark.parametrize("kind", nightly_but(tiny.MODELS, ["llama", "gpt2"]))
def test_files(kind: str, tmp_path: Path) -> None:
    names = TARGETS[kind]
    fields: dict[str, Any] = {"target_modules": names, "fan_in_fan_out": kind == "gpt2", **SCHEDULE}
    model = peftcore.apply(tiny.MODELS[kind](), "adalora", **fields)
    both_ways(tiny.MODELS[kind], tmp_path, model, peft.AdaLoraConfig(task_type=TASKS[kind], **fields))


def test_a_training_goes_the_way_of_peft_s(tmp_path: Path) -> None:
    """Losses, budgets and factors of ten steps from one start; and the pruned file is read."""
    torch.manual_seed(1)
    fields: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], **SCHEDULE}
    peftcore.save(peftcore.apply(tiny.llama(), "adalora", **fields), tmp_path / "start", resumable=False)
    peft_model = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path / "start", is_trainable=True)
    model = peftcore.load(tiny.llama(), tmp_path / "start", trainable=True)
    steps = SCHEDULE["total_step"]
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=3e-2) for m in (model, peft_model)
    ]
    for step in range(1, steps + 1):
        loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss + peftcore.extra_loss(model)
        loss.backward()
        optimizers[0].step()
        peftcore.after_step(model, step, steps)
        expected = peft_model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
        expected.backward()
        optimizers[1].step()
        peft_model.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    triplet_counts = {n: (p != 0).sum().item() for n, p in adapter_parameters(model, "default") if n.endswith("lora_E")}
    assert sum(triplet_counts.values()) == SCHEDULE["target_r"] * len(triplet_counts)
    torch.testing.assert_close(logits(model), logits(peft_model), rtol=0, atol=1e-4)
    quiet(peft_model.save_pretrained, tmp_path / "pruned")
    reloaded = peftcore.load(tiny.llama(), tmp_path / "pruned", trainable=True)
    torch.testing.assert_close(logits(reloaded), logits(peft_model), rtol=0, atol=1e-5)
    peftcore.save(reloaded, tmp_path / "again")
    read = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(read), logits(reloaded), rtol=0, atol=1e-5)


def test_a_schedule_without_steps_is_refused() -> None:
    model = peftcore.apply(tiny.llama(), "adalora", tinit=5, tfinal=5)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"no step \(total_step=10, tinit=5, tfinal=5\). Set max_steps or total_step"
    ):
        peftcore.after_step(model, 1, 10)


def test_a_file_with_target_r_above_init_r_keeps_its_triplets(tmp_path: Path) -> None:
    """PEFT's default target_r is 8: it trains such an adapter where nobody drives the schedule, and all of it stays."""
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=3, total_step=4)
    peft_model = moved(quiet(peft.get_peft_model, tiny.llama(), config).eval())
    quiet(peft_model.save_pretrained, tmp_path / "peft")
    model = peftcore.load(tiny.llama(), tmp_path / "peft", trainable=True)
    expected = logits(peft_model)
    assert (expected - logits(tiny.llama())).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    for step in range(1, 5):
        model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
        peftcore.after_step(model, step, 4)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    peftcore.save(model, tmp_path / "peftcore")
    reloaded = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path / "peftcore").eval()
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=1e-5)


def test_a_new_adapter_cannot_grow() -> None:
    model = tiny.llama()
    with pytest.raises(peftcore.PeftcoreError, match=r"target_r=8 is above init_r=4.*a target_r of at most 4"):
        peftcore.apply(model, "adalora", init_r=4)
    assert not any("peftcore" in name for name, _ in model.named_modules())
