"""The layers, the config and the arithmetic of LoRA."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings, strategies as st
from peftcore_lora import LoraConfig
from support import tiny
from torch import nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.plugin import disturb

LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(3, 5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), lambda: torch.randn(6)),
    "embedding": (lambda: nn.Embedding(11, 4), lambda: torch.randint(0, 11, (3, 5))),
    "padded embedding": (lambda: nn.Embedding(11, 4, padding_idx=2), lambda: torch.randint(0, 11, (3, 5))),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), lambda: torch.randn(2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 5), padding="same"), lambda: torch.randn(2, 3, 9, 8)),
    "dilated conv2d": (lambda: nn.Conv2d(3, 4, 3, dilation=2, stride=2), lambda: torch.randn(2, 3, 9, 8)),
    "reflecting conv2d": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        lambda: torch.randn(2, 3, 9, 8),
    ),
}


@pytest.mark.parametrize("kind", list(LAYERS))
def test_layers_merge_to_what_they_compute(kind: str) -> None:
    make, make_input = LAYERS[kind]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), make_input()
    base = model(x)
    peftcore.apply(model, "lora", r=2, lora_alpha=6, target_modules=["0"])
    assert torch.equal(model(x), base)
    disturb(model, "default", seed=1, std=1.0)
    acting = model(x)
    assert (acting - base).abs().max() > 0.1
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(model(x), acting, rtol=1e-4, atol=1e-5)
    peftcore.unmerge(model)
    assert torch.equal(model(x), acting)


@given(
    out=st.integers(1, 9),
    inside=st.integers(1, 9),
    r=st.integers(1, 4),
    rows=st.integers(0, 5),
    alpha=st.floats(0.5, 64),
)
@settings(max_examples=40, deadline=None)
def test_linear_equals_the_formula_in_float64(out: int, inside: int, r: int, rows: int, alpha: float) -> None:
    model = nn.Sequential(nn.Linear(inside, out)).double()
    peftcore.apply(model, "lora", r=r, lora_alpha=alpha, target_modules=["0"])
    disturb(model, "default", seed=1)
    a, b = (p for _, p in adapter_parameters(model, "default"))
    x = torch.randn(rows, inside, dtype=torch.float64)
    expected = x @ (model[0].weight + alpha / r * b @ a).T + model[0].bias
    torch.testing.assert_close(model(x), expected)


def test_parameters_and_scale() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    peftcore.apply(model, "lora", r=3, lora_alpha=12, target_modules=["0"])
    adapter = model[0].peftcore["default"]
    assert (tuple(adapter.lora_A.shape), tuple(adapter.lora_B.shape), adapter.scale) == ((3, 6), (4, 3), 4.0)
    peftcore.remove(model)
    peftcore.apply(model, "lora", r=4, lora_alpha=12, use_rslora=True, target_modules=["0"])
    assert model[0].peftcore["default"].scale == pytest.approx(12 / math.sqrt(4))
    assert "r=4, scale=6" in repr(model)


@pytest.mark.parametrize("inside", [False, True])
def test_dropout_acts_in_training_only(inside: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 4)).train()
    if inside:  # then the layer has no operands
        peftcore.apply(model, "lora", adapter="inner", r=2, target_modules=["0"])
    peftcore.apply(model, "lora", r=2, lora_dropout=0.5, target_modules=["0"])
    disturb(model, "default", seed=1)
    x = torch.randn(3, 64)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_samples_pass_through_a_bias_and_dropout(fields: dict[str, Any]) -> None:
    model, x, names = nn.Sequential(nn.Linear(64, 4)), torch.randn(3, 64), ["a", None, "b"]
    for seed, name in enumerate("ab"):
        peftcore.apply(model, "lora", adapter=name, r=2, target_modules=["0"], **fields)
        disturb(model, name, seed=seed, std=0.5)
    expected = torch.cat([peftcore.activate(model.eval(), name or [])(x[i : i + 1]) for i, name in enumerate(names)])
    peftcore.activate(model, names, per_sample=True)
    torch.testing.assert_close(model(x), expected)
    model.train()
    differs = [not torch.equal(one, other) for one, other in zip(model(x), model(x), strict=True)]
    assert differs == [name is not None and "lora_dropout" in fields for name in names]


def test_padding_gets_no_gradient() -> None:
    model = peftcore.apply(nn.Sequential(nn.Embedding(5, 4, padding_idx=1)), "lora", r=2, target_modules=["0"])
    disturb(model, "default", seed=1)
    model(torch.tensor([[1, 3]])).sum().backward()
    gradient = model[0].peftcore["default"].lora_A.grad
    assert gradient.abs().sum(0).bool().tolist() == [False, False, False, True, False]


def test_autocast() -> None:
    model = tiny.llama()
    peftcore.apply(model, "lora", r=4)
    disturb(model, "default", seed=1)
    expected = tiny.logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(**tiny.inputs(model)).logits
        actual.float().square().mean().backward()
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in adapter_parameters(model, "default"))


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300))
    actual = {}
    for init in (True, "gaussian", False):
        peftcore.apply(model, "lora", r=8, init_lora_weights=init, target_modules=["0"])
        actual[init] = [p.detach() for _, p in adapter_parameters(model, "default")]
        peftcore.remove(model)
    assert actual[True][0].abs().max() <= 1 / math.sqrt(400) and not actual[True][1].any()
    assert actual["gaussian"][0].std().item() == pytest.approx(1 / 8, rel=0.05) and not actual["gaussian"][1].any()
    assert actual[False][1].any()


def test_a_classifier_head_is_trained_by_default() -> None:
    model = peftcore.apply(tiny.bert_classifier(), "lora", target_modules=["query"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "peftcore" not in name}
    assert trained == {"classifier.weight", "classifier.bias"}
    model = peftcore.apply(tiny.bert_classifier(), "lora", target_modules=["query"], modules_to_save=[])
    assert not any(p.requires_grad for name, p in model.named_parameters() if "peftcore" not in name)


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 2), ("all", 19)])
def test_biases(bias: str, count: int) -> None:
    model = peftcore.apply(tiny.bert_classifier(), "lora", target_modules=["query"], bias=bias, modules_to_save=[])
    assert sum(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias")) == count


def test_the_saved_config_is_explicit() -> None:
    config = peftcore.plan(tiny.gpt2(), "lora").config
    assert config.target_modules == ["c_attn", "c_fc", "c_proj"]
    assert config.fan_in_fan_out is True
    assert peftcore.plan(tiny.bert_classifier(), "lora").config.modules_to_save == ["classifier"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r must be a positive whole number, found 0"),
        ({"r": -3}, r"found -3"),
        ({"r": 2.5}, r"found 2.5"),
        ({"rank_pattern": {"q_proj": 0}}, r"r must be a positive whole number, found 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), found 1.0"),
        ({"init_lora_weights": "olara"}, r"found 'olara'.*olora"),
        ({"bias": "some"}, r"bias must be 'none', 'all' or 'lora_only', found 'some'"),
        ({"rank": 4}, r"LoraConfig has no field 'rank'\. Did you mean 'r'\? Its fields are: r, "),
        ({"lora_r": 4}, r"LoraConfig has no field 'lora_r'\. Did you mean 'r'\?"),
        ({"dropout": 0.1}, r"LoraConfig has no field 'dropout' \(nearest: 'lora_dropout', 'kept_dropout'\)\. Its"),
        ({"adapter_name": "a"}, r"To name the adapter, pass adapter='a' to apply or load\. Its fields are"),
        ({"task_type": "CAUSAL_LM"}, r"PEFT's task_type has no effect in peftcore\. Leave it out"),
        ({"target_modules": ["input_layernorm"]}, r"'input_layernorm' matches LlamaRMSNorm"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(tiny.llama(), "lora", **fields)


def test_convolutions_in_groups() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"r must be a multiple .* found 3.*rank_pattern=\{'0': 2\}"):
        peftcore.apply(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "lora", target_modules=["0"], r=3)
    with pytest.raises(peftcore.PeftcoreError, match=r"with 2 groups that is dilated.*exclude_modules=\['0'\]"):
        peftcore.apply(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2, dilation=2)), "lora", target_modules=["0"], r=2)
    model = peftcore.apply(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "lora", target_modules=["0"], r=2)
    with pytest.raises(peftcore.PeftcoreError, match="connects all groups, so it cannot be merged"):
        peftcore.merge(model, undo=True)


BIASED: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(6, 4), lambda: torch.randn(3, 5, 6)),
    "linear without a bias": (lambda: nn.Linear(6, 4, bias=False), lambda: torch.randn(3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 9)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), lambda: torch.randn(2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 3, 3), padding="same"), lambda: torch.randn(2, 4, 3, 5, 5)),
    "conv3d in groups": (lambda: nn.Conv3d(4, 8, 3, groups=4, bias=False), lambda: torch.randn(2, 4, 5, 5, 5)),
}


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("kind", list(BIASED))
def test_a_bias_of_b(kind: str, tmp_path: Path) -> None:
    """Here and in PEFT, from either's file; it moves the layer's bias, and does not merge where there is none."""
    make, make_input = BIASED[kind]
    torch.manual_seed(0)
    layer, x = make(), make_input()
    model = peftcore.apply(nn.Sequential(copy.deepcopy(layer)), "lora", r=4, target_modules=["0"], lora_bias=True)
    disturb(model, "default", seed=1)
    acting = model(x)
    peftcore.save(model, tmp_path / "ours")
    peft_model = peft.PeftModel.from_pretrained(nn.Sequential(copy.deepcopy(layer)), tmp_path / "ours").eval()
    torch.testing.assert_close(peft_model(x), acting, rtol=0, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model.save_pretrained(tmp_path / "theirs")
    reloaded = peftcore.load(nn.Sequential(copy.deepcopy(layer)), tmp_path / "theirs")
    assert torch.equal(reloaded(x), acting)
    if layer.bias is None or getattr(layer, "groups", 1) > 1:
        with pytest.raises(peftcore.PeftcoreError, match=r"cannot be merged|has no bias"):
            peftcore.merge(model, undo=True)
        return
    peftcore.merge(model, undo=True)
    assert not torch.equal(model[0].bias, layer.bias)
    torch.testing.assert_close(model(x), acting, rtol=1e-4, atol=1e-5)
    peftcore.unmerge(model)
    assert torch.equal(model[0].bias, layer.bias)


def test_where_b_has_no_bias() -> None:
    for layer in (nn.Embedding(8, 4), nn.MultiheadAttention(8, 2)):
        with pytest.raises(peftcore.PeftcoreError, match=r"lora_bias=True is not supported at '0'"):
            peftcore.apply(nn.Sequential(layer), "lora", target_modules=["0"], lora_bias=True)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.Conv1d(3, 4, 3, 1, 1, 1, 1, False, "circular")],
    ids=str,
)
def test_convolutions_that_peft_computes_otherwise(layer: nn.Module, tmp_path: Path) -> None:
    """PEFT's A is neither dilated nor padded with other values than zero: that is no change of the weight."""
    model = peftcore.apply(nn.Sequential(copy.deepcopy(layer)), "lora", r=2, target_modules=["0"])
    with pytest.warns(UserWarning, match=r"PEFT cannot read this file.*exclude_modules=\['0'\]"):
        peftcore.save(model, tmp_path / "ours")
    peft_model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), peft.LoraConfig(target_modules=["0"], r=2))
    peft_model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(peftcore.CheckpointError, match=r"dilated, or pads.*exclude_modules=\['0'\]"):
        peftcore.load(nn.Sequential(layer), tmp_path / "theirs")


