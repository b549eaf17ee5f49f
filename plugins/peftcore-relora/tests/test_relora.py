"""ReLoRA: equal to merging into the base, resumed bit for bit, its learning rates and optimizers, and its files."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peftcore_relora import Relora, ReloraConfig, schedule
from support import tiny
from support.against_peft import quiet
from support.trainers import LR, ROWS, trainer
from torch import nn

import peftcore
from peftcore.files.loading import restore
from peftcore.plugin import disturb

EVERY, STEPS = 2, 5
FIELDS: dict[str, Any] = {"r": 2, "restart_every": EVERY, "restart_warmup": 1, "target_modules": ["q_proj", "o_proj"]}


def model(base: Any = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    return peftcore.apply(tiny.llama() if base is None else base, "relora", **{**FIELDS, **fields})


def products(relora_model: nn.Module) -> list[Relora]:
    return [module for module in relora_model.modules() if isinstance(module, Relora)]


def loss_of(relora_model: Any) -> Any:
    return relora_model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss


def train_steps(relora_model: Any, optimizer_class: Any = torch.optim.AdamW, steps: int = STEPS) -> Any:
    optimizer = optimizer_class(peftcore.parameter_groups(relora_model, lr=LR))
    for step in range(1, steps + 1):
        loss_of(relora_model).backward()
        optimizer.step()
        peftcore.after_step(relora_model, step, STEPS, optimizer=optimizer)
        optimizer.zero_grad()
    return relora_model


def merged_by_hand(starts: list[list[torch.Tensor]]) -> Any:
    """The paper's way: merge, apply again from these A, and a new optimizer."""
    relora_model = tiny.llama()
    for begin in range(0, STEPS, EVERY):
        peftcore.apply(relora_model, "lora", r=2, target_modules=FIELDS["target_modules"])
        loras = [module for module in relora_model.modules() if hasattr(module, "lora_A")]
        with torch.no_grad():
            for lora, start in zip(loras, starts[begin // EVERY], strict=True):
                lora.lora_A.copy_(start)
        optimizer = torch.optim.AdamW(peftcore.parameter_groups(relora_model, lr=LR))
        for _ in range(begin, min(begin + EVERY, STEPS)):
            loss_of(relora_model).backward()
            optimizer.step()
            optimizer.zero_grad()
        peftcore.merge(relora_model)
    return relora_model


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, peftcore.optim.AdamW, peftcore.optim.PagedAdamW])
def test_equals_merging_into_the_base(optimizer: Any) -> None:
    starts = [[module.lora_A.detach().clone() for module in products(model())]]
    for steps in (EVERY, 2 * EVERY):
        starts.append(
            [module.lora_A.detach().clone() for module in products(train_steps(model(prune_ratio=1.0), steps=steps))]
        )
    relora_model = train_steps(model(prune_ratio=1.0), optimizer)
    assert [list(module.past_A.shape) for module in products(relora_model)] == [[4, 32]] * 4
    torch.testing.assert_close(tiny.logits(relora_model), tiny.logits(merged_by_hand(starts)), atol=1e-5, rtol=0)
    assert (tiny.logits(relora_model) - tiny.logits(tiny.llama())).abs().max() > 1e-2
    assert not torch.equal(starts[1][0], starts[2][0])


def test_the_last_step_does_not_restart() -> None:
    with pytest.warns(
        UserWarning, match="restart_every=5 is not less than the training's 5 steps, so there is no restart"
    ):
        relora_model = train_steps(model(restart_every=STEPS, restart_warmup=0))
    assert all(len(module.past_A) == 0 and module.lora_B.any() for module in products(relora_model))


def test_a_training_shorter_than_a_round_is_warned_of() -> None:
    message = "restart_warmup=3 and restart_anneal=2 put 6 steps between restarts, not less than the training's 5 steps"
    with pytest.warns(UserWarning, match=message):
        train_steps(model(restart_every=None, restart_warmup=3, restart_anneal=2))
    train_steps(model(restart_every=None))  # a quarter of the training
    relora_model = model(restart_every=100)
    optimizer = torch.optim.AdamW(peftcore.parameter_groups(relora_model, lr=LR))
    for step in (1, 2):  # tries a config, without a warning
        loss_of(relora_model).backward()
        optimizer.step()
        peftcore.after_step(relora_model, step, 2, optimizer=optimizer)


