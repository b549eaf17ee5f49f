"""Attention of fused modules: as PyTorch and transformers compute it, by `ops.attention` where that has a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore
from peftcore import ops
from peftcore.adaptation import fused_attention
from peftcore.adaptation.fused_forward import own_forwards

HAS_KERNEL = ops.extension is not None and ops.extension.has_attention("torch.bfloat16")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of the number of queries of each call of `ops.attention` by a fused module."""
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
    with own_forwards():
        tokens, _ = generated(model)
    assert not seen and torch.equal(tokens, generated(other)[0])
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
        with pytest.raises(ValueError, match="does not support `softcap`"):
            function(module, q, k, k, None, softcap=2.0)
    peftcore.fuse(module)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is function  # replaced once


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, **self.options)


SEEN = torch.ones(5, 5, dtype=torch.bool).tril(1)


OPTIONS: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.9},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": SEEN},
    "groups": {"enable_gqa": True},
    "causal mask": {"is_causal": True, "attn_mask": SEEN},  # left to PyTorch
}


@pytest.mark.parametrize("case", OPTIONS)
def test_arguments_of_attention(case: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 5, 32).bfloat16().requires_grad_()
    k = torch.randn(2, 2 if case == "groups" else 4, 5, 32).bfloat16()
    model = Attends(**OPTIONS[case])
    wanted = model(q, k)
    found = peftcore.fuse(model)(q, k)
    assert (found - wanted).norm() <= 1e-2 * wanted.norm()
    assert ("ScaledDotProduct" in type(found.grad_fn).__name__) == (not HAS_KERNEL or case == "causal mask")


def test_heads_in_groups_must_be_asked_for() -> None:
    q, k = (torch.randn(2, heads, 5, 32).bfloat16().requires_grad_() for heads in (4, 2))
    for model in (Attends(), peftcore.fuse(Attends())):
        with pytest.raises(RuntimeError, match="size of tensor"):
            model(q, k)
