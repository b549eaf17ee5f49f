"""What share of a model's weight a method reaches: always in a plan, a warning where little is reached unasked."""

import warnings

import pytest
from census import instances
from support import tiny
from support.mixtures import mixture
from torch import nn

import peftcore
from peftcore.model import bypassed_layers


def share(model: object, method: str, **fields: object) -> float:
    return peftcore.plan(model, method, **fields).coverage.share


def test_a_plan_says_what_is_reached() -> None:
    plan = peftcore.plan(tiny.llama(), "lora", target_modules="all-linear")
    assert plan.coverage.share == 1 and "reaches all weights in layers" in str(plan)
    plan = peftcore.plan(tiny.llama(), "lora", target_modules=["q_proj"])
    layer = tiny.llama().model.layers[0]
    weights = [module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear)]
    assert (plan.coverage.reached, plan.coverage.total) == (2 * 32 * 32, 2 * sum(weights))
    assert plan.coverage.left_out == {"linear layers not selected": plan.coverage.total - plan.coverage.reached}
    assert share(tiny.llama(), "adapter") == 1  # attention and feed-forward, with all in them
    assert share(tiny.llama(), "prompt-tuning", num_virtual_tokens=2) == 1


def test_a_weight_that_layers_share_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    plan = peftcore.plan(model, "lora", target_modules=["0"], r=2)
    assert (plan.coverage.reached, plan.coverage.total) == (16, 32)


def test_experts_that_other_modules_read_are_reported() -> None:
    dbrx = instances.build("DbrxForCausalLM")
    with pytest.warns(UserWarning, match="left out: parameters that are only read by other modules"):
        peftcore.apply(dbrx, "lora")
    with pytest.raises(peftcore.PeftcoreError, match="is read by other modules, not by its own module's forward"):
        peftcore.plan(dbrx, "lora", target_modules=[], target_parameters=["mlp.w1"])


@pytest.mark.parametrize("method", ["vera", "dora", "ia3"])
def test_experts_are_reported_where_they_are_little(method: str) -> None:
    model = mixture("deepseek_v3")  # beside a dense layer, and shared experts
    with pytest.warns(UserWarning, match=r"experts' stacked weights \(44.2 %\).*target_modules=\[..., 'experts'\]"):
        peftcore.apply(model, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftcore.apply(mixture("deepseek_v3"), method, target_modules=["o_proj"])
        if method != "vera":  # which has no such field
            peftcore.apply(mixture("deepseek_v3"), method, exclude_modules=["experts"])
        peftcore.apply(mixture("gpt_oss"), "bitfit")  # their biases


def test_experts_and_convolutions_are_reported() -> None:
    mixtral = instances.build("MixtralForCausalLM")
    assert sum(p.numel() for name, p in mixtral.named_parameters() if "experts" in name) > 0
    with pytest.warns(UserWarning, match=r"vera on MixtralForCausalLM reaches .* left out: experts' stacked weights"):
        peftcore.apply(instances.build("MixtralForCausalLM"), "vera", r=2)
    assert share(instances.build("MixtralForCausalLM"), "lora", r=2) > 0.95  # but for the routers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peftcore.apply(mixtral, "lora", target_modules=["q_proj", "v_proj"])  # they were named
    plan = peftcore.plan(
        instances.build("ResNetForImageClassification"), "lora", target_modules=["classifier.1"], modules_to_save=[]
    )
    assert plan.coverage.share < 0.01 and "convolutions" in str(plan)


def test_biases_that_a_model_lacks_are_reported() -> None:
    model = instances.build("Qwen2ForCausalLM")
    with pytest.warns(UserWarning, match=r"bitfit on Qwen2ForCausalLM reaches .* linear layers without a trained"):
        peftcore.apply(model, "bitfit")


def test_what_is_bypassed_is_reported() -> None:
    model = instances.build("MambaForCausalLM")
    left = peftcore.plan(model, "lora", target_modules="all-linear").coverage.left_out
    linear = [path for path in bypassed_layers(model) if path.endswith("_proj")]
    weights = sum(model.get_submodule(path).weight.numel() for path in linear)
    assert left["linear layers that are read without being called"] == weights
