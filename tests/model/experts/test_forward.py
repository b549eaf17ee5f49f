"""One forward for every module of experts that transformers' interface dispatches."""

import pytest
import torch
import transformers

from peftcore.model.experts import experts_forward, experts_layout
from peftcore.plugin.adapter import LowRank

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


def experts_of(kind, dtype=torch.float32):
    config = transformers.AutoConfig.for_model(kind, **SIZES, **MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    experts = next(module for module in model.modules() if experts_layout(module))
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1).requires_grad_(False)
    return experts.to(dtype)


@pytest.mark.parametrize("kind", MODELS)
def test_equals_the_forward_of_the_module(kind):
    experts = experts_of(kind)
    hidden, weights = torch.randn(9, 32, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    for found, wanted in zip(
        *(
            (y, *torch.autograd.grad(y.square().sum(), (hidden, weights)))
            for y in (experts_forward(experts, hidden, index, weights), experts(hidden, index, weights))
        ),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def routing(tokens):
    index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    return index, torch.rand(tokens, 2)


@pytest.mark.parametrize("weights_in", [torch.float32, torch.bfloat16])
def test_in_bf16_it_is_no_less_exact_than_the_forward_of_the_module(weights_in):
    """Of routers whose weights are fp32 as well."""
    experts = experts_of("mixtral", torch.bfloat16)
    hidden, (index, weights) = torch.randn(40, 32).bfloat16(), routing(40)
    weights = weights.to(weights_in)
    exact = experts_of("mixtral", torch.float64)
    exact.load_state_dict(experts.state_dict())
    exact.config._experts_implementation = "eager"
    wanted = exact(hidden.double(), index, weights.double())

    def error(found):
        assert found.dtype is torch.bfloat16
        return float((found.double() - wanted).norm())

    assert error(experts_forward(experts, hidden, index, weights)) <= error(experts(hidden, index, weights))


def doubled(module, inputs, output):
    return 2 * output


def test_an_activation_of_the_users_own_is_called():
    """One with a hook, another module in its place, another forward on the instance, another gate."""
    experts = experts_of("qwen3_moe")
    arguments = torch.randn(7, 32), *routing(7)
    plain = experts(*arguments)
    torch.testing.assert_close(experts_forward(experts, *arguments), plain)

    def found():
        y = experts_forward(experts, *arguments)
        torch.testing.assert_close(y, experts(*arguments))
        return y

    handle = experts.act_fn.register_forward_hook(doubled)
    torch.testing.assert_close(found(), 2 * plain)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 2 * output if module is experts.act_fn else output
    )
    torch.testing.assert_close(experts_forward(experts, *arguments), 2 * plain)
    handle.remove()
    act = experts.act_fn
    act.forward = lambda x: 3 * torch.nn.functional.silu(x)
    torch.testing.assert_close(found(), 3 * plain)
    del act.forward
    experts.act_fn = torch.nn.ReLU()
    assert (found() - plain).abs().max() > 1e-2
    experts.act_fn = act
    experts._apply_gate = lambda y: 2 * type(experts)._apply_gate(experts, y)
    torch.testing.assert_close(found(), 2 * plain)


def test_an_adapter_with_a_dropout_of_its_own_is_added_to_the_first():
    """Exact without dropout, gradients included; with it each value of x is dropped or doubled, expert by expert."""
    experts = experts_of("mixtral")
    arguments = torch.randn(9, 32), *routing(9)
    name, out = "gate_up_proj", experts.gate_up_proj.shape[1]
    factors = [(torch.randn(4, r, 32) / 6, torch.randn(4, out, r) / 6) for r in (3, 5)]
    leaves = [t.requires_grad_() for pair in factors for t in pair]
    drops_none = 1e-9
    first, other = (LowRank(*pair, 0.5, dropout_p=p) for pair, p in zip(factors, (0.0, drops_none), strict=True))
    y = experts_forward(experts, *arguments, changes={name: [first, other]})
    dense = experts_of("mixtral")
    del dense.gate_up_proj
    dense.gate_up_proj = experts.gate_up_proj + sum(0.5 * b @ a for a, b in factors)
    wanted = dense(*arguments)
    torch.testing.assert_close(y, wanted)
    for found, exact in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, wanted)), strict=True):
        torch.testing.assert_close(found, exact)


def test_what_it_drops():
    """Half of what its A reads, and doubles the others: here the numbers of the output, one by one."""
    experts = experts_of("mixtral")
    experts.down_proj.zero_()
    arguments = torch.randn(40, 32), torch.randint(0, 3, (40, 1)), torch.ones(40, 1)
    none = LowRank(torch.zeros(4, 1, 48), torch.zeros(4, 32, 1), 1.0)
    a, b = torch.eye(32, 48).expand(4, 32, 48), torch.arange(1.0, 5)[:, None, None] * torch.eye(32)
    kept, found = (
        experts_forward(experts, *arguments, changes={"down_proj": [none, LowRank(a, b, 3.0, dropout_p=p)]})
        for p in (1e-9, 0.5)
    )
    is_kept = found != 0
    torch.testing.assert_close(found, (2 * kept).where(is_kept, 0))
    assert 0.4 < float(is_kept.float().mean()) < 0.6
