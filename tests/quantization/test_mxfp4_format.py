"""Models in MXFP4: layers and experts, files, merging, and gpt-oss as it is published."""

import copy
import io
import json
import pickle

import pytest
import torch
from mixtures import INPUTS as TOKENS
from mixtures import mixture
from quantized import INPUTS, llama, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import peftcore
from peftcore import ops
from peftcore.ops.mxfp4 import swap_nibbles
from peftcore.quantization import QuantizedLinear, quantized_experts, quantized_layers
from peftcore.quantization.format import from_tensors, to_tensors
from peftcore.quantization.mxfp4_format import from_blocks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def out(model):
    with torch.no_grad():
        return model(**TOKENS).logits


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_layers_are_quantized_and_computed_from_their_bits():
    model, dense = peftcore.quantize(llama(), "mxfp4"), llama()
    assert len(list(quantized_layers(model))) == 14
    for path, layer in quantized_layers(model):
        dense.get_submodule(path).weight.data = layer.dequantized(torch.float32)
        assert layer.packed.quant_type == "mxfp4" and layer.blocksize == 32
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    assert 0 < (logits(model) - logits(llama())).norm() / logits(llama()).norm() < 0.25
    layer = model.model.layers[0].mlp.up_proj
    assert 8 * (layer.weight.nbytes + layer.absmax.nbytes) == 4.25 * layer.in_features * layer.out_features
    assert "mxfp4, blocksize=32" in repr(layer)


def test_copies_pickles_and_state_dicts_keep_the_bits():
    model = peftcore.quantize(llama(), "mxfp4")
    state = bits(model)
    same(bits(copy.deepcopy(model)), state)
    layer = model.model.layers[0].mlp.up_proj
    same(bits(pickle.loads(pickle.dumps(layer))), bits(layer))
    other = QuantizedLinear(layer.in_features, layer.out_features, bias=False)  # of NF4, until it is loaded
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, layer.in_features)
    assert other.quant_type == "mxfp4" and torch.equal(other(x), layer(x))
    assert "weight.quant_state.peftcore__mxfp4" in layer.state_dict()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again = peftcore.quantize(llama(), "mxfp4")
    again.load_state_dict(torch.load(buffer))
    assert torch.equal(logits(again), logits(model))
    same(bits(model.to(torch.bfloat16)), {k: t.bfloat16() if t.is_floating_point() else t for k, t in state.items()})


