"""PEFT's argument of a call, `adapter_names`: the adapter of each sample."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.testing import disturb

NAMES = ["a", "__base__", "b", "a"]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    model = tiny.llama().eval()
    for seed, name in enumerate("ab"):
        peftcore.apply(model, "lora", adapter=name, r=4, target_modules=["q_proj", "v_proj"])
        disturb(model, name, seed=seed, std=0.5)
    peftcore.activate(model, "b")
    return model


def tokens() -> Tensor:
    return torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(2))


def by_activation(model: Any) -> Tensor:
    peftcore.activate(model, [None if name == "__base__" else name for name in NAMES], per_sample=True)
    found: Tensor = model(input_ids=tokens()).logits
    peftcore.activate(model, "b")
    return found


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_a_call_is_what_peft_makes_of_it(model: Any, tmp_path: Path) -> None:
    import peft

    for name in "ab":
        peftcore.save(model, tmp_path / name, adapter=name)
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(tiny.llama().eval(), str(tmp_path / "a"), adapter_name="a")
    theirs.load_adapter(str(tmp_path / "b"), adapter_name="b")
    wanted = theirs(input_ids=tokens(), adapter_names=NAMES).logits
    torch.testing.assert_close(model(input_ids=tokens(), adapter_names=NAMES).logits, wanted, rtol=1e-4, atol=1e-4)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    generated = theirs.generate(input_ids=tokens(), adapter_names=NAMES, **options)
    assert torch.equal(model.generate(tokens(), adapter_names=NAMES, **options), generated)


@torch.no_grad()
def test_it_holds_for_one_call(model: Any) -> None:
    before, wanted = model(input_ids=tokens()).logits, by_activation(model)
    assert torch.equal(model(input_ids=tokens(), adapter_names=NAMES).logits, wanted)
    assert torch.equal(model(input_ids=tokens()).logits, before)
    assert torch.equal(model(input_ids=tokens(), adapter_names=None).logits, before)
    assert peftcore.engine.state_of(model).active == ("b",)  # type: ignore[union-attr]
    peftcore.activate(model, [])
    assert torch.equal(model(input_ids=tokens(), adapter_names=NAMES).logits, wanted)
    with peftcore.disabled(model):
        base = model(input_ids=tokens()).logits
        assert torch.equal(model(input_ids=tokens(), adapter_names=NAMES).logits, base)


@torch.no_grad()
def test_calls_of_other_threads_are_left_alone(model: Any) -> None:
    before, wanted = model(input_ids=tokens()).logits, by_activation(model)
    wrong: list[str] = []

    def run(expected: Tensor, **names: Any) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(input_ids=tokens(), **names).logits, expected):
                    wrong.append(str(names))

    threads = [
        threading.Thread(target=run, args=(before,)),
        threading.Thread(target=run, args=(wanted,), kwargs={"adapter_names": NAMES}),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_a_compiled_model(model: Any) -> None:
    wanted = by_activation(model)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(input_ids=tokens()).logits
    torch.testing.assert_close(compiled(input_ids=tokens(), adapter_names=NAMES).logits, wanted)
    torch.testing.assert_close(compiled(input_ids=tokens()).logits, plain)


def test_what_is_refused(model: Any) -> None:
    for names, why in (
        (["a", "c", "a", "b"], "no adapter 'c' is applied"),
        (["a", "b"], "2 samples have adapters .* got a batch of 4"),
        ("a", "must be a list with one adapter name per sample"),
        ([1, 2, 3, 4], "must be a list with one adapter name"),
        ([], "must be a list with one adapter name"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=why):
            model(input_ids=tokens(), adapter_names=names)
    with pytest.raises(peftcore.PeftcoreError, match="Pass them to the model itself"):
        model.model(input_ids=tokens(), adapter_names=NAMES)
    with pytest.raises(peftcore.PeftcoreError, match=r"Call model\.eval\(\)"):
        model.train()(input_ids=tokens(), adapter_names=NAMES)
    model.eval()
    peftcore.apply(model, "prompt-tuning", adapter="p", num_virtual_tokens=2)
    with pytest.raises(peftcore.PeftcoreError, match=r"'p' .* acts on the batch as a whole"):
        model(input_ids=tokens(), adapter_names=["p", "a", "a", "a"])
    peftcore.merge(peftcore.activate(model, "a") or model, undo=True)
    with pytest.raises(peftcore.PeftcoreError, match="adapters are merged"):
        model(input_ids=tokens(), adapter_names=NAMES)


def test_values_of_the_base_that_an_active_adapter_trains_are_no_base() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    peftcore.apply(model, "lora", adapter="a", target_modules=["0"])
    peftcore.apply(model, "bitfit", adapter="biases")
    with pytest.raises(peftcore.PeftcoreError, match=r"'biases' trains base parameters"):
        model(torch.randn(2, 4), adapter_names=["a", "__base__"])
