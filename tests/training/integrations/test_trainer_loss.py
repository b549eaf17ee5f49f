"""Terms that methods add to the loss, in Trainer: once a step, scaled and clipped with it, logged by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.trainers import LR, NORM, ROWS, STEPS, trainer
from torch import Tensor, nn
from transformers import Trainer

import peftcore


def pull(adapters: Any, config: Any) -> Tensor:
    return torch.stack([(adapter.gain - 3).square() for adapter in adapters.values()]).sum()


@pytest.fixture(autouse=True)
def pulled() -> Any:
    with tiny.installed(tiny.method("pulled", loss=pull)):
        yield


def model() -> nn.Module:
    return peftcore.apply(tiny.llama(), "pulled", value=1.0)


def gains(found: nn.Module) -> Tensor:
    return torch.stack([p.detach() for p in found.parameters() if p.requires_grad])


def by_hand() -> tuple[Tensor, list[float], list[float]]:
    """(gains after each step, norms of the gradients, terms) of a loop of one's own."""
    found = model().train()
    optimizer = torch.optim.AdamW(peftcore.parameter_groups(found, lr=LR))
    ids = torch.stack([row["input_ids"] for row in ROWS])
    norms, terms = [], []
    for _ in range(STEPS):
        terms.append(peftcore.extra_loss(found).item())
        (found(input_ids=ids, labels=ids).loss + peftcore.extra_loss(found)).backward()
        norms.append(nn.utils.clip_grad_norm_(found.parameters(), NORM).item())
        optimizer.step()
        optimizer.zero_grad()
    return gains(found), norms, terms


def logged(done: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in done.state.log_history if key in entry]


@pytest.mark.parametrize("batches", [1, 4])
def test_a_step_is_that_of_a_loop_by_hand(batches: int, tmp_path: Path) -> None:
    wanted, norms, terms = by_hand()
    found = model()
    sizes = {"gradient_accumulation_steps": batches, "per_device_train_batch_size": 8 // batches}
    done = trainer(tmp_path, found, eval_strategy="steps", eval_steps=1, **sizes)
    done.train()
    torch.testing.assert_close(gains(found), wanted, atol=1e-6, rtol=0)
    assert logged(done, "grad_norm") == pytest.approx(norms, abs=1e-5) and min(norms) > NORM  # they were clipped
    assert logged(done, "extra_loss/default") == pytest.approx(terms, abs=1e-5)
    plain = tiny.llama()
    ids = torch.stack([row["input_ids"] for row in ROWS])
    for layer, gain in zip(plain.model.layers, gains(found), strict=True):
        layer.self_attn.q_proj.weight.data *= gain
    assert logged(done, "eval_loss")[-1] == pytest.approx(plain(input_ids=ids, labels=ids).loss.item(), abs=1e-5)


def test_the_last_step_of_an_epoch_has_fewer_batches(tmp_path: Path) -> None:
    """3 of 8: the term weighs no less then."""
    steps = []

    def watch(adapters: Any, config: Any, step: int, total: int) -> None:
        steps.append([adapter.gain.grad.item() for adapter in adapters.values()])

    def only(adapters: Any, config: Any) -> Tensor:
        return sum(adapter.gain for adapter in adapters.values())

    with tiny.installed(tiny.method("watched", loss=only, after_step=watch)):
        found = peftcore.apply(tiny.llama(), "watched", value=0.0)
        nn.init.zeros_(found.lm_head.weight)  # the loss has no gradient
        sizes = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "max_grad_norm": 0.0}
        done = trainer(tmp_path, found, **sizes)
        done.train()
    assert steps == [[pytest.approx(1.0)] * 2] * 3
    assert logged(done, "extra_loss/default")[0] == 0


def test_scaled_gradients_hold_the_term_scaled(tmp_path: Path) -> None:
    wanted, norms, _ = by_hand()
    found = model()
    done = trainer(tmp_path, found)
    done.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    done.accelerator.native_amp = True
    done.accelerator.state._mixed_precision = "fp16"
    try:
        done.train()
    finally:
        done.accelerator.state._mixed_precision = "no"
    assert logged(done, "grad_norm") == pytest.approx(norms, abs=1e-5)
    torch.testing.assert_close(gains(found), wanted, atol=1e-6, rtol=0)


def test_a_trainer_with_a_step_of_its_own_has_the_term_or_says_so(tmp_path: Path) -> None:
    class Own(Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            self.accelerator.backward(self.compute_loss(model, inputs) * 0)  # a second one of the same batch
            return loss.detach()

    class Past(Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
            return loss.detach()

    found = model()
    trainer(tmp_path, found, Own).train()
    torch.testing.assert_close(gains(found), by_hand()[0], atol=1e-6, rtol=0)
    with pytest.raises(peftcore.PeftcoreError, match=r"'default'.* training_step of Past skipped it"):
        trainer(tmp_path, model(), Past).train()


def test_a_second_run_of_a_trainer_adds_it_once(tmp_path: Path) -> None:
    found = model()
    done = trainer(tmp_path, found)
    done.train()
    with torch.no_grad():
        for parameter, value in zip([p for p in found.parameters() if p.requires_grad], gains(model()), strict=True):
            parameter.copy_(value)
    done.optimizer = done.lr_scheduler = None
    done.train()
    torch.testing.assert_close(gains(found), by_hand()[0], atol=1e-6, rtol=0)


def test_a_compiled_model_is_trained_the_same(tmp_path: Path) -> None:
    told = []
    with tiny.installed(tiny.method("watched", loss=pull, after_step=lambda *call: told.append(call[2]))):
        found = peftcore.apply(tiny.llama(), "watched", value=1.0)
        trainer(tmp_path, torch.compile(found, backend="eager"), remove_unused_columns=False).train()
    assert told == [1, 2, 3]
    torch.testing.assert_close(gains(found), by_hand()[0], atol=1e-6, rtol=0)
