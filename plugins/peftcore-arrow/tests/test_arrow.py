"""Arrow: Hugging Face PEFT's logits with the same experts, and what becomes of router and experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import create_arrow_model
from support import tiny
from support.against_peft import quiet

import peftcore
from peftcore.plugin import disturb

EXPERTS = ("maths", "code", "poems")
FIELDS = {"top_k": 2, "router_temperature": 0.7, "rng_seed": 3}


def saved(folder: Path, make: Any = tiny.llama, **fields: Any) -> list[Path]:
    """Files of three experts."""
    for seed, name in enumerate(EXPERTS):
        model = peftcore.apply(make(), "lora", r=2, **fields)
        disturb(model, "default", seed, std=0.5)
        peftcore.save(model, folder / name)
    return [folder / name for name in EXPERTS]


def routed_model(folder: Path, make: Any = tiny.llama) -> Any:
    """A model with the experts, frozen, and a router."""
    model = make()
    for name in EXPERTS:
        peftcore.load(model, folder / name, adapter=name, trainable=False, check_base=False)
    return peftcore.apply(model, "arrow", experts=EXPERTS, **FIELDS)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_the_logits_are_peft_s(make: Any, tmp_path: Path) -> None:
    files = [str(file) for file in saved(tmp_path, make, lora_alpha=6)]
    model = routed_model(tmp_path, make)
    peft_model = quiet(create_arrow_model, make(), files, peft.ArrowConfig(**FIELDS)).eval()
    actual = tiny.logits(model)
    torch.testing.assert_close(actual, quiet(tiny.logits, peft_model), rtol=0, atol=1e-5)
    with peftcore.disabled(model):
        assert (actual - tiny.logits(model)).abs().max() > 1e-2
    peftcore.activate(model, list(EXPERTS))
    assert (actual - tiny.logits(model)).abs().max() > 1e-2


def test_directions_are_those_of_the_product(tmp_path: Path) -> None:
    saved(tmp_path)
    model = routed_model(tmp_path)
    layer = model.model.layers[1].mlp.down_proj.peftcore
    for v, name in zip(layer["default"].prototypes, EXPERTS, strict=True):
        _, _, right = torch.linalg.svd(layer[name].delta())
        assert (v @ right[0]).abs() > 0.99
    weights = layer["default"].expert_weights(torch.randn(5, 48))
    assert ((weights > 0).sum(-1) == 2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))


def test_with_an_adapter_inside_and_outside(tmp_path: Path) -> None:
    saved(tmp_path)
    model = routed_model(tmp_path)
    peftcore.apply(model, "lora", r=2, adapter="options")
    disturb(model, "options", 7, std=0.5)
    outside = tiny.logits(model)
    peftcore.activate(model, ["options", "default"])
    torch.testing.assert_close(tiny.logits(model), outside, rtol=0, atol=1e-4)


def test_on_four_bits(tmp_path: Path) -> None:
    saved(tmp_path)
    model = routed_model(tmp_path, lambda: peftcore.quantize(tiny.llama()))
    actual = tiny.logits(model)
    plain = routed_model(tmp_path, lambda: peftcore.dequantize(peftcore.quantize(tiny.llama()), torch.float32))
    torch.testing.assert_close(actual, tiny.logits(plain), rtol=0, atol=1e-4)
    model(**tiny.inputs(model)).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_removed_it_leaves_all_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path)
    model, base = routed_model(tmp_path), tiny.llama()
    peftcore.remove(model, "default")
    assert torch.equal(tiny.logits(model), tiny.logits(base))  # the experts rest
    alone = peftcore.load(tiny.llama(), tmp_path / "code")
    peftcore.activate(model, "code")
    assert torch.equal(tiny.logits(model), tiny.logits(alone))
    for name in EXPERTS:
        peftcore.remove(model, name)
    expected, actual = base.state_dict(), model.state_dict()
    assert list(actual) == list(expected) and all(torch.equal(actual[name], expected[name]) for name in expected)


def test_files(tmp_path: Path) -> None:
    saved(tmp_path)
    model = routed_model(tmp_path)
    peftcore.save(model, tmp_path / "router", adapter="default")
    peftcore.save(model, tmp_path / "all")
    reloaded = tiny.llama()
    with pytest.raises(peftcore.PeftcoreError, match=r"no adapter 'maths'. Apply or load it first"):
        peftcore.load(reloaded, tmp_path / "router", trainable=True)
    for name in EXPERTS:
        peftcore.load(reloaded, tmp_path / name, adapter=name, trainable=True)
    for loaded in (
        peftcore.load(reloaded, tmp_path / "router", trainable=True),
        peftcore.load(tiny.llama(), tmp_path / "all", trainable=True),
    ):
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    trained = {
        name.rpartition("peftcore.")[2].split(".")[0] for name, p in reloaded.named_parameters() if p.requires_grad
    }
    assert trained == {"default"}  # the router has frozen its experts, which loading let train


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "lora", r=2, adapter="maths")
    peftcore.apply(model, "lora", target_modules=["q_proj"], adapter="code")
    peftcore.apply(model, "ia3", target_modules=["q_proj"], feedforward_modules=[], adapter="factor")

    def assert_refused(match: str, *experts: str, **fields: Any) -> None:
        with pytest.raises(peftcore.PeftcoreError, match=match):
            peftcore.apply(model, "arrow", experts=experts, **{"top_k": 1, **fields})

    assert_refused("top_k=3 is more than the 2 experts", "maths", "code", top_k=3)
    assert_refused("experts must be at the same modules: only one of 'maths' and 'code' is at", "maths", "code")
    assert_refused(r"'factor' \(ia3\) is not a product B A of a linear layer at '.*q_proj'", "factor")
    assert_refused("no adapter 'poems' is applied", "poems")
    assert_refused("router_temperature must be positive", "maths", router_temperature=0.0)
    peftcore.apply(model, "arrow", experts=["maths"], top_k=1, adapter="router")
    with pytest.raises(peftcore.PeftcoreError, match="cannot remove 'maths': 'router' combines it"):
        peftcore.remove(model, "maths")