def test_a_saved_model_keeps_its_bits(tmp_path):
    model = peftcore.quantize(llama(), "mxfp4")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_type"]) == ("peftcore_4bit", "mxfp4")
    for loaded in (peftcore.quantization.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        same(bits(loaded), bits(model))
        assert torch.equal(logits(loaded), logits(model))
    llama().save_pretrained(tmp_path / "dense")
    same(bits(peftcore.quantization.load(tmp_path / "dense", "mxfp4")), bits(model))


def test_lora_trains_and_merges():
    model = peftcore.apply(llama(), "qlora", quant_type="mxfp4", r=4, init_lora_weights=False)
    assert {layer.quant_type for _, layer in quantized_layers(model)} == {"mxfp4"}
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    before, adapted = bits(model), logits(model)
    assert max(peftcore.merge_error(model).values()) > 0
    peftcore.merge(model, dtype=torch.float32)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    peftcore.unmerge(model)
    same(bits(model), before)
    with pytest.warns(UserWarning, match="14 merged layers are quantized again"):
        peftcore.merge(model, max_error=1)
    assert {layer.quant_type for _, layer in quantized_layers(model)} == {"mxfp4"}
    peftcore.unmerge(model)
    same(bits(model), before)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts(kind, tmp_path):
    """Blocks are parts of rows [in], also where the parameter is [experts, in, out]."""
    model, dense = peftcore.quantize(mixture(kind), "mxfp4"), mixture(kind)
    for path, experts in quantized_experts(model):
        for name in experts.packings:
            parameter = dense.get_submodule(path).get_parameter(name)
            turned, packed = kind == "gpt_oss", experts.packed_parameter(name)
            assert packed.turned == turned
            wanted = ops.quantize_mxfp4(parameter.mT if turned else parameter)
            assert torch.equal(packed.codes, wanted.codes) and torch.equal(packed.absmax, wanted.absmax)
            parameter.data = experts.dequantized_parameter(name, torch.float32)
            assert parameter.shape == experts.packings[name].shape
    for path, layer in quantized_layers(model):
        dense.get_submodule(path).weight.data = layer.dequantized(torch.float32)
    torch.testing.assert_close(out(model), out(dense), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = peftcore.quantization.load(tmp_path)
    same(bits(loaded), bits(model))
    assert torch.equal(out(loaded), out(model))
    state = bits(model)
    model.load_state_dict(state)
    same(bits(model), state)
    same(bits(peftcore.dequantize(copy.deepcopy(model))), bits(dense))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_adapters_of_experts(kind):
    """Low-rank products next to MXFP4 equal those next to a dense model with its values, as do merged ones."""
    model = peftcore.quantize(mixture(kind), "mxfp4")
    dense = peftcore.dequantize(copy.deepcopy(model))
    for each in (model, dense):
        torch.manual_seed(0)
        peftcore.apply(
            each, "lora", r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"],
            init_lora_weights=False,
        )  # fmt: skip
    torch.testing.assert_close(out(model), out(dense), rtol=1e-4, atol=1e-4)
    gradients = []
    for each in (model, dense):
        each(**TOKENS).logits.square().mean().backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    before = bits(model)
    peftcore.merge(model, dtype=torch.float32)
    peftcore.merge(dense)
    torch.testing.assert_close(out(model), out(dense), rtol=1e-4, atol=1e-4)
    peftcore.unmerge(model)
    same(bits(model), before)


def published(folder, change=None):
    """A model of gpt-oss as OpenAI publishes it: experts as `_blocks` and `_scales`, the low nibble first."""
    model = mixture("gpt_oss").bfloat16()
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        packed = ops.quantize_mxfp4(state.pop(name).mT)
        experts, rows, columns = packed.shape
        codes = swap_nibbles(packed.codes.clone())
        state[f"{name}_blocks"] = codes.view(experts, rows, columns // 32, 16)
        state[f"{name}_scales"] = packed.absmax.view(experts, rows, columns // 32)
    if change is not None:
        change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gpt_oss_as_published_is_read_without_a_dense_copy(tmp_path, monkeypatch):
    """Values are those of transformers, which dequantizes the file; then LoRA trains on them."""
    published(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr(ops, "dequantize_4bit", None)
        model = peftcore.quantization.load(tmp_path)
    for path, experts in quantized_experts(model):
        for name in ("gate_up_proj", "down_proj"):
            wanted = theirs.get_submodule(path).get_parameter(name)
            found = experts.dequantized_parameter(name)
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    assert len(list(quantized_experts(model))) == 2 and not list(quantized_layers(model))
    torch.testing.assert_close(out(model), out(theirs), rtol=0.05, atol=0.05)
    peftcore.apply(model, "lora", r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    model(**TOKENS, labels=TOKENS["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_gpt_oss_is_saved_with_its_bits(tmp_path):
    published(tmp_path / "theirs")
    model = peftcore.quantization.load(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    again = peftcore.quantization.load(tmp_path / "ours")
    same(bits(again), bits(model))
    assert torch.equal(out(again), out(model))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(next(k for k in s if k.endswith("_scales"))), "lacks '.*_scales'"),
        (lambda s: s[next(k for k in s if k.endswith("_scales"))].fill_(255), "has a scale of NaN"),
        (lambda s: s[next(k for k in s if k.endswith("_scales"))].fill_(253), r"has a scale of 2\^126"),
        (
            lambda s: [s.pop(k) for k in [*s] if "layers.1.mlp.experts.down_proj_" in k and "bias" not in k],
            "has no blocks of 'model.layers.1.mlp.experts.down_proj'",
        ),
        (lambda s: s.update({k: t[..., :-1] for k, t in s.items() if k.endswith("_scales")}), "expected torch.uint8"),
        (lambda s: s.update({k: t[:-1] for k, t in s.items() if k.endswith(("_scales", "_blocks"))}), "has shape"),
    ],
)
def test_damaged_files_of_gpt_oss_are_refused(change, message, tmp_path):
    published(tmp_path, lambda state: (change(state), state.update({k: t.contiguous() for k, t in state.items()})))
    with pytest.raises(peftcore.CheckpointError, match=message):
        peftcore.quantization.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("absmax"), "lacks 'w.absmax'"),
        (lambda t: t.update(absmax=t["absmax"].float()), r"'absmax' torch.float32 \[8\], expected torch.uint8 \[8\]"),
        (lambda t: t["absmax"].fill_(255), "has a scale of NaN"),
        (lambda t: t.update({"quant_state.bitsandbytes__nf4": t["absmax"]}), "needs one tensor"),
        (lambda t: t.pop("quant_state.peftcore__mxfp4"), "needs one tensor 'w.quant_state.bitsandbytes__nf4' or"),
        (lambda t: t["quant_state.peftcore__mxfp4"].fill_(0), "cannot be read"),
    ],
)
def test_damaged_parts_are_refused(change, message):
    weight = ops.quantize_mxfp4(torch.randn(4, 64))
    tensors = {name: t.clone() for name, t in to_tensors(weight).items()}
    change(tensors)
    with pytest.raises(peftcore.CheckpointError, match=message):
        from_tensors(weight.codes, tensors, "w")


def test_what_the_format_lacks_is_refused():
    with pytest.raises(peftcore.PeftcoreError, match="mxfp4 has blocks of 32 values, found blocksize=128"):
        peftcore.quantize(llama(), "mxfp4", blocksize=128)
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))
    with pytest.raises(peftcore.PeftcoreError, match="'1' has 8 inputs, but mxfp4 needs a multiple of 32"):
        peftcore.quantize(model, "mxfp4")
    assert type(model[0]) is nn.Linear
    with pytest.raises(peftcore.CheckpointError, match=r"expected torch\.uint8"):
        from_blocks(torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8), torch.float32, "w")


def test_the_estimate_knows_the_format():
    model = peftcore.quantize(llama(), "mxfp4")
    found = peftcore.estimate(llama(), "qlora", quant_type="mxfp4", batch_size=2, length=8).summary
    packed = [layer for _, layer in quantized_layers(model)]
    assert found.packed_parameters == sum(layer.in_features * layer.out_features for layer in packed)
    assert found.packed_bytes == sum(t.nbytes for each in packed for t in (each.weight, *each.buffers()))
