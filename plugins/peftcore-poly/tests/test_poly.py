"""Poly: files to and from Hugging Face PEFT, tasks from the call, what training draws, and invalid configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import TASKS, moved, quiet, same_start
from support.whole_run import nightly_but
from torch import nn

import peftcore
from peftcore.plugin import disturb

ROWS = torch.tensor([2, 1])
TARGETS = {"llama": ["k_proj", "down_proj"], "bert": ["key", "output.dense"], "t5": ["k", "v", "wo"]}
FIELDS: dict[str, Any] = {"r": 3, "n_tasks": 3, "n_skills": 2}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one task": {"n_tasks": 1},
    "splits": {"n_splits": 4, "n_skills": 5},
    "drawn": {"init_weights": False, "r": 2},
    "without": {"exclude_modules": ["0.self_attn.k_proj"]},
}


def peft_poly(kind: str, **fields: Any) -> nn.Module:
    config = peft.PolyConfig(task_type=TASKS[kind], target_modules=TARGETS[kind], **fields)
    return quiet(peft.get_peft_model, tiny.MODELS[kind](), config).eval()


def logits(model: Any, tasks: torch.Tensor = ROWS) -> torch.Tensor:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        actual: torch.Tensor = quiet(model, **tiny.inputs(base), task_ids=tasks).logits
    return actual


@pytest.mark.parametrize("kind", nightly_but(TARGETS, ["llama"]))
@pytest.mark.parametrize("case", list(CASES))
def test_files(case: str, kind: str, tmp_path: Path) -> None:
    fields = {**FIELDS, **CASES[case]}
    if kind != "llama":
        fields.pop("exclude_modules", None)
    tasks = ROWS % fields["n_tasks"]
    model = peftcore.apply(tiny.MODELS[kind](), "poly", target_modules=TARGETS[kind], **fields)
    disturb(model, "default", seed=1, std=0.5)
    actual = logits(model, tasks)
    assert (actual - tiny.logits(tiny.MODELS[kind]())).abs().max() > 1e-3
    if fields["n_tasks"] > 1:
        assert (actual - logits(model, tasks.flip(0))).abs().max() > 1e-4
    peftcore.save(model, tmp_path / "peftcore")
    read = quiet(peft.PeftModel.from_pretrained, tiny.MODELS[kind](), tmp_path / "peftcore").eval()
    torch.testing.assert_close(logits(read, tasks), actual, rtol=0, atol=1e-5)
    other = moved(peft_poly(kind, **fields))
    quiet(other.save_pretrained, tmp_path / "peft")
    model = peftcore.load(tiny.MODELS[kind](), tmp_path / "peft")
    torch.testing.assert_close(logits(model, tasks), logits(other, tasks), rtol=0, atol=1e-5)


def test_it_starts_as_peft_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {**FIELDS, "n_tasks": 40, "n_splits": 2, "init_weights": False, "target_modules": TARGETS["llama"]}
    model = peftcore.apply(tiny.llama(), "poly", **fields)
    same_start(tiny.llama, tmp_path, model, peft.PolyConfig(task_type="CAUSAL_LM", **fields))


def test_training_draws_what_evaluation_has_on_average() -> None:
    """The relaxed Bernoulli of torch, by the same uniform numbers."""
    model = peftcore.apply(tiny.llama(), "poly", **FIELDS, target_modules=["k_proj"])
    disturb(model, "default", seed=1, std=1.0)
    router = model.model.layers[0].self_attn.k_proj.peftcore["default"].poly_router
    torch.manual_seed(3)
    actual = router(ROWS, draws=True)
    torch.manual_seed(3)
    z = torch.distributions.RelaxedBernoulli(
        temperature=torch.tensor(1.0), logits=router.module_logits[ROWS].unflatten(1, (1, 2))
    ).rsample()
    torch.testing.assert_close(actual, z / z.sum(-1, keepdim=True))
    assert not torch.equal(model.train()(**tiny.inputs(model), task_ids=ROWS).logits, logits(model.eval()))


def test_a_router_learns_for_the_tasks_that_are_named() -> None:
    model = peftcore.apply(tiny.llama(), "poly", **FIELDS, target_modules=["k_proj", "v_proj"])
    disturb(model, "default", seed=1, std=0.5)
    with peftcore.call_arguments(model, task_ids=ROWS):
        model(**tiny.inputs(model)).logits.square().mean().backward()
    router = model.model.layers[0].self_attn.v_proj.peftcore["default"].poly_router
    assert router.module_logits.grad.abs().sum(1).gt(0).tolist() == [False, True, True]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="n_splits=5 does not divide inputs and outputs of 'model"):
        peftcore.apply(tiny.llama(), "poly", n_splits=5)
    model = peftcore.apply(tiny.llama(), "poly", **FIELDS)
    with pytest.raises(peftcore.PeftcoreError, match="has 3 tasks, but the call names none"):
        tiny.logits(model)
    with pytest.raises(peftcore.PeftcoreError, match=r"task_ids must be whole numbers from 0 to 2, found \[0, 3\]"):
        logits(model, torch.tensor([0, 3]))
    with pytest.raises(peftcore.PeftcoreError, match=r"the call names 3 tasks, .*this layer's input is"):
        logits(model, torch.tensor([0, 1, 2]))
    with pytest.raises(peftcore.PeftcoreError, match="differently for each of 3 tasks"):
        peftcore.merge(model, undo=True)
