"""`after_step` that reaches the optimizer, by a method that restarts its factors, like ReLoRA.

    y = base(x) + x (F + B A)ᵀ        every few steps: F += B A, A drawn again, B = 0, the state of both reset

Lialin et al. 2023, arXiv 2307.05695. F is a buffer, so the base stays as it was, and files hold the whole change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.trainers import LR, trainer
from torch import Tensor, nn

import peftcore
from peftcore.engine.current_optimizer import current_optimizer, stepping
from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Method,
    Placement,
    StateRules,
    check_method,
    reset_optimizer_state,
)

EVERY, STEPS = 2, 5


@dataclass(frozen=True)
class ReloraConfig:
    target_module: str = "o_proj"
    rank: int = 2


class Relora(Adapter):
    folded: Tensor
    restarts: Tensor

    def __init__(self, out: int, inputs: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("folded", torch.zeros(out, inputs))
        self.register_buffer("restarts", torch.tensor(0))
        self.down, self.up = nn.Parameter(drawn(0, rank, inputs)), nn.Parameter(torch.zeros(out, rank))

    def change(self) -> Tensor:
        return self.folded + self.up @ self.down

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x) + x @ self.change().T.to(x.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.change(), bias

    @torch.no_grad()
    def restart(self) -> None:
        self.folded.copy_(self.change())
        self.restarts += 1
        self.down.copy_(drawn(int(self.restarts), *self.down.shape))
        self.up.zero_()
        reset_optimizer_state(self.parameters())


def drawn(restart: int, rank: int, inputs: int) -> Tensor:
    return torch.randn(rank, inputs, generator=torch.Generator().manual_seed(restart)) / inputs**0.5


def place(model: nn.Module, config: ReloraConfig, architecture: Architecture) -> list[Placement]:
    layers = [(path, module) for path, module in model.named_modules() if path.endswith(config.target_module)]
    return [Around(path, Relora(*module.weight.shape, config.rank)) for path, module in layers]


def after_step(adapters: Any, config: ReloraConfig, step: int, total_steps: int) -> None:
    if step % EVERY == 0:
        for adapter in adapters.values():
            adapter.restart()


@dataclass(frozen=True)
class PlainConfig(ReloraConfig):
    pass


@pytest.fixture(autouse=True)
def relora() -> Iterator[None]:
    method = Method("restarting", ReloraConfig, place, StateRules(peft_type="RESTARTING"), after_step=after_step)
    with tiny.installed(method, Method("plain", PlainConfig, place, StateRules(peft_type="PLAIN"))):
        yield


def model() -> Any:
    return peftcore.apply(tiny.llama(), "restarting")


def adapters_of(found: nn.Module) -> list[Relora]:
    return [module for module in found.modules() if isinstance(module, Relora)]


def loss_of(found: Any) -> Tensor:
    return found(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss


def by_hand() -> Any:
    """ReLoRA with the base's weights: merge, apply again, and a new optimizer."""
    found = tiny.llama()
    for begin in range(0, STEPS, EVERY):
        peftcore.apply(found, "plain")
        with torch.no_grad():
            for adapter in adapters_of(found):
                adapter.down.copy_(drawn(begin // EVERY, *adapter.down.shape))
        optimizer = torch.optim.AdamW(peftcore.parameter_groups(found, lr=LR))
        for _ in range(begin, min(begin + EVERY, STEPS)):
            loss_of(found).backward()
            optimizer.step()
            optimizer.zero_grad()
        peftcore.merge(found)
    return found


def trained(optimizer_class: Any, **settings: Any) -> Any:
    found = model()
    optimizer = optimizer_class(peftcore.parameter_groups(found, lr=LR), **settings)
    for step in range(1, STEPS + 1):
        loss_of(found).backward()
        optimizer.step()
        peftcore.after_step(found, step, STEPS, optimizer=optimizer)
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, peftcore.optim.AdamW, peftcore.optim.PagedAdamW])
def test_restarts_equal_merging_into_the_base(optimizer: Any, tmp_path: Path) -> None:
    found, wanted = trained(optimizer), by_hand()
    torch.testing.assert_close(tiny.logits(found), tiny.logits(wanted), atol=1e-5, rtol=0)
    assert [int(adapter.restarts) for adapter in adapters_of(found)] == [2, 2]
    assert (tiny.logits(found) - tiny.logits(tiny.llama())).abs().max() > 1e-2
    peftcore.save(found, tmp_path / "adapter")
    assert torch.equal(tiny.logits(peftcore.load(tiny.llama(), tmp_path / "adapter")), tiny.logits(found))


