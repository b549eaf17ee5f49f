"""Low-rank adapters as GGUF files: W + alpha / r B A of two files is the merged weight of a third."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.exported import apply, keys, llama, qwen2, tensors, tokenizer
from support.mixtures import mixture

import peftcore
from peftcore import PeftcoreError

EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(model: Any, file: Path) -> Path:
    return peftcore.export(model, file, format="gguf", adapter="default")


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (llama, {"r": 4, "lora_alpha": 12, "target_modules": EVERYWHERE}),
        (llama, {"r": 4, "use_rslora": True, "target_modules": [*EVERYWHERE, "embed_tokens", "lm_head"]}),
        (qwen2, {"r": 4, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}, "target_modules": EVERYWHERE}),
        (lambda: llama(tie_word_embeddings=True), {"r": 4, "target_modules": EVERYWHERE}),
    ],
)
def test_the_products_are_the_change(make: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    options = {"format": "gguf", "tokenizer": tokenizer(), "gguf_type": "f32"}
    before = tensors(peftcore.export(model, tmp_path / "base.gguf", **options))
    apply(model, **fields)
    file = write(model, tmp_path / "adapter.gguf")
    peftcore.merge(model, undo=True)
    after = tensors(peftcore.export(model, tmp_path / "merged.gguf", **options))

    adapter_tensors, facts = tensors(file), keys(file)
    assert facts["general.type"] == "adapter" and facts["adapter.type"] == "lora"
    assert facts["general.architecture"] == model.config.model_type
    for name, weight in before.items():
        a, b = adapter_tensors.pop(f"{name}.lora_a", None), adapter_tensors.pop(f"{name}.lora_b", None)
        if a is None:
            assert np.array_equal(after[name], weight), name
            continue
        scale = facts["adapter.lora.alpha"] / b.shape[1]  # as llama.cpp has it
        change = (b @ a.T).T if name == "token_embd.weight" else b @ a  # which it reads row by row
        assert abs(change).max() > 0.01, name
        assert np.allclose(weight + scale * change, after[name], atol=2e-6), name
    assert not adapter_tensors


def test_a_scale_of_nothing_is_no_scale_of_one(tmp_path: Path) -> None:
    model = apply(llama(), r=4, target_modules=["q_proj"])
    peftcore.scale(model, "default", 0.0)
    file = write(model, tmp_path / "adapter.gguf")
    assert keys(file)["adapter.lora.alpha"] != 0  # by which llama.cpp means 1
    assert not any(tensor.any() for name, tensor in tensors(file).items() if name.endswith("lora_b"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: apply(llama(), "dora", r=4),
            r"\(dora\) cannot be written.*peftcore.convert\(model, 'default', method='lora'",
        ),
        (lambda: apply(llama(), "ia3"), "ia3.* cannot be written as an adapter of llama.cpp.*peftcore.convert"),
        (lambda: apply(qwen2(), r=4, bias="all"), r"\(lora\).* also trains the base parameter '.*bias'"),
        (lambda: apply(llama(), r=4, modules_to_save=["lm_head"]), "modules_to_save=\\['lm_head'\\]"),
        (lambda: apply(llama(), "prompt-tuning", num_virtual_tokens=3), "does not change weights"),
        (
            lambda: apply(llama(tie_word_embeddings=True), r=4, target_modules=["lm_head"]),
            r"changes 'lm_head', whose weight is tied to 'model.embed_tokens'.*untie=True",
        ),
        (lambda: apply(mixture("mixtral"), r=4), "MixtralForCausalLM cannot be exported to GGUF"),
    ],
)
def test_what_llama_cpp_cannot_add_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    model = make()
    with pytest.raises(PeftcoreError, match=message):
        write(model, tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []


def test_any_change_of_weights_by_its_products(tmp_path: Path) -> None:
    model = apply(llama(), "dora", r=4, target_modules=["q_proj"])
    peftcore.convert(model, "default", method="lora", r=64, adapter="thin")
    adapter_tensors = tensors(peftcore.export(model, tmp_path / "adapter.gguf", format="gguf", adapter="thin"))
    assert adapter_tensors["blk.1.attn_q.weight.lora_a"].shape == (64, 64)
