"""Stand-ins of models with adapters, whose step is that of the model itself."""

from typing import Any

import pytest
import torch
from support import tiny
from torch import nn
from transformers import GPT2Config

import peftcore
from peftcore.engine import set_trainable, state_of
from peftcore.estimating import loop

STEP: dict[str, Any] = {"batch_size": 2, "length": 8}


def parts(found: peftcore.Estimate) -> dict[str, int]:
    return {name: found.parts[name] for name in ("base", "adapters", "gradients", "optimizer state", "activations")}


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("lora", {"r": 4, "modules_to_save": ["lm_head"]}),
        ("qlora", {"r": 4}),
        ("bitfit", {"add_missing": True}),
        ("prompt-tuning", {"num_virtual_tokens": 4}),
        ("trainable-tokens", {"token_indices": [1, 2]}),
        ("adaption-prompt", {}),
    ],
)
def test_a_step_of_a_model_with_an_adapter(method: str, fields: dict[str, Any]) -> None:
    wanted = peftcore.estimate(tiny.llama(), method, **STEP, **fields)
    model = peftcore.apply(tiny.llama(), method, **fields)
    before = [(name, p.requires_grad, p.clone()) for name, p in model.named_parameters()]
    found = peftcore.estimate(model, **STEP)
    assert parts(found) == parts(wanted) and found.flops == wanted.flops
    assert found.title.startswith("a training step of LlamaForCausalLM, adapters ['default'], ")
    for (name, requires_grad, value), (new_name, p) in zip(before, model.named_parameters(), strict=True):
        assert (name, requires_grad) == (new_name, p.requires_grad) and torch.equal(value, p)


def test_another_adapter_next_to_it() -> None:
    """`apply` leaves the first one active and trainable."""
    model = peftcore.apply(tiny.llama(), "lora", r=4)
    first, found = peftcore.estimate(model, **STEP), peftcore.estimate(model, "lora", r=4, adapter="second", **STEP)
    assert found.parts["adapters"] == 2 * first.parts["adapters"]
    assert found.title.startswith("a training step of LlamaForCausalLM, lora next to adapters ['default'], ")
    assert list(state_of(model).applied) == ["default"]
    with pytest.raises(peftcore.PeftcoreError, match=r"the model already has an adapter 'default' \(lora\)"):
        peftcore.estimate(model, "lora", **STEP)


def test_what_is_inactive_or_frozen_does_not_train() -> None:
    model = peftcore.apply(peftcore.apply(tiny.llama(), "lora", r=4), "lora", r=8, adapter="second")
    both = peftcore.estimate(model, **STEP)
    peftcore.activate(model, "second")
    one = peftcore.estimate(model, **STEP)
    assert one.parts["adapters"] == both.parts["adapters"]
    assert one.parts["optimizer state"] < both.parts["optimizer state"]
    set_trainable(model, "second", False)
    with pytest.raises(peftcore.PeftcoreError, match=r"^no active adapter of the model is trainable"):
        peftcore.estimate(model, **STEP)


def test_merged_adapters_and_those_of_samples_are_refused() -> None:
    model = peftcore.apply(peftcore.apply(tiny.llama(), "lora", r=4), "lora", r=8, adapter="second")
    peftcore.activate(model, ["default", "second"], per_sample=True)
    with pytest.raises(peftcore.PeftcoreError, match=r"^cannot estimate a step while each sample has its own"):
        peftcore.estimate(model, **STEP)
    peftcore.activate(model, "default")
    peftcore.merge(model, undo=True)
    with pytest.raises(peftcore.PeftcoreError, match=r"^cannot estimate a step: adapters are merged into"):
        peftcore.estimate(model, **STEP)


def test_results_of_experts_join_what_was_filled() -> None:
    """Llama 4 scatters scores into -inf, DBRX adds results to zeros: small tensors of known values."""
    from transformers import DbrxConfig, Llama4TextConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": 2, "head_dim": 8}
    attention = {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0}
    ffn = {"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1}
    for config in (
        Llama4TextConfig(**sizes, **experts, vocab_size=32),
        DbrxConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=32, ffn_config=ffn, attn_config=attention),
    ):
        found = peftcore.estimate(config, "lora", batch_size=2, length=8)
        assert found.parts["activations"] > found.parts["inputs"] > 0


def test_every_parameter_has_the_counter_of_the_first_step() -> None:
    """Adam's counter is a real number on the CPU; PyTorch fills memory that nobody wrote with NaN in this mode."""
    parameters = [nn.Parameter(torch.empty(4, 4, device="meta")) for _ in range(3)]
    optimizer = loop.make_optimizer(parameters, "adamw_torch")
    torch.use_deterministic_algorithms(True)
    try:
        loop.give_state(parameters, optimizer)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [float(optimizer.state[p]["step"]) for p in parameters] == [1.0, 1.0, 1.0]
    assert all(optimizer.state[p]["exp_avg"].is_meta for p in parameters)


def test_more_tokens_than_positions_are_refused() -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=64)
    config.architectures = ["GPT2LMHeadModel"]
    message = r"GPT2LMHeadModel has positions for 64 tokens, found length=65. Pass length=64 \(--max-length 64\)"
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.estimate(config, "lora", batch_size=1, length=65)
    assert peftcore.estimate(config, "lora", batch_size=1, length=64).peak > 0