def test_found_through_its_entry_point() -> None:
    method = peftcore.methods()["lora"]
    assert method.config_class is LoraConfig
    assert method.state.peft_type == "LORA"


def test_a_head_left_alone_stays_so_through_a_file(tmp_path) -> None:
    model = peftcore.apply(tiny.bert_classifier(), "lora", target_modules=["query"], modules_to_save=[])
    peftcore.save(model, tmp_path)
    loaded = peftcore.load(tiny.bert_classifier(), tmp_path)
    assert peftcore.summary(loaded).adapters[0].trained == 0


@pytest.mark.parametrize("quantized", [False, True])
def test_the_innermost_adapter_of_a_linear_is_fused(quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = peftcore.ops.lora_linear
    monkeypatch.setattr(peftcore.ops, "lora_linear", lambda *args: calls.append(args) or fused(*args))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 8)).eval(), torch.randn(3, 64)
    if quantized:
        peftcore.quantize(model)
    base = model(x)
    deltas = []
    for name in ("a", "b"):
        peftcore.apply(model, "lora", r=2, adapter=name, target_modules=["0"])
        disturb(model, name, seed=len(deltas), std=1.0)
        peftcore.activate(model, name)
        deltas.append(model(x) - base)
    calls.clear()
    peftcore.activate(model, ["a", "b"])
    torch.testing.assert_close(model(x), base + sum(deltas), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1  # the outer one adds to what the inner one gives


def test_a_layer_that_computes_more_than_a_product_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Doubled(6, 4)), torch.randn(3, 6)
    base = model(x)
    peftcore.apply(model, "lora", r=2, target_modules=["0"])
    assert torch.equal(model(x), base)
    disturb(model, "default", seed=1, std=1.0)
    adapter = model[0].peftcore["default"]
    torch.testing.assert_close(model(x), base + x @ adapter.delta().T)


def test_training_follows_the_composition_of_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        torch.manual_seed(0)
        model = tiny.llama()
        peftcore.apply(model, "lora", r=4, lora_alpha=8)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        tokens = torch.randint(0, 90, (4, 12), generator=torch.Generator().manual_seed(1))
        actual = []
        for _ in range(12):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            actual.append(loss.item())
        return actual

    fused = losses()
    monkeypatch.setattr(peftcore.engine.adaptation.adapted.OwnForward, "linear_operands", lambda self, x: None)
    plain = losses()
    assert fused[-1] < fused[0] - 0.2
    torch.testing.assert_close(fused, plain, rtol=2e-4, atol=0)
