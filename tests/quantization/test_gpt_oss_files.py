"""gpt-oss as it is published: experts in MXFP4, the low nibble first."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.mixtures import INPUTS as TOKENS, mixture
from transformers import AutoModelForCausalLM

import peftcore
from peftcore import ops
from peftcore.ops.mxfp4 import swap_nibbles
from peftcore.quantization import quantized_experts, quantized_layers
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


def test_tensors_of_another_shape_are_refused():
    with pytest.raises(peftcore.CheckpointError, match=r"expected torch\.uint8"):
        from_blocks(torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8), torch.float32, "w")