@pytest.mark.parametrize("steps", [(4, 2), (2, 4), (4, 0)])
def test_values_of_another_round_are_refused(steps: tuple[int, int], tmp_path: Path) -> None:
    source, relora_model = (train_steps(model(), steps=number) for number in steps)
    peftcore.save(source, tmp_path)
    before = tiny.logits(relora_model)
    there, here = (number // EVERY + 1 for number in steps)
    wrong = rf"training has changed rounds, which .* to {there} in the source and to {here} in .*Load them under"
    for values in (tmp_path, peftcore.state_dict(source, "default")):
        with pytest.raises(peftcore.CheckpointError, match=wrong):
            peftcore.set_state_dict(relora_model, "default", values)
    assert torch.equal(tiny.logits(relora_model), before)
    peftcore.set_state_dict(
        relora_model, "default", peftcore.state_dict(train_steps(model(r=2), steps=steps[1]), "default")
    )


def test_four_bits_lose_nothing() -> None:
    base = tiny.llama()
    peftcore.quantize(base, "nf4")
    relora_model = train_steps(model(base))
    expected = tiny.logits(relora_model)
    changed = [module.delta().detach() for module in products(relora_model)]
    assert all(torch.linalg.matrix_rank(change) > 2 for change in changed)
    peftcore.merge(relora_model, dtype=torch.float32, undo=True)
    torch.testing.assert_close(tiny.logits(relora_model), expected, atol=1e-5, rtol=0)


def run(folder: Path, relora_model: Any, **changes: Any) -> Any:
    steps = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
    return trainer(folder, relora_model, rows=ROWS, **{**steps, **changes})


@pytest.mark.parametrize("at", [3, 4])  # in a round, and right after a restart
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_resumes_bit_for_bit(at: int, optim: str, tmp_path: Path) -> None:
    uninterrupted = run(tmp_path, model(), optim=optim)
    uninterrupted.train()
    resumed = run(tmp_path / "again", model(), optim=optim)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert torch.equal(tiny.logits(uninterrupted.model), tiny.logits(resumed.model))
    shapes = [list(module.past_A.shape) for module in products(resumed.model)]
    assert shapes == [list(module.past_A.shape) for module in products(uninterrupted.model)] == [[6, 32]] * 4


def test_the_best_checkpoint_may_have_fewer_products(tmp_path: Path) -> None:
    best = run(
        tmp_path,
        model(),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first
    )
    best.train()
    step = int(best.state.best_model_checkpoint.rpartition("-")[2])
    assert step < 3
    expected = peftcore.load(tiny.llama(), best.state.best_model_checkpoint)
    assert torch.equal(tiny.logits(best.model), tiny.logits(expected))
    peftcore.save(best.model, tmp_path / "saved")
    assert torch.equal(tiny.logits(peftcore.load(tiny.llama(), tmp_path / "saved")), tiny.logits(expected))


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    peftcore.save(train_steps(model(r=3)), tmp_path / "other")
    relora_model = train_steps(model())
    before = tiny.logits(relora_model)
    with pytest.raises(peftcore.CheckpointError, match=r"has shape \[3, 32\], but the model needs \[2, 32\]"):
        restore(relora_model, tmp_path / "other")
    assert torch.equal(tiny.logits(relora_model), before)


def test_trainer_multiplies_the_learning_rate(tmp_path: Path) -> None:
    relora_model = run(tmp_path, model(restart_every=3), max_steps=7, save_strategy="no", lr_scheduler_type="linear")
    relora_model.train()
    rates = [entry["learning_rate"] for entry in relora_model.state.log_history if "learning_rate" in entry]
    halved = [1, 1, 1, 0.5, 1, 1, 0.5]
    assert rates == pytest.approx([LR * (1 - step / 7) * factor for step, factor in enumerate(halved)])


def test_schedule() -> None:
    config = ReloraConfig(restart_every=6, restart_warmup=2, restart_anneal=2)
    factors = [schedule(config, step, 13) for step in range(1, 14)]
    assert factors == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3, 1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3, 1 / 3])
    assert schedule(config, 11, 12) == schedule(config, 12, 12) == 1  # no restart follows
    assert [schedule(ReloraConfig(restart_warmup=1), step, 8) for step in range(1, 9)] == [1, 1, 0.5, 1, 0.5, 1, 0.5, 1]
    short = [schedule(ReloraConfig(restart_warmup=2), step, 8) for step in range(1, 9)]  # three steps, not two
    assert short == pytest.approx([1, 1, 1, 1 / 3, 2 / 3, 1, 1 / 3, 2 / 3])


