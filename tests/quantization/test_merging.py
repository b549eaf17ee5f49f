"""Merging into 4 bits: what is lost is measured and refused; into 16 bits instead, and back bit for bit."""

import copy
import json
import warnings

import pytest
import torch
from support import tiny
from support.mixtures import mixture
from support.quantized import gpt2, llama, logits
from torch import nn

import peftcore
from peftcore.plugin import OnWeight
from peftcore.quantization import QuantizedLinear, quantized_experts, quantized_layers
from peftcore.testing import disturb

LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
NAMES = [f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.up_proj", "self_attn.q_proj")]


def adapted(std=0.02, model=None, **quantization):
    model = peftcore.apply(peftcore.quantize(model or llama(), **quantization), "lora", **LORA)
    disturb(model, "default", 1, std=std)
    return model


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(found, wanted):
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def lost_in(layer, delta, quantized_again):
    before = layer.dequantized(torch.float32)
    return ((quantized_again - before - delta).norm() / delta.norm()).item()


def test_the_loss_is_measured_layer_by_layer():
    model = adapted()
    before = states(model)
    lost = peftcore.merge_error(model)
    assert sorted(lost) == sorted(NAMES)
    same(states(model), before)
    layer = model.model.layers[0].self_attn.q_proj
    delta = layer.peftcore["default"].delta().detach()
    wanted = layer.dequantized(torch.float32) + delta
    again = peftcore.quantize(nn.Sequential(nn.Linear(64, 64)))[0]
    again.load_state_dict({"weight": wanted, "bias": torch.zeros(64)})
    assert lost[NAMES[1]] == pytest.approx(lost_in(layer, delta, again.dequantized()), rel=1e-5)


@pytest.mark.parametrize(("relative", "low", "high"), [(0.02, 0.9, 1.4), (0.1, 0.6, 1.0), (5.0, 0.0, 0.15)])
def test_small_changes_are_lost_and_large_ones_are_not(relative, low, high):
    """For a change of 2 % of the weight the error of quantizing again is as large as the change itself."""
    torch.manual_seed(0)
    model = peftcore.quantize(nn.Sequential(nn.Linear(256, 256, bias=False)))
    size = model[0].dequantized().norm()
    peftcore.apply(model, "lora", r=16, lora_alpha=16, target_modules=["0"])
    disturb(model, "default", 1)
    adapter = model[0].peftcore["default"]
    with torch.no_grad():
        adapter.lora_B *= relative * size / adapter.delta().norm()
    assert low < peftcore.merge_error(model)["0"] < high


@pytest.mark.parametrize("undo", [True, False])
def test_too_much_is_refused_and_nothing_changes(undo):
    model = adapted()
    before, wanted = states(model), logits(model)
    message = r"4 merged layers loses \d+% .* max_error=0.1 allows 10%. .*merge\(model, dtype=torch.bfloat16\)"
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.merge(model, undo=undo)
    same(states(model), before)
    assert torch.equal(logits(model), wanted)


def test_limits_of_the_error():
    model = adapted()
    for limit in (-1, float("nan"), True, "0.1"):
        with pytest.raises(
            peftcore.PeftcoreError, match="max_error must be a fraction of the adapters' change, at least 0"
        ):
            peftcore.merge(model, max_error=limit, undo=True)
    with pytest.warns(UserWarning, match="4 merged layers loses"):
        peftcore.merge(model, max_error=None, undo=True)


@pytest.mark.parametrize("double_quant", [False, True])
def test_what_is_allowed_is_written_and_reported(double_quant):
    model = adapted(std=0.5, double_quant=double_quant)
    before, wanted = states(model), logits(model)
    with pytest.warns(UserWarning, match="4 merged layers loses .* on average"):
        peftcore.merge(model, max_error=1.0, undo=True)
    lost = peftcore.engine.state_of(model).merged.lost
    assert sorted(lost) == sorted(NAMES) and 0 < max(lost.values()) < 0.5
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.is_quantized and layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
    assert (logits(model) - wanted).norm() < 0.5 * wanted.norm()
    peftcore.unmerge(model)
    same(states(model), before)
    assert torch.equal(logits(model), wanted)


def test_16_bits_hold_the_merged_weight():
    model = adapted(std=0.2, model=llama(torch.bfloat16))
    before, wanted = states(model), logits(model)
    config = model.config.quantization_config
    peftcore.merge(model, dtype=torch.bfloat16, undo=True)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == (64, 64)
    assert "model.layers.0.self_attn.q_proj.weight.absmax" not in model.state_dict()
    assert NAMES[1] in model.config.quantization_config["llm_int8_skip_modules"]
    assert (logits(model) - wanted).norm() < 0.02 * wanted.norm()
    peftcore.unmerge(model)
    same(states(model), before)
    assert torch.equal(logits(model), wanted) and model.config.quantization_config == config


def test_a_dense_weight_of_another_dtype_than_the_model_computes():
    model = adapted(std=0.2)
    wanted = logits(model)
    peftcore.merge(model, dtype=torch.bfloat16, undo=True)
    assert logits(model).dtype == torch.float32
    assert (logits(model) - wanted).norm() < 0.02 * wanted.norm()
    peftcore.unmerge(model)
    assert torch.equal(logits(model), wanted)


def test_for_good_in_16_bits_gives_plain_layers(tmp_path):
    model = adapted(std=0.2)
    wanted = logits(model)
    peftcore.merge(model, dtype=torch.bfloat16)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert type(model.model.layers[0].self_attn.k_proj) is QuantizedLinear
    assert logits(model).dtype == torch.bfloat16
    assert (logits(model).float() - wanted).norm() < 0.03 * wanted.norm()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert sorted(fields["llm_int8_skip_modules"]) == sorted([*NAMES, "lm_head"])


def test_every_layer_dense_leaves_no_trace_of_quantization():
    model = peftcore.apply(peftcore.quantize(gpt2()), "lora", r=2)
    peftcore.merge(model, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_an_adapter_at_its_start_changes_no_bit():
    model = peftcore.apply(peftcore.quantize(llama()), "lora", **LORA)
    before = states(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftcore.merge(model, undo=True)
    same({name: value for name, value in states(model).items() if name in before}, before)


def test_not_finite_is_refused():
    model = adapted()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.peftcore["default"].lora_B[0, 0] = torch.nan
    for dtype in (None, torch.bfloat16):
        with pytest.raises(peftcore.PeftcoreError, match=r"into 'model.layers.0.self_attn.q_proj' gives NaN or Inf"):
            peftcore.merge(model, dtype=dtype, max_error=10, undo=True)


def test_after_a_cast_unmerging_is_exact():
    model = adapted(std=0.2)
    bits = {name: t.clone() for name, t in model.state_dict().items() if "q_proj.weight" in name}
    peftcore.merge(model, dtype=torch.float32, undo=True)
    model.to(torch.bfloat16)
    peftcore.unmerge(model)
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in bits.items())


@pytest.mark.parametrize("method", ["hira", "glora", "peanut"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_read_the_weight_read_it_packed_again_after_unmerge(method, dtype):
    model = peftcore.apply(peftcore.quantize(tiny.llama()), method, target_modules=["q_proj", "down_proj"])
    disturb(model, "default", 1, std=0.1)
    wanted = tiny.logits(model)
    assert not torch.equal(wanted, tiny.logits(peftcore.quantize(tiny.llama())))
    peftcore.merge(model, dtype=dtype, undo=True)
    torch.testing.assert_close(tiny.logits(model), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    peftcore.unmerge(model)
    assert torch.equal(tiny.logits(model), wanted)


def test_the_config_says_after_unmerge_what_it_said_before_merge():
    model = peftcore.quantize(llama())
    before = model.config.quantization_config
    peftcore.apply(model, "lora", r=2, target_modules="all-linear")
    disturb(model, "default", 1, std=0.02)
    peftcore.merge(model, dtype=torch.bfloat16, undo=True)
    assert not hasattr(model.config, "quantization_config")
    peftcore.unmerge(model)
    assert model.config.quantization_config == before


def on_experts(kind="mixtral", names=("gate_up_proj", "down_proj"), **quantization):
    """A mixture in 4 bits, with a change of all its experts' weights."""
    model = peftcore.quantize(mixture(kind), **quantization)
    placed = [(path, module, name) for path, module in quantized_experts(model) for name in names]
    place = lambda *_: [OnWeight(p, n, tiny.LowRank(*m.packings[n].shape)) for p, m, n in placed]  # noqa: E731
    torch.manual_seed(0)
    with tiny.installed(tiny.method("on_experts", place)):
        peftcore.apply(model, "on_experts")
    disturb(model, "default", 1, std=0.3)
    return model


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
def test_experts_are_merged_and_come_back(kind):
    model = on_experts(kind)
    before, wanted, config = states(model), logits(model), model.config.quantization_config
    dense = peftcore.dequantize(copy.deepcopy(peftcore.remove(copy.deepcopy(model), "default")))
    assert not torch.allclose(logits(dense), wanted, atol=1e-3)  # the adapter acts
    lost = peftcore.merge_error(model)
    path, module = next(quantized_experts(model))
    assert set(lost) == {path for path, _ in quantized_experts(model)}
    with torch.no_grad():
        worst = 0
        for name, change in module.peftcore["default"].changes.items():
            old = module.dequantized_parameter(name, torch.float32)
            new = change(old.clone())
            stored = peftcore.ops.dequantize_4bit(module.quantized_parameter(name, new))
            worst = max(worst, ((stored - new).norm() / (new - old).norm()).item())
    assert lost[path] == pytest.approx(worst, rel=1e-5)
    with pytest.raises(peftcore.PeftcoreError, match=r"merge\(model, dtype=torch.bfloat16\)"):
        peftcore.merge(model, max_error=0.01, undo=True)
    same(states(model), before)

    with pytest.warns(UserWarning, match=r"merged layers loses"):
        peftcore.merge(model, max_error=5, undo=True)
    assert module.gate_up_proj.dtype is torch.uint8 and not torch.equal(logits(model), wanted)
    peftcore.unmerge(model)
    same(states(model), before)
    assert torch.equal(logits(model), wanted)

    peftcore.merge(model, dtype=torch.float32, undo=True)
    assert module.gate_up_proj.dtype is torch.float32 and module.packed_parameter("gate_up_proj") is None
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert not any("experts.gate_up_proj." in key for key in model.state_dict())
    peftcore.unmerge(model)
    same(states(model), before)
    assert model.config.quantization_config == config
    peftcore.merge(model, dtype=torch.float32)
    assert not list(quantized_experts(model)) and list(quantized_layers(model))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)


def test_half_of_the_experts_merged_for_good():
    model = on_experts(names=("down_proj",))
    wanted = logits(model)
    peftcore.merge(model, dtype=torch.float32)
    _, module = next(quantized_experts(model))
    assert set(module.packings) == {"gate_up_proj"} and module.down_proj.dtype is torch.float32
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
