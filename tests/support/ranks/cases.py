"""Every method on a tiny model, as the tests of ranks and of Trainer try it: (model, fields, in 4 bits)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

# Of each kind of placement and of state, for tests of which the others run in `make test-all`.
KINDS = (
    "lora", "lora, 4 bits", "lora, experts in 4 bits", "qlora", "adapter", "prompt-tuning", "prefix-tuning", "bitfit",
    "dora", "vera", "adalora", "cpt",
)  # fmt: skip

# Every installed method, on a base where its gradients are not zero; sizes do not divide by the number of ranks.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "lora": ("llama", {"r": 3, "lora_alpha": 6}, False),
    "lora, 4 bits": ("llama", {"r": 3, "lora_alpha": 6}, True),
    "lora, experts in 4 bits": ("gpt_oss", {"r": 3, "lora_alpha": 6}, True),
    "qlora": ("llama", {"r": 3, "lora_alpha": 6}, False),
    "adapter": ("llama", {"bottleneck_size": 5}, False),
    "adapter, 4 bits": ("llama", {"bottleneck_size": 5}, True),
    "adapter, shared factors": ("llama", {"phm_layer": True, "phm_dim": 3, "bottleneck_size": 6}, False),
    "prompt-tuning": ("llama", {"num_virtual_tokens": 3}, False),
    "prompt-tuning, 4 bits": ("llama", {"num_virtual_tokens": 3}, True),
    "prefix-tuning": ("llama", {"num_virtual_tokens": 3}, False),
    "prefix-tuning, 4 bits": ("llama", {"num_virtual_tokens": 3}, True),
    "bitfit": ("gpt2", {}, False),
    "bitfit, 4 bits": ("gpt2", {}, True),
    "dora": ("llama", {"r": 3, "lora_alpha": 6}, False),
    "dora, 4 bits": ("llama", {"r": 3, "lora_alpha": 6}, True),
    "vera": ("llama", {"r": 5}, False),
    "vera, 4 bits": ("llama", {"r": 5}, True),
    "ia3": ("llama", {}, False),
    "ia3, 4 bits": ("gpt2", {}, True),
    "adalora": ("llama", {"init_r": 3, "target_r": 2, "total_step": 9}, False),
    "relora": ("llama", {"r": 3, "lora_alpha": 6, "restart_every": 2, "restart_warmup": 1}, False),
    "relora, 4 bits": ("llama", {"r": 3, "lora_alpha": 6, "restart_every": 2, "restart_warmup": 1}, True),
    "alora": ("llama", {"r": 3, "lora_alpha": 6, "alora_invocation_tokens": [29]}, False),  # a token of TOKENS
    "ln-tuning": ("gpt2", {}, False),
    "p-tuning": ("llama", {"num_virtual_tokens": 3}, False),
    "multitask-prompt-tuning": ("llama", {"num_virtual_tokens": 3}, False),
    "trainable-tokens": ("llama", {"token_indices": [1, 5]}, False),
    "loha": ("llama", {"r": 2, "alpha": 4}, False),
    "lokr": ("llama", {"r": 1, "alpha": 2}, False),
    "oft": ("llama", {"oft_block_size": 9}, False),
    "boft": ("llama", {"boft_block_size": 3}, False),
    "hra": ("llama", {"r": 4}, False),
    "miss": ("llama", {"r": 5}, False),
    "road": ("llama", {"group_size": 18, "target_modules": ["q_proj", "o_proj"]}, False),
    "fourierft": ("llama", {"n_frequency": 9, "init_weights": True}, False),
    "c3a": ("llama", {"block_size": 9}, False),
    "delora": ("llama", {"r": 3}, False),
    "psoft": ("llama", {"r": 4, "psoft_alpha": 4}, False),
    "shira": ("llama", {"r": 3}, False),
    "randlora": ("llama", {"r": 7, "randlora_alpha": 7}, False),
    "vblora": ("llama", {"r": 3, "vector_length": 9, "num_vectors": 11}, False),
    "hira": ("llama", {"r": 3}, False),
    "gralora": ("llama", {"r": 6, "gralora_k": 3, "hybrid_r": 2}, False),
    "beft": ("llama", {}, False),
    "unilora": ("llama", {"r": 3, "theta_d_length": 50}, False),
    "tinylora": ("llama", {"r": 3, "u": 5, "weight_tying": 0.5}, False),
    "peanut": ("llama", {"r": 3, "depth": 1}, False),
    "deft": ("llama", {"r": 3}, False),
    "cpt": ("llama", {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 4]}, False),
    "adaption-prompt": ("llama", {"adapter_len": 3}, False),
    "waveft": ("llama", {"n_frequency": 9, "wavelet_family": "db2"}, False),
    "cartridge": ("llama", {"num_virtual_tokens": 3}, False),
    "supertuning": ("llama", {"sparsity": 0.9, "r": 3}, False),
    "reft": ("llama", {"r": 3, "suffix_positions": 2, "dropout": 0.0}, False),
    "glora": ("llama", {"r": 3}, False),
    "pvera": ("llama", {"r": 5}, False),
    "lily": ("llama", {"r": 3}, False),
    "poly": ("llama", {"r": 3, "n_skills": 2, "n_splits": 3}, False),
    "arrow": ("llama", {"experts": ["a", "b", "c"], "top_k": 2}, False),
    "arrow, 4 bits": ("llama", {"experts": ["a", "b", "c"], "top_k": 2}, True),
    "adapter-fusion": ("llama", {"adapters": ["a", "b"]}, False),
    "adapter-fusion, 4 bits": ("llama", {"adapters": ["a", "b"]}, True),
}
# What methods combine: frozen adapters "a", "b" and "c" that stand there before.
COMBINED: dict[str, tuple[str, dict[str, Any]]] = {
    "arrow": ("lora", {"r": 3}),
    "adapter-fusion": ("adapter", {"bottleneck_size": 5, "placement": "pfeiffer"}),
}
SHARED_BETWEEN_BLOCKS = ("adapter, shared factors", "lily", "vblora", "unilora", "tinylora")  # trained parameters are

SHARDS_INTEGERS = TorchVersion(torch.__version__) >= "2.12"
shards_integers = pytest.mark.skipif(not SHARDS_INTEGERS, reason="PyTorch before 2.12 shards no integers")


def shardable(cases: list[str]) -> list[str]:
    """Return the cases whose base the running PyTorch can shard."""
    return [case for case in cases if SHARDS_INTEGERS or not (case == "qlora" or CASES[case][2])]
