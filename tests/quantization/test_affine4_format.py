"""Models in affine4: layers and experts, files, merging, and permuted inputs."""

import copy
import json
import pickle

import pytest
import torch
from mixtures import INPUTS as TOKENS
from mixtures import mixture
from quantized import INPUTS, llama, logits
from torch import nn
from transformers import AutoModelForCausalLM

import peftcore
from peftcore import ops
from peftcore.quantization import QuantizedLinear, quantized_experts, quantized_layers
from peftcore.quantization.convert import convert
from peftcore.quantization.format import from_tensors, to_tensors

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def out(model):
    with torch.no_grad():
        return model(**TOKENS).logits


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def act_order(model):
    """Give every quantized layer permuted inputs, as a checkpoint with `g_idx` has."""
    for _, layer in quantized_layers(model):
        order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(0))
        weight = layer.dequantized(torch.float32)[:, order]
        layer.set_packed_parameter("weight", ops.quantize_affine4(weight, 32)._replace(permutation=order))
    return model


@pytest.mark.parametrize("permuted", [False, True])
def test_layers_are_quantized_and_computed_from_their_bits(permuted):
    model, dense = peftcore.quantize(llama(), "affine4", blocksize=32), llama()
    model = act_order(model) if permuted else model
    assert len(list(quantized_layers(model))) == 14
    for path, layer in quantized_layers(model):
        dense.get_submodule(path).weight.data = layer.dequantized(torch.float32)
        assert layer.packed.quant_type == "affine4" and layer.blocksize == 32
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    assert 0 < (logits(model) - logits(llama())).norm() / logits(llama()).norm() < 0.25
    layer = model.model.layers[0].mlp.up_proj
    of_weight = layer.weight.nbytes + layer.absmax.nbytes + layer.zeros.nbytes
    assert 8 * of_weight == 4.75 * layer.in_features * layer.out_features
    assert "affine4, blocksize=32" in repr(layer)


@pytest.mark.parametrize("permuted", [False, True])
def test_copies_pickles_and_files_keep_the_bits(permuted, tmp_path):
    model = peftcore.quantize(llama(), "affine4", blocksize=32)
    model = act_order(model) if permuted else model
    state = bits(model)
    same(bits(copy.deepcopy(model)), state)
    layer = model.model.layers[0].mlp.up_proj
    same(bits(pickle.loads(pickle.dumps(layer))), bits(layer))
    other = QuantizedLinear(layer.in_features, layer.out_features, bias=False)  # of NF4, until it is loaded
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, layer.in_features)
    assert other.quant_type == "affine4" and torch.equal(other(x), layer(x))
    assert "weight.quant_state.peftcore__affine4" in layer.state_dict()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_type"]) == ("peftcore_4bit", "affine4")
    for loaded in (peftcore.quantization.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        same(bits(loaded), state)
        assert torch.equal(logits(loaded), logits(model))
    cast = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state.items()}
    same(bits(model.to(torch.bfloat16)), cast)


@pytest.mark.parametrize("permuted", [False, True])
def test_lora_trains_and_merges(permuted):
    model = peftcore.quantize(llama(), "affine4", blocksize=32)
    model = peftcore.apply(act_order(model) if permuted else model, "qlora", r=4, init_lora_weights=False)
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
    assert {layer.quant_type for _, layer in quantized_layers(model)} == {"affine4"}
    peftcore.unmerge(model)
    same(bits(model), before)
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts(kind, tmp_path):
    """Groups are parts of rows [in], also where the parameter is [experts, in, out]."""
    model, dense = peftcore.quantize(mixture(kind), "affine4", blocksize=32), mixture(kind)
    for path, experts in quantized_experts(model):
        for name in experts.packings:
            parameter, packed = dense.get_submodule(path).get_parameter(name), experts.packed_parameter(name)
            assert packed.turned == (kind == "gpt_oss")
            wanted = ops.quantize_affine4(parameter.mT if packed.turned else parameter, 32)
            for part in ("codes", "absmax", "zeros"):
                assert torch.equal(getattr(packed, part), getattr(wanted, part))
            parameter.data = experts.dequantized_parameter(name, torch.float32)
    for path, layer in quantized_layers(model):
        dense.get_submodule(path).weight.data = layer.dequantized(torch.float32)
    torch.testing.assert_close(out(model), out(dense), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = peftcore.quantization.load(tmp_path)
    same(bits(loaded), bits(model))
    assert torch.equal(out(loaded), out(model))
    same(bits(peftcore.dequantize(copy.deepcopy(model))), bits(dense))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("absmax"), "lacks 'w.absmax'"),
        (lambda t: t.update(absmax=t["absmax"].double()), "'absmax' torch.float64"),
        (lambda t: t["absmax"].fill_(torch.nan), "has NaN or Inf in 'absmax'"),
        (lambda t: t.update(zeros=t["zeros"][:3]), r"'zeros' torch.uint8 \[3\], expected torch.uint8 \[4\]"),
        (lambda t: t.update(permutation=torch.zeros(64, dtype=torch.int64)), "which is not one of the inputs"),
        (lambda t: t["quant_state.peftcore__affine4"].fill_(0), "cannot be read"),
    ],
)
def test_damaged_parts_are_refused(change, message):
    weight = ops.quantize_affine4(torch.randn(4, 64))
    tensors = {name: t.clone() for name, t in to_tensors(weight).items()}
    change(tensors)
    with pytest.raises(peftcore.CheckpointError, match=message):
        from_tensors(weight.codes, tensors, "w")


def test_what_the_format_lacks_is_refused():
    with pytest.raises(peftcore.PeftcoreError, match="blocksize must be a power of two from 32 to 4096, found 96"):
        peftcore.quantize(llama(), "affine4", blocksize=96)
    with pytest.raises(peftcore.PeftcoreError, match="'1' has 8 inputs, but affine4 needs a multiple of 64"):
        peftcore.quantize(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4)), "affine4")


def test_a_checkpoint_weight_becomes_a_layer():
    """Codes, scales and zero points of a checkpoint are a layer whose products are those of their values."""
    codes, zeros = torch.randint(0, 16, (24, 64)), torch.randint(0, 16, (24, 2))
    scales = torch.rand(24, 2).half()
    dense = scales.float().repeat_interleave(32, 1) * (codes - zeros.repeat_interleave(32, 1))
    layer = convert(nn.Linear(64, 24), ops.affine4_weight(codes, scales, zeros, dtype=torch.float32), None)
    assert torch.equal(layer.dequantized(), dense)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias))


def test_the_estimate_knows_the_format():
    model = peftcore.quantize(llama(), "affine4", blocksize=32)
    found = peftcore.estimate(llama(), "qlora", quant_type="affine4", blocksize=32, batch_size=2, length=8).summary
    packed = [layer for _, layer in quantized_layers(model)]
    assert found.packed_parameters == sum(layer.in_features * layer.out_features for layer in packed)
    assert found.packed_bytes == sum(t.nbytes for each in packed for t in (each.weight, *each.buffers()))
