"""Models as GGUF files, read back by transformers, whose reader knows nothing of us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.exported import (
    TOKENS,
    apply,
    gemma2,
    gemma3,
    keys,
    llama,
    logits,
    qwen2,
    qwen3,
    qwen3moe,
    tensors,
    tokenizer,
)
from support.tiny import gpt2

import peftcore
from peftcore import PeftcoreError


def write(model: Any, file: Path, kind: str = "f32", **options: Any) -> Path:
    return peftcore.export(model, file, format="gguf", tokenizer=tokenizer(), gguf_type=kind, **options)


def read(file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (llama, {}),
        (llama, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        (qwen2, {}),
        (qwen3, {"tie_word_embeddings": True}),
    ],
)
def test_a_merged_model_computes_the_same(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model = apply(make(**changes), r=4, target_modules="all-linear")
    expected = logits(model)
    peftcore.merge(model, undo=True)
    assert (logits(read(write(model, tmp_path / "exact.gguf"))) - expected).abs().max() < 2e-5
    assert (logits(read(write(model, tmp_path / "half.gguf", "f16"))) - expected).abs().max() < 5e-3
    peftcore.unmerge(model)  # it was left as it is
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_matrices_have_the_type_and_vectors_fp32(kind: str, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=kind == "q4_0")
    file = write(model, tmp_path / "model.gguf", kind)
    kinds = {entry.name: entry.tensor_type.name for entry in gguf.GGUFReader(file).tensors}
    head = "token_embd.weight" if kind == "q4_0" else "output.weight"
    assert kinds[head] == ("Q8_0" if kind[1] in "45" else kind.upper())
    assert kinds["blk.0.attn_norm.weight"] == "F32" and kinds["blk.1.ffn_down.weight"] == kind.upper()
    assert keys(file)["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    wrong = tensors(file)["blk.1.ffn_down.weight"] - weight
    bits = {"bf16": 9, "q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4}[kind]
    assert 0 < abs(wrong).max() < abs(weight).max() * 2.0 ** (1 - bits) * 1.01


@pytest.mark.parametrize("make", [gemma2, lambda: gemma3(tie_word_embeddings=False)])
def test_weights_of_gemma(make: Any, tmp_path: Path) -> None:
    """transformers reads them, and not all of the hyperparameters."""
    model = make()
    file = write(model, tmp_path / "model.gguf")
    back = read(file).state_dict()
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(back[name], tensor, atol=3e-7), name
    name = "model.layers.1.post_feedforward_layernorm.weight"
    assert np.allclose(tensors(file)["blk.1.post_ffw_norm.weight"], model.state_dict()[name] + 1)


def test_experts_have_their_gates_apart(tmp_path: Path) -> None:
    model = qwen3moe()
    facts, experts = tensors(write(model, tmp_path / "model.gguf")), model.model.layers[1].mlp.experts
    parts = {"gate": experts.gate_up_proj[:, :32], "up": experts.gate_up_proj[:, 32:], "down": experts.down_proj}
    for name, weight in parts.items():
        assert np.array_equal(facts[f"blk.1.ffn_{name}_exps.weight"], weight.detach().numpy()), name


def test_a_router_of_experts_is_in_fp32(tmp_path: Path) -> None:
    file = write(qwen3moe(), tmp_path / "model.gguf", "q8_0")
    kinds = {entry.name: entry.tensor_type.name for entry in gguf.GGUFReader(file).tensors}
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32" and kinds["blk.1.ffn_up_exps.weight"] == "Q8_0"
    facts = keys(file)
    assert [facts[f"qwen3moe.expert_{key}"] for key in ("count", "used_count", "feed_forward_length")] == [4, 2, 32]


def test_windows_and_caps_of_gemma(tmp_path: Path) -> None:
    second, third = keys(write(gemma2(), tmp_path / "2.gguf")), keys(write(gemma3(), tmp_path / "3.gguf"))
    assert second["gemma2.attention.sliding_window"] == 4 and second["gemma2.context_length"] == 128
    assert (second["gemma2.attn_logit_softcapping"], second["gemma2.final_logit_softcapping"]) == (50, 30)
    assert third["gemma3.rope.freq_base"] == 1e6 and third["gemma3.rope.freq_base_swa"] == 1e4
    assert "gemma3.attn_logit_softcapping" not in third


def test_rows_that_are_no_whole_blocks_are_in_16_bits(tmp_path: Path) -> None:
    file = write(llama(intermediate_size=80), tmp_path / "model.gguf", "q4_0")
    kinds = {entry.name: entry.tensor_type.name for entry in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_0"


def test_an_untied_head_is_written(tmp_path: Path) -> None:
    model = apply(llama(tie_word_embeddings=True), r=4, target_modules=["lm_head"])
    expected = logits(model)
    with pytest.warns(UserWarning, match="untied 'lm_head'"):
        peftcore.merge(model, untie=True, undo=True)
    file = write(model, tmp_path / "model.gguf")
    assert "output.weight" in tensors(file)
    assert (logits(read(file)) - expected).abs().max() < 2e-5


def test_llama3_s_rotary_embedding_has_its_factors(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = llama(rope_parameters={**rope, "original_max_position_embeddings": 32})
    file = write(model, tmp_path / "model.gguf")
    plain = 1.0 / 1e4 ** (torch.arange(0, 16, 2) / 16)
    factors = torch.from_numpy(tensors(file)["rope_freqs.weight"].copy())
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq)
    assert 1 in factors and factors.max() == 8


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
        ),
    ],
)
def test_scaled_rotary_embeddings(rope: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    facts = keys(write(qwen2(rope_parameters={"rope_theta": 5e4, **rope}), tmp_path / "model.gguf"))
    assert {key: facts[f"qwen2.rope.scaling.{key}"] for key in expected} == expected
    assert facts["qwen2.rope.freq_base"] == 5e4


def test_a_window_is_the_length_of_the_context(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {**llama().config.to_dict(), "sliding_window": 48}
    for key in ("architectures", "model_type", "rope_parameters"):
        sizes.pop(key)
    facts = keys(write(MistralForCausalLM(MistralConfig(**sizes)), tmp_path / "model.gguf"))
    assert facts["llama.context_length"] == 48 and facts["general.architecture"] == "llama"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gpt2, "GPT2LMHeadModel cannot be exported to GGUF .supported: LlamaForCausalLM, .* convert_hf_to_gguf.py"),
        (lambda: llama(hidden_act="gelu"), "hidden_act='gelu', which llama.cpp's 'llama' does not support"),
        (
            lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "does not support .*rotary embedding .*dynamic",
        ),
        (
            lambda: qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=0),
            "some of the model's layers have a sliding window",
        ),
        (
            lambda: qwen3moe(norm_topk_prob=False),
            "does not normalise the weights of the top-k experts .norm_topk_prob.",
        ),
        (lambda: qwen3moe(mlp_only_layers=[0]), "layers.0.mlp.gate_proj.weight' has no counterpart in a GGUF"),
        (lambda: gemma2(query_pre_attn_scalar=64), "query_pre_attn_scalar=64, not 32"),
        (lambda: gemma2(attn_logit_softcapping=None), "attn_logit_softcapping=None"),
        (lambda: gemma2(final_logit_softcapping=None), "no final_logit_softcapping"),
        (lambda: gemma2(tie_word_embeddings=False), "'lm_head.weight' has no counterpart in a GGUF file of 'gemma2'"),
        (lambda: gemma2(layer_types=["full_attention"] * 2), "with full attention are not every 2th"),
        (lambda: gemma3(attn_logit_softcapping=9.0), "attn_logit_softcapping=9.0"),
        (lambda: gemma3(hidden_activation="gelu"), "hidden_act='gelu'"),
        (lambda: gemma3(attention_bias=True), "attention_bias or use_bidirectional_attention"),
        (lambda: apply(llama()), r"adapters 'default' are active.*peftcore.merge\(model\)"),
        (lambda: peftcore.quantize(llama()), "q_proj.weight' is in nf4, .*peftcore.dequantize"),
        (lambda: peftcore.quantize(llama(), "nvfp4"), "in nvfp4 with a per-tensor scale.*peftcore.dequantize"),
    ],
)
def test_what_llama_cpp_would_compute_in_another_way_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PeftcoreError, match=message):
        write(make(), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_value_too_large_for_the_type_is_refused(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 7e4
    file = tmp_path / "model.gguf"
    file.write_text("what was there")
    with pytest.raises(PeftcoreError, match=r"'output.weight' contains 7e\+04, which F16 cannot.*bf16"):
        write(model, file, "f16")
    assert file.read_text() == "what was there" and len(list(tmp_path.iterdir())) == 1
    write(model, file, "bf16")


def test_asked_for_wrongly(tmp_path: Path) -> None:
    model = llama()
    with pytest.raises(PeftcoreError, match=r"gguf_type='q4_k' is not known. Choose one of: f32, f16.*, q4_k_m"):
        write(model, tmp_path / "model.gguf", "q4_k")
    with pytest.raises(PeftcoreError, match="tokenizer=tokenizer"):
        peftcore.export(model, tmp_path / "model.gguf", format="gguf")
    with pytest.raises(PeftcoreError, match=r"'gguf' has no option 'gguf_typ' \(nearest: 'gguf_type'"):
        peftcore.export(model, tmp_path / "model.gguf", format="gguf", gguf_typ="f16")
    with pytest.raises(PeftcoreError, match=r"gguf_type.* a text, found 16"):
        write(model, tmp_path / "model.gguf", 16)
    assert model(TOKENS) is not None


def test_a_write_that_stops_early_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise OSError("6144 requested and 720 written")  # NumPy's words on a full disk

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", stopped)
    with pytest.raises(
        PeftcoreError, match=r"cannot write '.*m\.gguf': a write was incomplete .*full disk.*free some space"
    ):
        peftcore.export(llama(), tmp_path / "m.gguf", format="gguf", tokenizer=tokenizer())
    assert list(tmp_path.iterdir()) == []
