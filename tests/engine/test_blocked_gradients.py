"""Gradients through layers of bitsandbytes, which pack their weight for a kernel without a derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.quantized import INPUTS, llama, logits, moved, of_bnb
from torch import nn

import peftcore


def with_bnb(attention: str = "self_attn") -> tuple[nn.Module, list[Any]]:
    """A Llama whose attention consists of layers of bitsandbytes, in eval mode, and these layers."""
    model = llama()
    layers = []
    for path, module in list(model.named_modules()):
        if attention in path and isinstance(module, nn.Linear):
            layer: Any = of_bnb(module)
            layer.requires_grad_(False)
            layers.append(layer)
            model.set_submodule(path, layer)
    return model.eval(), layers


def gradients(model: nn.Module) -> list[Any]:
    model.train()
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    return [p.grad.norm().item() for p in model.parameters() if p.requires_grad]


def test_layers_of_bitsandbytes_keep_their_gradients_after_evaluation() -> None:
    wanted, _ = with_bnb()
    model, layers = with_bnb()
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as bitsandbytes finds it on such a processor
    for each in (wanted, model):
        torch.manual_seed(1)
        moved(peftcore.apply(each, "lora", r=4, target_modules=["q_proj", "o_proj"]))
    logits(model.eval())
    found = gradients(model)
    assert found == gradients(wanted) and min(found) > 0


def test_layers_of_bitsandbytes_that_are_packed_already_are_refused() -> None:
    model, layers = with_bnb()
    if not layers[0].support_avx512bf16_for_cpu:
        pytest.skip("this processor has no AVX512-BF16")
    before = logits(model)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"not train correctly. Call peftcore.quantize\(model\) before apply"
    ):
        peftcore.apply(model, "lora", r=4)
    peftcore.apply(peftcore.quantize(model, skip=["mlp", "lm_head"]), "lora", r=4)
    assert (logits(model) - before).norm() < 0.02 * before.norm()  # the kernel of bitsandbytes rounds to bfloat16
    assert min(gradients(model)[1::2]) > 0


SPARSE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("name", ["DeepseekV32", "GlmMoeDsa"])
def test_indexers_of_sparse_attention_run_without_gradients(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**SPARSE)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(peftcore.PeftcoreError, match=r"indexer.wq_b': .* runs it under torch.no_grad, so it gets no"):
        peftcore.apply(model, "lora", r=2, target_modules=["wq_b"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    with pytest.warns(UserWarning, match=r"ln-tuning does not train '.*indexer.k_norm.weight' and 3 more"):
        peftcore.apply(model, "ln-tuning")
    peftcore.remove(model)

    peftcore.apply(model, "lora", r=2, target_modules="all-linear")
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and "indexer" not in key for key, p in trained.items())
