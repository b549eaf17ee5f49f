"""Experts in 4 bits on disk: packed while they are read, one by one, saved, and read back."""

import warnings
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.mixtures import INPUTS, mixture
from transformers import AutoModelForCausalLM

import peftcore
from peftcore.quantization import parameters, quantized_experts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
# As their files have them: one by one, together, under other names, transposed, beside dense layers, written by hand.
KINDS = ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "llama4_text"]


def same(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def names(folder):
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_read_saved_and_read_back(kind, tmp_path):
    model = mixture(kind)
    model.save_pretrained(tmp_path / "dense")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=peftcore.FourBitConfig())
    wanted = peftcore.quantize(model)
    same(found, wanted)
    assert torch.equal(found(**INPUTS).logits, wanted(**INPUTS).logits)
    for number, each in enumerate((found, wanted)):  # read by transformers, and made here
        each.save_pretrained(tmp_path / f"{number}")
        assert any(name.endswith("absmax") and "expert" in name for name in names(tmp_path / f"{number}")) or (
            kind == "granitemoe"
        )
        again = peftcore.quantization.load(tmp_path / f"{number}")
        same(again, wanted)
        assert torch.equal(again(**INPUTS).logits, wanted(**INPUTS).logits)
        dense = peftcore.dequantize(again)
        dense.save_pretrained(tmp_path / f"{number} dense")
        assert names(tmp_path / f"{number} dense") == names(tmp_path / "dense")
        same(AutoModelForCausalLM.from_pretrained(tmp_path / f"{number} dense"), dense)


def test_options_and_what_is_left_dense(tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    options = {"double_quant": False, "skip": ["layers.0.mlp.experts", "lm_head"], "compute_dtype": torch.bfloat16}
    found = peftcore.quantization.load(tmp_path / "dense", "fp4", **options)
    same(found, peftcore.quantize(mixture("mixtral"), "fp4", **options))
    ((path, module),) = quantized_experts(found)
    assert path == "model.layers.1.mlp.experts" and module.compute_dtype is torch.bfloat16
    found.save_pretrained(tmp_path / "half")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        same(peftcore.quantization.load(tmp_path / "half"), found)


def test_what_bitsandbytes_leaves_dense_is_reported(tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"4 weights of experts .* are dense in .*call peftcore.quantize\(model\)"):
        found = peftcore.quantization.load(tmp_path / "theirs")
    assert not list(quantized_experts(found))
    same(peftcore.quantize(found, double_quant=False), peftcore.quantize(theirs, double_quant=False))


def test_damage_is_named(tmp_path):
    mixture("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file({**tensors, key: torch.full_like(tensors[key], torch.nan)}, file, {"format": "pt"})
    with pytest.raises(peftcore.PeftcoreError, match=r"experts.gate_up_proj\[2\]' contains nan at index \[64, 0\]"):
        peftcore.quantization.load(tmp_path)
    rest = {name: t for name, t in tensors.items() if "layers.1" not in name or "experts.3" not in name}
    save_file(rest, file, {"format": "pt"})
    with pytest.raises(peftcore.CheckpointError, match=r"experts.*_proj' has 3 experts, but the model needs \[4, "):
        peftcore.quantization.load(tmp_path)
    peftcore.quantize(mixture("mixtral")).save_pretrained(tmp_path)
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.experts.down_proj.absmax"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(peftcore.CheckpointError, match=r"lacks 'model.layers.1.mlp.experts.down_proj.absmax'"):
        peftcore.quantization.load(tmp_path)


def test_no_more_than_an_expert_is_dense_at_once(tmp_path, monkeypatch):
    """Of a model of 300 MB with 96 experts in 6 layers: 79 MiB packed, 86 at the peak, 306 where it is read dense."""
    mixture("mixtral").save_pretrained(tmp_path)
    alive: list[weakref.ref] = []
    seen, quantized = [], parameters.quantize_weight

    def watched(x, *args, **kwargs):
        seen.append((tuple(x.shape), sum(ref() is not None for ref in alive)))
        alive.append(weakref.ref(x.untyped_storage()))
        return quantized(x, *args, **kwargs)

    monkeypatch.setattr(parameters, "quantize_weight", watched)
    peftcore.quantization.load(tmp_path)
    assert sorted(seen) == 8 * [((1, 64, 64), 0)] + 8 * [((1, 128, 64), 0)]
