"""The formula, the errors, and AdapterHub's compositions: files and outputs of `adapters` 1.3.0, see make.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_adapter_fusion import AdapterFusionConfig, bottlenecks
from safetensors.torch import load_file
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_modules
from peftcore.plugin import disturb

FOLDERS = Path(__file__).parent / "adapterhub"
spec = importlib.util.spec_from_file_location("fusion_make", FOLDERS / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
models = make.models
NAMES = sorted(path.name for path in FOLDERS.iterdir() if "-" in path.name)


def loaded(name: str) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """(model with the adapters a and b of a fixture, its inputs, its outputs)."""
    model = models.filled(getattr(models, name.split("-")[0])())
    for adapter in "ab":
        peftcore.load(model, FOLDERS / name / adapter, adapter=adapter)
    return model, models.inputs(model), load_file(FOLDERS / name / "outputs.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_compositions_of_adapters(name: str, tmp_path: Path) -> None:
    model, inputs, wanted = loaded(name)

    def gives(expected: Tensor, **call: Tensor) -> None:
        torch.testing.assert_close(model(**(call or inputs))[0], expected, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        peftcore.activate(model, ["a", "b"])
        gives(wanted["stack"])
        peftcore.activate(model, ["b", "a"])
        gives(wanted["stack_back"])
        assert (wanted["stack"] - wanted["stack_back"]).abs().max() > 1e-3
        peftcore.activate(model, ["b", "a"], per_sample=True)
        gives(wanted["batch_split"])
        rows = inputs["input_ids"]
        peftcore.activate(model, ["a", "a", "b", "b"], per_sample=True)
        gives(wanted["parallel"], input_ids=torch.cat([rows, rows]))

        peftcore.activate(model, [])
        peftcore.load(model, FOLDERS / name / "fusion", adapter="fused")
        peftcore.activate(model, ["fused"])
        gives(wanted["fuse"])
        peftcore.apply(model, "adapter-fusion", adapters=["a", "b"], how="average", weights=[0.7, 0.3], adapter="mean")
        peftcore.activate(model, ["mean"])
        gives(wanted["average"])
        peftcore.apply(model, "adapter-fusion", adapters=["a", "b"], how="split", splits=[4, 2], adapter="parts")
        peftcore.activate(model, ["parts"])
        gives(wanted["split"])

        for adapter in ("a", "b", "fused", "mean"):
            peftcore.save(model, tmp_path / adapter, adapter=adapter)
        twin = models.filled(getattr(models, name.split("-")[0])())
        for adapter in ("a", "b", "fused", "mean"):
            peftcore.load(twin, tmp_path / adapter, adapter=adapter)
        for adapter in ("fused", "mean"):
            for each in (model, twin):
                peftcore.activate(each, [adapter])
            assert torch.equal(model(**inputs)[0], twin(**inputs)[0])


def test_mam_is_that_of_adapters() -> None:
    """A prefix and a parallel bottleneck, with the text's positions where `adapters` has them, from 0 on."""
    expected = load_file(FOLDERS / "mam" / "outputs.safetensors")
    model: Any = models.filled(models.bert())
    tokens, n = models.inputs(model)["input_ids"], len(expected["prefix"])
    peftcore.apply(model, "prefix-tuning", adapter="prefix", num_virtual_tokens=n)
    [(_, prefix)] = peftcore.engine.adapter_parameters(model, "prefix")
    with torch.no_grad():
        prefix.copy_(expected["prefix"])
        peftcore.load(model, FOLDERS / "mam" / "ffn", adapter="ffn")
        call = {"input_ids": tokens, "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens) - n}
        torch.testing.assert_close(model(**call)[0], expected["output"], rtol=1e-4, atol=1e-5)
        for alone, inputs in (("prefix", call), ("ffn", {"input_ids": tokens})):
            peftcore.activate(model, [alone])
            assert (model(**inputs)[0] - expected["output"]).abs().max() > 0.03


@pytest.mark.parametrize("how", ["attention", "average", "split"])
@pytest.mark.parametrize("after_norm", [True, False])
def test_behind_another_adapter_it_reads_what_that_one_gives(how: str, after_norm: bool) -> None:
    """Stack(lang, Fuse(a, a)): of one adapter alone, whose share is then 1."""
    fields: dict[str, Any] = {"placement": "pfeiffer", "original_ln_before": after_norm, "modules_to_save": []}
    model: Any = tiny.MODELS["bert"]()
    for seed, name in enumerate(("lang", "a")):
        peftcore.apply(model, "adapter", adapter=name, bottleneck_size=4, **fields)
        disturb(model, name, seed, std=0.5)
    with torch.no_grad():
        expected = model(input_ids=tiny.TOKENS)[0]
        more = {"splits": [7]} if how == "split" else {}
        peftcore.apply(model, "adapter-fusion", adapters=["a"], how=how, adapter="one", modules_to_save=[], **more)
        for adapter in dict(adapter_modules(model, "one")).values():
            if "value" in adapter._modules:
                nn.init.eye_(adapter.value.weight)
        peftcore.activate(model, ["lang", "one"])
        torch.testing.assert_close(model(input_ids=tiny.TOKENS)[0], expected, rtol=1e-4, atol=1e-5)


def test_attention_by_its_formula_in_float64() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(2, 3, 6)
    for seed, name in enumerate("abc"):
        peftcore.apply(model, "adapter", adapter=name, target_modules=["0"], bottleneck_size=3)
        disturb(model, name, seed, std=0.5)
    peftcore.apply(model, "adapter-fusion", adapters=["a", "b", "c"], adapter="fused")
    disturb(model, "fused", seed=9, std=0.5)
    fused: Any = dict(adapter_modules(model, "fused"))["0"]
    with torch.no_grad():
        y = nn.functional.linear(x, model[0].weight, model[0].bias)
        ups = torch.stack([bottlenecks(model, name)["0"].up(y) for name in "abc"]).double()  # [adapters, 2, 3, 6]
        q = y.double() @ fused.query.weight.double().T + fused.query.bias
        k = ups @ fused.key.weight.double().T + fused.key.bias
        p = (q * k).sum(-1).softmax(0)
        expected = y + (p[..., None] * (ups @ fused.value.weight.double().T)).sum(0)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_on_a_base_in_four_bits_and_of_other_bottlenecks() -> None:
    """The mean of two that are the same is either of them."""
    model = tiny.llama()
    peftcore.quantize(model, "nf4")
    fields = {"phm_layer": True, "bottleneck_size": 4, "placement": "pfeiffer", "ln_after": True}
    for name in "ab":
        peftcore.apply(model, "adapter", adapter=name, **fields)
        disturb(model, name, seed=1, std=0.5)
    first, second = (dict(adapter_modules(model, name)) for name in "ab")
    for path, adapter in second.items():
        adapter.load_state_dict(first[path].state_dict())
    peftcore.activate(model, ["a"])
    expected = tiny.logits(model)
    peftcore.apply(model, "adapter-fusion", adapters=["a", "b"], how="average", adapter="mean")
    peftcore.activate(model, ["mean"])
    torch.testing.assert_close(tiny.logits(model), expected)
    peftcore.apply(model, "adapter-fusion", adapters=["a", "b"], adapter="fused")
    model(**tiny.inputs(model)).logits.square().mean().backward()
    fused = dict(adapter_modules(model, "fused"))["model.layers.0.mlp"]
    assert fused.query.weight.grad is not None and fused.value.weight.grad.abs().max() > 0


def test_the_term_of_the_loss() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    peftcore.apply(model, "adapter", adapter="a", target_modules=["0"])
    peftcore.apply(model, "adapter-fusion", adapters=["a"], adapter="fused")
    value = dict(adapter_modules(model, "fused"))["0"].value.weight
    with torch.no_grad():
        value += 0.5
    expected = 0.01 * (value - torch.eye(6)).square().sum()
    torch.testing.assert_close(peftcore.extra_loss(model), expected)
    peftcore.remove(model, "fused")
    peftcore.apply(model, "adapter-fusion", adapters=["a"], adapter="fused", regularization=False)
    assert float(peftcore.extra_loss(model)) == 0.0


def test_what_cannot_be_fused() -> None:
    model = tiny.llama()
    with pytest.raises(peftcore.PeftcoreError, match=r"no adapter 'a'. Apply or load it first"):
        peftcore.apply(model, "adapter-fusion", adapters=["a"])
    peftcore.apply(model, "adapter", adapter="a", bottleneck_size=4)
    peftcore.apply(model, "adapter", adapter="fewer", bottleneck_size=4, placement="pfeiffer")
    peftcore.apply(model, "adapter", adapter="beside", bottleneck_size=4, is_parallel=True)
    peftcore.apply(model, "lora", adapter="low-rank", r=2)
    for names, message in (
        (["a", "fewer"], r"'a' and 'fewer' differ at \['model.layers.0.self_attn', 'model.layers.1.self_attn'\]"),
        (["beside"], "has a Parallel at .*, which cannot be fused. Fuse bottlenecks after sublayers"),
        (["low-rank"], r"'low-rank' \(lora\) has a LoraLinear at"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=message):
            peftcore.apply(model, "adapter-fusion", adapters=names, adapter="fused")
    peftcore.apply(model, "adapter-fusion", adapters=["a"], how="split", splits=[3], adapter="fused")
    with pytest.raises(peftcore.PeftcoreError, match=r"splits=\[3\] add up to 3 tokens, but the text has 7"):
        tiny.logits(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "adapters is empty"),
        ({"adapters": ["a"], "weights": [1.0]}, "weights only works with how='average'"),
        (
            {"adapters": ["a", "b"], "how": "average", "weights": [1.0]},
            "weights needs one entry for each of 2 adapters",
        ),
        (
            {"adapters": ["a", "b"], "how": "average", "weights": [1.0, -1.0]},
            r"weights must not add up to 0, found \[1.0, -1.0\]",
        ),
        ({"adapters": ["a"], "how": "split"}, r"needs splits=\[...\]"),
        ({"adapters": ["a"], "how": "split", "splits": [0]}, "positive numbers of tokens"),
        ({"adapters": ["a"], "how": "fuse"}, "how must be 'attention', 'average' or 'split'"),
    ],
)
def test_wrong_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        AdapterFusionConfig(**fields)


def test_fused_adapters_are_frozen() -> None:
    """Also where they trained before, as adapters do that were just applied or loaded."""
    model = tiny.llama()
    for name in ("reviews", "tweets"):
        peftcore.apply(model, "adapter", bottleneck_size=4, placement="pfeiffer", adapter=name)
    peftcore.apply(model, "adapter-fusion", adapters=["reviews", "tweets"], adapter="fused")
    trained = {name.rpartition("peftcore.")[2].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"fused"}
    peftcore.remove(model, "fused")
    peftcore.activate(model, "tweets")
    assert all(p.requires_grad for name, p in model.named_parameters() if ".tweets." in name)
