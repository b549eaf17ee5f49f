"""One forward for every module of experts that transformers' interface dispatches."""

import pytest
import torch
import transformers

from peftcore.experts import experts_forward, experts_layout

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"]},
}


@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_forward_of_the_module(kind):
    config = transformers.AutoConfig.for_model(kind, **SIZES, **MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    experts = next(module for module in model.modules() if experts_layout(module))
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1).requires_grad_(False)
    hidden, weights = torch.randn(9, 32, requires_grad=True), torch.rand(9, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    for found, wanted in zip(
        *(
            (y, *torch.autograd.grad(y.square().sum(), hidden))
            for y in (experts_forward(experts, hidden, index, weights), experts(hidden, index, weights))
        ),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