def test_trainer_says_which_schedulers_fit(tmp_path: Path) -> None:
    plateau = run(
        tmp_path, model(), lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", save_strategy="no"
    )
    with pytest.raises(peftcore.PeftcoreError, match=r"does not compute the learning rate from the step alone.*cosine"):
        plateau.train()
    own_scheduler = run(tmp_path, model(), save_strategy="no")
    own_scheduler.optimizer = torch.optim.SGD(products(own_scheduler.model)[0].parameters(), lr=LR)
    own_scheduler.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(own_scheduler.optimizer)
    with pytest.warns(UserWarning, match="given its own scheduler"):
        own_scheduler.create_scheduler(7)


def test_files_are_loras_of_all_products(tmp_path: Path) -> None:
    relora_model = train_steps(model(lora_alpha=3.3, rank_pattern={"o_proj": 3}, use_rslora=True))
    peftcore.save(relora_model, tmp_path)
    loaded = peftcore.load(tiny.llama(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(relora_model))
    assert [module.full_scale for module in products(loaded)] == [
        module.full_scale for module in products(relora_model)
    ]
    peft_model = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path).eval()
    assert peft_model.peft_config["default"].r == 6 and peft_model.peft_config["default"].rank_pattern == {"o_proj": 9}
    torch.testing.assert_close(peft_model(input_ids=tiny.TOKENS).logits, tiny.logits(relora_model), atol=1e-5, rtol=0)
    peftcore.scale(relora_model, "default", 0.5)
    peftcore.save(relora_model, tmp_path / "scaled")
    assert torch.equal(tiny.logits(peftcore.load(tiny.llama(), tmp_path / "scaled")), tiny.logits(relora_model))


def test_errors_come_at_the_first_step() -> None:
    relora_model = model()
    message = [p for p in relora_model.parameters() if p.requires_grad]
    for optimizer, wrong in (
        (torch.optim.Adafactor(message), "the state 'row_var' of Adafactor cannot be reset in part"),
        (torch.optim.Adagrad(message), "Adagrad cannot reset the state"),
    ):
        loss_of(relora_model).backward()
        optimizer.step()
        with pytest.raises(peftcore.PeftcoreError, match=wrong):
            peftcore.after_step(relora_model, 1, STEPS, optimizer=optimizer)
    with pytest.raises(peftcore.PeftcoreError, match="needs the optimizer"):
        peftcore.after_step(relora_model, 1, STEPS)
    with pytest.warns(UserWarning, match="after 4 restarts the products have .* values, more than the"):
        train_steps(model(r=8, restart_every=1, restart_warmup=0))


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"restart_every": 0}, "restart_every"),
        (
            {"restart_every": 10, "restart_warmup": 6, "restart_anneal": 4},
            r"= 10 steps must be less than restart_every=10",
        ),
        ({"prune_ratio": 0.0}, r"prune_ratio must be in \(0, 1\], found 0.0"),
        ({"restart_anneal": -1}, "restart_anneal must be at least 0, found -1"),
        ({"lora_fa": True}, "lora_fa=True is not supported with ReLoRA"),
        ({"target_modules": ["embed_tokens"]}, "ReLoRA cannot adapt '"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], wrong: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=wrong):
        model(**fields)


def test_a_head_named_like_a_past_product_is_saved(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(layer=nn.Linear(8, 8), past_scores=nn.Linear(8, 1)))

    relora_model = peftcore.apply(make(), "relora", r=2, target_modules=["layer"], modules_to_save=["past_scores"])
    disturb(relora_model, "default", seed=1)
    peftcore.save(relora_model, tmp_path)
    again, x = peftcore.load(make(), tmp_path), torch.linspace(-1, 1, 16).view(2, 8)
    assert not torch.equal(relora_model(x), make()(x))
    assert torch.equal(again(x), relora_model(x))