def test_trainer_passes_its_optimizer(tmp_path: Path) -> None:
    found = model()
    rows = [{"input_ids": row, "labels": row} for row in tiny.TOKENS]
    sizes = {"max_steps": STEPS, "per_device_train_batch_size": len(rows), "max_grad_norm": 0.0}
    trainer(tmp_path, found, rows=rows, **sizes).train()
    torch.testing.assert_close(tiny.logits(found), tiny.logits(by_hand()), atol=1e-4, rtol=0)


def test_the_state_of_other_parameters_stays() -> None:
    found = model()
    (first, second), states = adapters_of(found), []

    def look(adapters: Any, config: Any, step: int, total_steps: int) -> None:
        reset_optimizer_state(first.parameters())
        states.append({id(parameter) for parameter in current_optimizer().state})

    with tiny.installed(tiny.method("looking", after_step=look)):
        peftcore.apply(found, "looking", adapter="other")
        optimizer = torch.optim.AdamW(peftcore.parameter_groups(found, lr=LR))
        loss_of(found).backward()
        optimizer.step()
        peftcore.after_step(found, 1, 9, optimizer=optimizer)
    own = {id(p) for p in first.parameters()}
    assert states == [{id(p) for group in optimizer.param_groups for p in group["params"]} - own]
    assert states[0] >= {id(p) for p in second.parameters()}


def test_an_after_step_that_changes_the_base_is_reported() -> None:
    found = model()

    @torch.no_grad()
    def fold(adapters: Any, config: Any, step: int, total_steps: int) -> None:
        for path, adapter in adapters.items():
            found.get_submodule(path).weight += adapter.gain

    with tiny.installed(tiny.method("folding", after_step=fold)):
        peftcore.apply(found, "folding", adapter="other")
        with pytest.raises(
            peftcore.PluginError,
            match=r"folding has changed the base tensor 'model\.layers\.0\.self_attn\.q_proj\.weight'",
        ):
            peftcore.after_step(found, 1, STEPS)


OF_MOMENTS = [torch.optim.AdamW, *(value for name, value in vars(peftcore.optim).items() if "Adam" in name)]


@pytest.mark.parametrize("kind", OF_MOMENTS)
def test_a_share_of_the_moments_is_kept(kind: Any) -> None:
    """An element that loses one moment loses both: m / sqrt(0) would be a huge step."""
    parameter = nn.Parameter(torch.zeros(2, 5))
    optimizer = kind([parameter])
    gradients = torch.tensor([[9.0, -8, 1, 2, 3], [-7, 0.5, 6, 4, 5]])
    parameter.grad = gradients
    optimizer.step()
    parameter.grad = gradients * torch.tensor([[-1.1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])  # the largest v, a small m
    optimizer.step()
    before = {
        name: value.clone() for name, value in optimizer.state_dict()["state"][0].items() if name.startswith("exp_avg")
    }
    with stepping(optimizer):
        reset_optimizer_state([parameter], keep=1.0)
        after = optimizer.state_dict()["state"][0]
        assert all(torch.equal(after[name], value) for name, value in before.items())
        reset_optimizer_state([parameter], keep=0.4)
    after, kept = optimizer.state_dict()["state"][0], torch.zeros(2, 5, dtype=torch.bool)
    kept[0, 1] = kept[1, 0] = kept[1, 2] = True
    for name in ("exp_avg", "exp_avg_sq"):
        zero = 127 if before[name].dtype == torch.uint8 and name == "exp_avg" else 0
        assert torch.equal(after[name], before[name].where(kept, zero)), name
    assert after["step"] == 2


def test_where_it_cannot_be_it_is_an_error() -> None:
    found = model()
    own = [p for p in found.parameters() if p.requires_grad]
    with pytest.raises(peftcore.PeftcoreError, match=r"needs the optimizer\. Pass it: .*optimizer=optimizer\)"):
        peftcore.after_step(found, EVERY, STEPS)
    with pytest.raises(peftcore.PeftcoreError, match="does not have 1 of the 2 parameters"):
        peftcore.after_step(found, EVERY, STEPS, optimizer=torch.optim.SGD(own[:1], lr=1))
    with pytest.raises(peftcore.PeftcoreError, match="Adagrad cannot reset the state"):
        peftcore.after_step(found, EVERY, STEPS, optimizer=torch.optim.Adagrad(own))
    with pytest.raises(peftcore.PeftcoreError, match=r"must be a torch\.optim\.Optimizer, found list"):
        peftcore.after_step(found, 1, STEPS, optimizer=own)
    peftcore.after_step(found, 1, STEPS)  # not needed at this step
    with pytest.raises(peftcore.PeftcoreError, match="was called outside after_step"):
        current_optimizer()


def test_the_conformance_suite() -> None:
    names = ("identity at the start", "training lowers the loss", "resume is exact", "save and load are bit exact")
    check_method(ReloraConfig(), families=["Llama"], checks=[*names, "merge equals forward, unmerge is bit exact"])
