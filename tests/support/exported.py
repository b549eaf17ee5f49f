"""What tests of exporting share: tiny models that GGUF knows, a tokenizer of byte-level BPE, adapters of any values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peftcore_cli.bases.adapter_folders import AdapterTask
from torch import Tensor, nn

import peftcore

TOKENS = torch.tensor([[5, 17, 3, 60, 41, 22, 9], [8, 4, 77, 31, 2, 50, 63]])
VOCABULARY = 262  # of the model; the tokenizer has two tokens fewer
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return _drawn(LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})))


def qwen2(**changes: Any) -> Any:
    """With biases of q, k and v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return _drawn(Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes})))


def qwen3(**changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return _drawn(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 128, **changes})))


def qwen3moe(**changes: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return _drawn(Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, "head_dim": 32, **experts, **changes})))


GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4}


def gemma2(**changes: Any) -> Any:
    """Its norms multiply by 1 + weight; one of two layers has a window."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(**{**SIZES, **GEMMA, **changes})
    config._attn_implementation = "eager"  # which caps scores
    return _drawn(Gemma2ForCausalLM(config), norms=0.0)


def gemma3(**changes: Any) -> Any:
    """Its norms multiply by 1 + weight; five of six layers have a window, and another rotary embedding."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(**{**SIZES, **GEMMA, "num_hidden_layers": 6, **changes})
    return _drawn(Gemma3ForCausalLM(config), norms=0.0)


def _drawn(model: nn.Module, norms: float = 1.0) -> nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, norms if "norm" in name else 0.0, 0.3)
    return model.eval()


def apply(model: nn.Module, method: Any = "lora", *, std: float = 0.1, **fields: Any) -> nn.Module:
    """An adapter whose tensors are all drawn."""
    peftcore.apply(model, method, **fields)
    for _, parameter in peftcore.engine.adapter_parameters(model, "default"):
        nn.init.normal_(parameter, std=std)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS).logits


def tokenizer(pre: Any = None, ignore_merges: bool = False, **special: Any) -> Any:
    """256 bytes, two merged ones, and two special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "Ġab"]
    merges = [("a", "b"), ("Ġ", "ab")]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=ignore_merges))
    made.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **special}
    found = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    found.chat_template = "{{ messages[0].content }}"
    return found


def tensors(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a GGUF file by name, dequantized, `[rows, columns]`."""
    import gguf

    return {each.name: gguf.dequantize(each.data, each.tensor_type) for each in gguf.GGUFReader(file).tensors}


def keys(file: Path) -> dict[str, Any]:
    import gguf

    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def saved_llama(folder: Path) -> Path:
    """Save a model and its tokenizer in `folder`, which is returned."""
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def saved_run(base: Path, folder: Path, method: Any = "lora", **fields: Any) -> Tensor:
    """Save an adapter as `peftcore train` does; return the logits with it."""
    from transformers import AutoModelForCausalLM

    model = apply(AutoModelForCausalLM.from_pretrained(base), method, **fields)
    peftcore.save(model, folder / "adapter")
    AdapterTask("causal-lm", 64, chat=True, chat_template="{{ ours }}").write(folder / "adapter")
    return logits(model)
