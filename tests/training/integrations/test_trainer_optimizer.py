"""Groups of parameters that methods make, in Trainer: with any optimizer and scheduler, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.trainers import trainer
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

import peftcore


def first_fast(adapters: Any, config: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The first adapter learns 16 times as fast, without decay; of the second nothing is said."""
    first, *_ = adapters.values()
    return [{"params": first.parameters(), "lr": 16 * lr, "weight_decay": 0.0}]


@pytest.fixture(autouse=True)
def grouped() -> Any:
    with tiny.installed(tiny.method("fast", parameter_groups=first_fast), tiny.method("train", tiny.PLACES["train"])):
        yield


def model() -> nn.Module:
    found = peftcore.apply(tiny.llama(), "fast", value=1.0)
    return peftcore.apply(found, "train", adapter="base", names=("model.norm.weight", "lm_head.weight"))


def groups(done: Trainer, found: nn.Module) -> list[tuple[set[str], float, float]]:
    """(names, learning rate, decay) of each."""
    names = {id(p): name.rpartition("layers.")[2] for name, p in found.named_parameters()}
    optimizer: Optimizer = done.optimizer
    return [({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adafactor", "sgd", "paged_adamw_8bit", "lion_32bit", "paged_lion_32bit"]
)
def test_trainer_has_the_groups(optim: str, tmp_path: Path) -> None:
    found = model()
    done = trainer(tmp_path, found, optim=optim, weight_decay=0.1, learning_rate=0.01)
    done.create_optimizer()
    (first, *rest), (second, third) = groups(done, found)[:1], groups(done, found)[1:]
    assert rest == [] and len(first[0]) == 1 and "0.self_attn" in next(iter(first[0])) and first[1:] == (0.16, 0.0)
    assert len(second[0]) == 2 and {"lm_head.weight"} < second[0] and second[1:] == (0.01, 0.1)
    assert third == ({"model.norm.weight"}, 0.01, 0.0)
    assert done.optimizer_cls_and_kwargs is None or "params" not in done.optimizer_cls_and_kwargs[1]


def test_settings_of_the_arguments_reach_the_optimizer(tmp_path: Path) -> None:
    settings = {"adam_beta1": 0.7, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    done = trainer(tmp_path, model(), optim="paged_adamw_8bit", **settings)
    done.create_optimizer()
    for group in done.optimizer.param_groups:
        assert group["betas"] == (0.7, 0.95) and group["eps"] == 1e-6


def test_a_scheduler_keeps_the_ratio_and_a_resume_goes_on(tmp_path: Path) -> None:
    found, rates = model(), []

    class Seeing(Trainer):
        def training_step(self, *arguments: Any) -> Any:
            rates.append([group["lr"] for group in self.optimizer.param_groups])
            return super().training_step(*arguments)

    settings = {"lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 1, "warmup_steps": 1}
    trainer(tmp_path, found, Seeing, max_steps=4, **settings).train()
    assert [pytest.approx(slow * 16) for _, slow, _ in rates] == [fast for fast, _, _ in rates] and rates[1][1] > 0
    resumed = model()
    trainer(tmp_path, resumed, Seeing, max_steps=4, **settings).train(str(tmp_path / "checkpoint-2"))
    assert rates[4:] == rates[2:4]
    for a, b in zip(found.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_groups_trainer_goes_its_own_way(tmp_path: Path) -> None:
    found = model()
    peftcore.activate(found, ["base"])
    done = trainer(tmp_path, found, weight_decay=0.1, learning_rate=0.01)
    done.create_optimizer()
    assert groups(done, found) == [({"lm_head.weight"}, 0.01, 0.1), ({"model.norm.weight"}, 0.01, 0.0)]


def test_an_optimizer_that_groups_by_itself_is_refused(tmp_path: Path) -> None:
    class Factory:
        def __call__(self, model: Any, **options: Any) -> Any:
            raise AssertionError("is not made")

    done = trainer(tmp_path, model())
    done.optimizer_cls_and_kwargs = (Factory, {})
    with pytest.raises(peftcore.PeftcoreError, match="forms its own parameter groups"):
        done.train()
    done.optimizer_cls_and_kwargs = (torch.optim.SGD, {"params": done.model.parameters(), "lr": 0.1})
    with pytest.raises(peftcore.PeftcoreError, match="forms its own parameter groups"):
        done.train()


def test_an_optimizer_that_the_user_made_stays(tmp_path: Path) -> None:
    found = model()
    done = trainer(tmp_path, found)
    done.optimizer = torch.optim.SGD(peftcore.parameter_groups(found, lr=0.1), lr=0.1)
    done.train()
    assert [group["initial_lr"] for group in done.optimizer.optimizer.param_groups] == [1.6, 0.1, 0.1]


@pytest.mark.parametrize("ratio", [None, 4.0])
def test_groups_that_the_trainer_makes(ratio: float | None, tmp_path: Path) -> None:
    """As sentence-transformers' trainer does, whose groups contain parameters of the loss."""
    weight = torch.nn.Parameter(torch.zeros(1))

    class Own(Trainer):
        def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
            kind, options = super().get_optimizer_cls_and_kwargs(args, model)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return kind, {**options, "optimizer_dict": [{"params": [*trained, weight], "weight_decay": 0.5}]}

    model = peftcore.apply(tiny.llama(), "lora", r=2, lora_plus_ratio=ratio)
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.01, report_to="none", use_cpu=True)
    groups = Own(model=model, args=arguments).create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained) + 1 and rates[id(weight)] == 0.01
    faster = {name for name, p in trained.items() if rates[id(p)] == 0.04}
    assert faster == ({name for name in trained if "lora_B" in name} if ratio else set())
