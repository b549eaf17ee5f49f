"""Where A and B begin: PEFT's values, from a base that stays as it is."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import logits, moved, quiet
from support.whole_run import nightly_but
from torch import nn

import peftcore
from peftcore.engine import adapter_modules
from peftcore.plugin import disturb

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}
STARTS = ["pissa", "pissa_niter_4", "olora", "mica", "orthogonal"]


def fields_of(kind: str, start: str, rslora: bool) -> dict[str, Any]:
    fields = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": TARGETS[kind]}
    return {**fields, "init_lora_weights": start}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("rslora", nightly_but([False, True], [True]), ids=["alpha", "rslora"])
@pytest.mark.parametrize("start", STARTS)
def test_the_base_stays_and_others_read_it(start: str, rslora: bool, kind: str, tmp_path: Path) -> None:
    make = tiny.MODELS[kind]
    model, base = make(), make()
    peftcore.apply(model, "lora", **fields_of(kind, start, rslora))
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-6)
    disturb(model, "default", seed=1)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 1e-3
    peftcore.save(model, tmp_path)
    peft_model = quiet(peft.PeftModel.from_pretrained, make(), tmp_path).eval()
    torch.testing.assert_close(logits(peft_model), expected, rtol=0, atol=1e-5)
    reloaded = peftcore.load(make(), tmp_path, trainable=True)
    assert torch.equal(logits(reloaded), expected)
    pairs = zip(adapter_modules(reloaded, "default"), adapter_modules(model, "default"), strict=True)
    assert all(torch.equal(a.state_dict()[n], t) for (_, a), (_, b) in pairs for n, t in b.state_dict().items())
    trains = {name.rpartition(".")[2] for name, p in reloaded.named_parameters() if p.requires_grad}
    assert trains == ({"lora_A"} if start == "mica" else {"lora_A", "lora_B"})
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    peftcore.unmerge(model)
    peftcore.remove(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.state_dict().items())


@pytest.mark.parametrize("start", [True, "pissa"])
def test_a_head_named_like_a_start_is_saved(start: bool | str, tmp_path: Path) -> None:
    """XLNet's head for questions is `start_logits`, and the factors of a start are `start_A` and `start_B`."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(layer=nn.Linear(8, 8), start_logits=nn.Linear(8, 1)))

    fields = {"r": 2, "target_modules": ["layer"], "modules_to_save": ["start_logits"], "init_lora_weights": start}
    model = peftcore.apply(make(), "lora", **fields)
    disturb(model, "default", seed=1)
    peftcore.save(model, tmp_path)
    reloaded, x = peftcore.load(make(), tmp_path), torch.linspace(-1, 1, 16).view(2, 8)
    assert not torch.equal(model(x), make()(x))
    assert torch.equal(reloaded(x), model(x))


@pytest.mark.parametrize("start", ["pissa", "olora", "mica"])
def test_the_values_are_peft_s(start: str) -> None:
    """And so are the logits when both are moved alike; PEFT has changed its base."""
    fields = fields_of("llama", start, False)
    model = peftcore.apply(tiny.llama(), "lora", **fields)
    peft_model = quiet(peft.get_peft_model, tiny.llama(), peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    adapters = [adapter for _, adapter in adapter_modules(model, "default")]
    factors = {
        name: [p for n, p in peft_model.named_parameters() if f"{name}.default" in n] for name in ("lora_A", "lora_B")
    }
    for name, tensors in factors.items():
        for adapter, expected in zip(adapters, tensors, strict=True):
            torch.testing.assert_close(getattr(adapter, name), expected.detach(), rtol=0, atol=1e-6)
    disturb(model, "default", seed=1)
    with torch.no_grad():
        for name, tensors in factors.items():
            for adapter, tensor in zip(adapters, tensors, strict=True):
                tensor.copy_(getattr(adapter, name))
    torch.testing.assert_close(logits(model), logits(peft_model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora", "mica", "orthogonal"])
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha", "rslora"])
def test_files_of_peft_are_read_on_the_base_itself(start: str, rslora: bool, tmp_path: Path) -> None:
    """Their start was subtracted from the base: it is found again, as PEFT does."""
    fields = {**fields_of("llama", start, rslora), "alpha_pattern": {"down_proj": 5}}
    config = quiet(peft.LoraConfig, task_type="CAUSAL_LM", **fields)
    peft_model = moved(quiet(peft.get_peft_model, tiny.llama(), config).eval())
    quiet(peft_model.save_pretrained, tmp_path / "theirs")
    peftcore_model = peftcore.load(tiny.llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(peftcore_model), logits(peft_model), rtol=0, atol=1e-5)
    peftcore.save(peftcore_model, tmp_path / "ours")
    reloaded = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(reloaded), logits(peft_model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_file_of_peft_is_refused_on_a_base_in_4_bits(start: str, tmp_path: Path) -> None:
    """The start that PEFT subtracted was computed from the dense weights."""
    config = quiet(peft.LoraConfig, task_type="CAUSAL_LM", **fields_of("llama", start, False))
    quiet(moved(quiet(peft.get_peft_model, tiny.llama(), config)).save_pretrained, tmp_path / "theirs")
    quantized = peftcore.quantize(tiny.llama(), "nf4")
    with pytest.raises(peftcore.PeftcoreError, match=r"dense weight of 'model\..*_proj', but this model .* in nf4"):
        peftcore.load(quantized, tmp_path / "theirs")
    dense = peftcore.load(tiny.llama(), tmp_path / "theirs")
    peftcore.load(quantized, peftcore.save(dense, tmp_path / "ours"))


def test_a_base_in_4_bits_is_read_dense() -> None:
    model = tiny.llama()
    peftcore.quantize(model)
    base = logits(model)
    peftcore.apply(model, "lora", r=4, init_lora_weights="pissa")
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-5)
    layer = model.model.layers[0].self_attn.q_proj
    expected = torch.linalg.svdvals(layer.dequantized(torch.float32))[:4]
    adapter = layer.peftcore["default"]
    actual = torch.linalg.svdvals(adapter.scale * adapter.lora_B @ adapter.lora_A)[:4]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pisa"}, "init_lora_weights must be .*found 'pisa'.*pissa"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even r, found 3"),
        ({"init_lora_weights": "pissa", "r": 64}, r"r=64 is above the rank of '.*q_proj' \[32, 32\]"),
        (
            {"init_lora_weights": "olora", "target_modules": ["embed_tokens"]},
            "is only for linear layers, and 'model.embed_tokens' is not one",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_is_as_it_was(fields: dict[str, Any], message: str) -> None:
    model = tiny.llama()
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(model, "lora", **{"target_modules": ["q_proj"], **fields})
    assert not any(hasattr(module, "peftcore") for module in model.modules())
    assert torch.equal(logits(model), logits(tiny.llama()))
