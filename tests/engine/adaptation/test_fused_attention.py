"""Attention of fused modules: as PyTorch and transformers compute it, by `ops.attention` where that has a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from support.releases import BEFORE_5_24
from torch import Tensor

import peftcore
from peftcore import ops
from peftcore.engine.adaptation import fused_attention
from peftcore.engine.adaptation.fused_forward import fused_modules

HAS_KERNEL = ops.extension is not None and ops.extension.has_attention("torch.bfloat16")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of the number of queries of each call of `ops.attention` by a fused module."""
    import transformers.modeling_utils  # noqa: F401

    fused_attention.replace_entry()  # its own check also calls `ops.attention`
    queries: list[int] = []
    attention = ops.attention

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        queries.append(q.shape[2])
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(fused_attention.ops, "attention", counted)
    return queries


def model_of(name: str = "llama", **sizes: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4} | sizes
    sizes = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 32, "pad_token_id": 0} | sizes
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes)).to(torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


def generated(model: Any, padding: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the greedy tokens and their scores behind two rows, the first of which has padding on the left."""
    tokens, mask = tiny.TOKENS[:2, :7].clone(), torch.ones(2, 7, dtype=torch.long)
    tokens[0, :padding], mask[0, :padding] = 0, 0
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    found = model.generate(
        input_ids=tokens, attention_mask=mask, output_scores=True, return_dict_in_generate=True, **options
    )
    return found.sequences, torch.stack(found.scores).float()


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "mistral"])
def test_decoded_tokens(name: str, cache: str, padding: int, seen: list[int]) -> None:
    model = model_of(name, **({"sliding_window": 4} if name in ("mistral", "gemma3_text") else {}))
    options = {"cache_implementation": cache, "disable_compile": True}
    tokens, scores = generated(model, padding, **options)
    peftcore.fuse(model)
    again, close = generated(model, padding, **options)
    assert torch.equal(again, tokens)
    assert (close - scores).norm() < 2e-2 * scores.norm()
    assert seen == ([7, 7] + 10 * [1] if HAS_KERNEL else [])


def test_what_is_left_to_transformers(seen: list[int]) -> None:
    model = model_of()
    other = model_of()
    peftcore.fuse(model)
    generated(other)
    assert not seen
    peftcore.fuse(model, enabled=False)
    generated(model)
    assert not seen
    generated(peftcore.fuse(model.float()))
    assert not seen


def test_modules_that_are_not_fused_are_left_alone(seen: list[int]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    peftcore.fuse(model_of())
    function: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    q, k = torch.randn(1, 2, 1, 32).bfloat16(), torch.randn(1, 2, 9, 32).bfloat16()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2)
    with torch.no_grad():
        for module in (torch.nn.Linear(2, 2), object()):
            assert torch.equal(function(module, q, k, k, None)[0], wanted)
    assert not seen


def test_arguments_of_one_token(seen: list[int]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module = peftcore.fuse(model_of()).model.layers[0].self_attn
    function: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    q, k = torch.randn(1, 4, 1, 32).bfloat16(), torch.randn(1, 2, 9, 32).bfloat16()
    bias = torch.randn(1, 4, 1, 9).bfloat16()
    with torch.no_grad():
        wanted = function._peftcore_original(module, q, k, k, None, scaling=0.5)[0]
        found, weights = function(module, q, k, k, None, scaling=0.5, position_ids=None)
        assert weights is None and found.shape == (1, 1, 4, 32) and found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
        assert seen == [1] * HAS_KERNEL
        biased = function(module, q, k, k, None, scaling=0.5, position_bias=bias)[0]
        assert torch.equal(
            biased, function._peftcore_original(module, q, k, k, None, scaling=0.5, position_bias=bias)[0]
        )
        assert not torch.allclose(biased, wanted, atol=2e-2)
        if not BEFORE_5_24:
            with pytest.raises(ValueError, match="does not support `softcap`"):
                function(module, q, k, k, None, softcap=2.0)
    peftcore.fuse(module)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is function  # replaced once


OPTIONS: dict[str, dict[str, Any]] = {
    "scaling": {"scaling": 0.9},
    "not causal": {"is_causal": False},
    "mask": {"attention_mask": torch.ones(5, 5, dtype=torch.bool).tril(1)[None, None]},
    "longer cache": {"keys": 9},
    "bias": {"position_bias": torch.ones(1, 4, 5, 5)},  # left to PyTorch
}


@pytest.mark.parametrize("case", OPTIONS)
def test_arguments_with_gradients(case: str, seen: list[int]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    options: dict[str, Any] = {"attention_mask": None, "keys": 5, **OPTIONS[case]}
    module = peftcore.fuse(model_of()).model.layers[0].self_attn
    function: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    q = torch.randn(2, 4, 5, 32).bfloat16().requires_grad_()
    k = torch.randn(2, 2, options.pop("keys"), 32).bfloat16()
    found = function(module, q, k, k, **options)[0]
    expected = function._peftcore_original(module, q, k, k, **options)[0]
    assert (found - expected).norm() <= 1e-2 * expected.norm()
    assert len(seen) == (HAS_KERNEL and case != "bias")


def test_another_function_of_transformers_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes something else, or has a parameter that we do not know."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    original = getattr(ALL_ATTENTION_FUNCTIONS["sdpa"], "_peftcore_original", ALL_ATTENTION_FUNCTIONS["sdpa"])

    def doubled(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        output, weights = original(module, query, key, value, attention_mask, **kwargs)
        return 2 * output, weights

    def sinks(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, sink: Any = None, **kwargs: Any
    ) -> Any:
        return original(module, query, key, value, attention_mask, **kwargs)

    for other in (doubled, sinks) if HAS_KERNEL else (sinks,):
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", other)
        assert fused_modules(peftcore.fuse(model_of())) == {"RMSNorm": 5, "gated MLP": 2}
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
