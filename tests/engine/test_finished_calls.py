"""A loss that sees calls of the model, by the method that needs it: gains that must not forget what the base knew.

    KL(base || model) over the tokens without a label, mean over the samples

The base is the teacher, as in learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trainers import LR, STEPS, trainer
from transformers import DynamicCache, Trainer

import peftcore
from peftcore.plugin import FinishedCall, cache_argument, check_method

LABELS = tiny.TOKENS.clone()
LABELS[:, :3] = -100
BATCH = {"input_ids": tiny.TOKENS, "labels": LABELS}
ROWS = [{"input_ids": torch.arange(3, 9) + i, "labels": torch.tensor([-100] * 3 + [6, 7, 8]) + i} for i in range(8)]
for row in ROWS:
    row["labels"][:3] = -100


def divergence(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    each = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return (each * (labels == -100)).sum(1).mean()


def keep(adapters: Any, config: Any, call: FinishedCall) -> Tensor:
    labels = call.get("labels", torch.full_like(call["input_ids"], -100))
    return divergence(call.output.logits, call.teacher().logits, labels)


@pytest.fixture(autouse=True)
def keeping() -> Iterator[None]:
    with tiny.installed(tiny.method("keeping", call_loss=keep)):
        yield


def model(**changes: Any) -> Any:
    config = {"value": 4.0, "target_modules": ("o_proj", "down_proj")} | changes
    return peftcore.apply(tiny.llama(), "keeping", **config).train()


def gains(found: nn.Module) -> Tensor:
    return torch.stack([p.detach() for p in found.parameters() if p.requires_grad])


def gradients(found: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in found.parameters() if p.requires_grad and p.grad is not None]


def by_hand(found: Any, batch: dict[str, Tensor] = BATCH) -> Tensor:
    """The loss and its term, with the base as another model."""
    output = found(**batch)
    return output.loss + divergence(output.logits, tiny.llama()(batch["input_ids"]).logits.detach(), batch["labels"])


def test_the_term_is_that_of_the_output_the_labels_and_the_base() -> None:
    found, wanted = model(), model()
    loss = found(**BATCH).loss
    ((name, term),) = peftcore.loss_terms(found).items()
    by_hand(wanted).backward()
    (loss + term).backward()
    assert name == "default" and term > 1e-4
    for a, b in zip(gradients(found), gradients(wanted), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert found.training and all(module.training for module in found.modules())


def test_batches_of_a_step_each_have_their_share() -> None:
    found, wanted = model(), model()
    rows = [{name: each[i : i + 1] for name, each in BATCH.items()} for i in range(len(tiny.TOKENS))]
    for row in rows:
        ((found(**row).loss + peftcore.extra_loss(found)) / len(rows)).backward()
    (wanted(**BATCH).loss + peftcore.extra_loss(wanted)).backward()
    for a, b in zip(gradients(found), gradients(wanted), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_teacher_has_neither_dropout_nor_trained_parameters_of_the_base() -> None:
    seen = []

    def look(adapters: Any, config: Any, call: FinishedCall) -> Tensor:
        assert call.teacher() is call.teacher()
        seen.append(call.teacher().logits)
        return call.output.logits.square().mean()

    with tiny.installed(tiny.method("looking", call_loss=look), tiny.method("train", tiny.PLACES["train"])):
        base = tiny.llama()
        found = copy.deepcopy(base).train()
        for layer in found.model.layers:
            layer.self_attn.attention_dropout = 0.5
        peftcore.apply(found, "train", names=("lm_head.weight",))
        peftcore.apply(found, "looking", adapter="second", value=0.5)
        with torch.no_grad():
            found.lm_head.weight.add_(1)
        found.train()
        output = found(tiny.TOKENS)
        (output.logits.mean() + peftcore.extra_loss(found)).backward()
        torch.testing.assert_close(seen[0], base.eval()(tiny.TOKENS).logits)
        assert not seen[0].requires_grad and not torch.allclose(seen[0], output.logits)
        assert found.lm_head.weight.grad is not None


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_calls_that_run_otherwise(how: str) -> None:
    found, wanted = model(), model()
    called = torch.compile(found, backend="eager") if how == "compiled" else found
    if how == "checkpointed":
        enable = getattr(found, "activation_checkpointing_enable", None)  # renamed in transformers 5
        (enable or found.gradient_checkpointing_enable)({"use_reentrant": False})
    for _ in range(2):
        (called(**BATCH).loss + peftcore.extra_loss(found)).backward()
        by_hand(wanted).backward()
    for a, b in zip(gradients(found), gradients(wanted), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("batches", [1, 4])
def test_trainer(batches: int, tmp_path: Path) -> None:
    wanted = model()
    optimizer = torch.optim.AdamW(peftcore.parameter_groups(wanted, lr=LR))
    batch = {name: torch.stack([row[name] for row in ROWS]) for name in ROWS[0]}
    for _ in range(STEPS):
        by_hand(wanted, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = model()
    sizes = {"gradient_accumulation_steps": batches, "per_device_train_batch_size": 8 // batches, "max_grad_norm": 0.0}
    done = trainer(tmp_path, found, rows=ROWS, eval_strategy="steps", eval_steps=1, **sizes)
    done.train()
    torch.testing.assert_close(gains(found), gains(wanted), atol=1e-5, rtol=0)
    terms = [entry["extra_loss/default"] for entry in done.state.log_history if "extra_loss/default" in entry]
    assert len(terms) == STEPS and min(terms) > 1e-4


def test_a_trainer_that_adds_no_term_or_calls_twice_is_refused(tmp_path: Path) -> None:
    class Past(Trainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Tensor:
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
            return loss.detach()

    class Twice(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            model(**inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    two = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    with pytest.raises(peftcore.PeftcoreError, match=r"'default'.* training_step of Past bypassed it"):
        trainer(tmp_path, model(), Past, rows=ROWS, **two).train()
    with pytest.raises(peftcore.PeftcoreError, match="one call of the model, and 2 calls with gradients have finished"):
        trainer(tmp_path, model(), Twice, rows=ROWS).train()


def test_without_one_call_it_is_an_error() -> None:
    found = model()
    none, two = "and no call with gradients has finished since", "and 2 calls with gradients have finished since"
    with pytest.raises(peftcore.PeftcoreError, match=f"the loss of keeping depends on one call of the model, {none}"):
        peftcore.extra_loss(found)
    found(**BATCH)
    found(**BATCH)
    with pytest.raises(peftcore.PeftcoreError, match=two):
        peftcore.extra_loss(found)
    with torch.no_grad():
        found(**BATCH)
    with peftcore.disabled(found):
        found(**BATCH)
    found.model(tiny.TOKENS)
    with pytest.raises(peftcore.PeftcoreError, match=none):
        peftcore.extra_loss(found)
    found(**BATCH)
    assert peftcore.extra_loss(found) > 0
    with pytest.raises(peftcore.PeftcoreError, match=none):
        peftcore.extra_loss(found)  # of the same call, a second time


def test_a_call_of_other_adapters_is_none() -> None:
    found = model()
    peftcore.apply(found, "keeping", adapter="other", value=2.0)
    peftcore.activate(found, "default")
    found(**BATCH)
    peftcore.activate(found, "other")
    with pytest.raises(peftcore.PeftcoreError, match="no call with gradients has finished"):
        peftcore.extra_loss(found)


def test_a_teacher_of_a_call_with_a_cache_is_refused() -> None:
    found = model()
    name = cache_argument(found)
    found(**BATCH, **{name: DynamicCache(config=found.config)}, use_cache=True)
    with pytest.raises(peftcore.PeftcoreError, match=f"the call got a cache, '{name}', to which a second call"):
        peftcore.extra_loss(found)


def test_no_call_is_kept_where_no_loss_needs_it() -> None:
    found = model()
    copied = copy.deepcopy(found)
    for each in (found, copied):
        each(**BATCH)
        assert peftcore.extra_loss(each) > 0
    peftcore.engine.set_trainable(found, "default", False)
    found(**BATCH)
    lock = peftcore.engine.state_of(found).lock
    assert lock.context.take_calls() == [] and peftcore.extra_loss(found) == 0
    with tiny.installed(tiny.method("plain")):
        peftcore.apply(found, "plain", adapter="other")
        peftcore.remove(found, "default")
        assert lock.context is None


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda adapters, config, call: call.output.logits, r"scalar or None, found a tensor \["),
        (lambda adapters, config, call: call.teacher().logits.mean(), "has no gradient.* from the output of the call"),
    ],
)
def test_a_term_that_is_none_is_refused(loss: Any, match: str) -> None:
    with tiny.installed(tiny.method("wrong", call_loss=loss)):
        found = peftcore.apply(tiny.llama(), "wrong")
        found(**BATCH)
        with pytest.raises(peftcore.PeftcoreError, match=match):
            peftcore.extra_loss(found)


def test_a_loss_can_have_both_terms_and_the_state_of_the_call() -> None:
    class Noting(tiny.Scaled):
        needs_call = True

        def forward(self, base: Any, x: Tensor) -> Tensor:
            peftcore.plugin.current_call().state[id(self)] = y = super().forward(base, x)
            return y

    def place(found: Any, config: Any, architecture: Any) -> list[Any]:
        placed = tiny.PLACES["around"](found, config, architecture)
        return [type(each)(each.path, Noting(each.adapter.gain.item())) for each in placed]

    def noted(adapters: Any, config: Any, call: FinishedCall) -> Tensor:
        return sum(call.state[id(adapter)].square().sum() for adapter in adapters.values())

    def pull(adapters: Any, config: Any) -> Tensor:
        return sum((adapter.gain - 3).square() for adapter in adapters.values())

    with tiny.installed(tiny.method("noting", place, loss=pull, call_loss=noted)):
        found = peftcore.apply(tiny.llama(), "noting", value=1.0)
        outputs = []
        for layer in found.model.layers:
            layer.self_attn.q_proj.register_forward_hook(lambda _m, _a, y: outputs.append(y))
        found(tiny.TOKENS)
        wanted = 8 + sum(y.square().sum() for y in outputs)
        torch.testing.assert_close(peftcore.extra_loss(found), wanted)


def test_the_conformance_suite() -> None:
    config = peftcore.methods()["keeping"].config_class(target_modules=("o_proj",))
    names = ("training lowers the loss", "resume is exact", "disabled equals base", "gradient checkpointing")
    more = "gradients of four accumulated batches equal those of one, with the method's loss term once"
    check_method(config, families=["Llama"], checks=[*names, more])
