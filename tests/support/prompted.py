"""Tiny models with prompts and prefixes of the toy methods, and what they should compute, by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.plugin import cache_argument
from support import tiny

KINDS = ("soft", "prefix")


N = 3  # tokens of a toy prompt


def opt() -> nn.Module:
    """A decoder that computes positions from the mask itself, with an offset."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=96, num_attention_heads=4, max_position_embeddings=64, **sizes)).eval()


def bloom() -> nn.Module:
    """A decoder without positions: ALiBi, from the mask."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)).eval()


def gemma3() -> nn.Module:
    """Sliding windows in every other layer, a scaled embedding, grouped-query attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=96, pad_token_id=0, **sizes, **heads)).eval()


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(vocab_size=96, **sizes)).eval()


DECODERS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "opt": opt, "bloom": bloom, "gemma3": gemma3}


def mpt() -> nn.Module:
    """A decoder whose ALiBi counts padding."""
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    return MptForCausalLM(MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4)).eval()


def falcon(**heads: Any) -> nn.Module:
    """A decoder that caches one head for all queries, or in its newer form one for each."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    return FalconForCausalLM(FalconConfig(vocab_size=96, **sizes, **heads)).eval()


def deepseek() -> nn.Module:
    """Latent attention: keys of 12 numbers a head, values of 8."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "first_k_dense_replace": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
    heads |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=96, pad_token_id=0, **sizes, **heads)).eval()


def mamba() -> nn.Module:
    """A recurrence, whose cache holds no tokens."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, pad_token_id=0)).eval()


def xlstm() -> nn.Module:
    """A recurrence, whose cache counts tokens in an attribute."""
    from transformers import xLSTMConfig, xLSTMForCausalLM

    torch.manual_seed(0)
    return xLSTMForCausalLM(xLSTMConfig(vocab_size=96, hidden_size=128, num_hidden_layers=2, num_heads=4)).eval()


ENCODER_DECODERS = {"t5": tiny.t5, "bart": bart}


def applied(model: nn.Module, kind: str, adapter: str = "default", seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    peftcore.apply(model, kind, adapter=adapter)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, adapter):
            parameter.mul_(10)  # std 1
    return model


def logits(model: nn.Module, tokens: Tensor | None = None, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, **kwargs).logits


def close(found: Tensor, wanted: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def by_hand(model: nn.Module, kind: str, tokens: Tensor) -> Tensor:
    """The logits of the base, with the prompt put before the input by the definition."""
    vectors = dict(adapter_parameters(model, "default"))
    (vectors,) = vectors.values()
    with peftcore.disabled(model), torch.no_grad():
        if kind == "soft":
            embedded = model.get_input_embeddings()(tokens)
            whole = torch.cat([vectors.expand(tokens.shape[0], -1, -1), embedded], dim=1)
            return model(inputs_embeds=whole).logits[:, N:]
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        for layer, (key, value) in enumerate(vectors):
            shape = (tokens.shape[0], *key.shape)
            cache.update(key.expand(shape), value.expand(shape), layer)
        return model(input_ids=tokens, **{cache_argument(model): cache}).logits


def generate(model: nn.Module, tokens: Tensor, mask: Tensor | None = None, **changes: Any) -> Any:
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "pad_token_id": 0, **changes}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask, **settings)


def check_steps(model: nn.Module, out: Any, length: int, mask: Tensor | None = None) -> None:
    """The logits of every step are those of one full forward over what came out."""
    whole = out.sequences
    full = torch.ones_like(whole)
    if mask is not None:
        full[:, :length] = mask
    wanted = logits(model, whole, full)[:, length - 1 : -1]
    close(torch.stack(out.logits, dim=1), wanted, atol=1e-4)


class Vectors(tiny.Vectors):
    """A toy adapter's vectors of a fixed shape."""


def padded(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Two rows, of which the second is `tokens [1, n]` with padding before it, and their mask."""
    gap = length - tokens.shape[1]
    rows = torch.stack([tokens[0].repeat(length)[:length], torch.cat([torch.zeros(gap, dtype=torch.long), tokens[0]])])
    mask = torch.ones_like(rows)
    mask[1, :gap] = 0
    return rows, mask
