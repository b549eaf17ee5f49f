"""Merging is exact or refused, on layers and adapters that nobody listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.plugin import Adapter, Around
from peftcore.testing import disturb

pytestmark = pytest.mark.usefixtures("toys")
CHANGES = (
    r"would change the model's output: on random input, an output feature differs by [\d.]+ times its largest value"
)


class ReadsWeight(Adapter):
    """y = base(x) + x Wᵀ, of the module's own W: what stands between is not seen."""

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x) + x @ base.module.weight.T

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return 2 * weight, bias


class ForgetsBias(tiny.Scaled):
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.gain * weight, bias


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-50, 50)


def reads_weight(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
    paths = peftcore.model.targets.select(model, architecture, target_modules=config.target_modules)
    return [Around(path, ReadsWeight()) for path in paths]


def forgets_bias(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
    paths = peftcore.model.targets.select(model, architecture, target_modules=config.target_modules)
    return [Around(path, ForgetsBias(config.value)) for path in paths]


def refused(model: nn.Module, message: str = CHANGES, **arguments: Any) -> None:
    """Merging is refused, and the model is as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.merge(model, **{"undo": True, **arguments})
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("undo", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_whose_merged_forgets_the_bias_is_refused(dtype: torch.dtype, undo: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4)).to(dtype)
    with tiny.installed(tiny.method("forgets", forgets_bias)):
        peftcore.apply(model, "forgets", target_modules=("0", "1"), value=1.5)
        wrong = r"merging \['default'\] into '1' \(Linear\) would change.*differs by 0\.\d+"
        refused(model, wrong, undo=undo)
        with pytest.raises(peftcore.PeftcoreError, match="into '1'"):
            peftcore.merge_error(model)


def test_a_small_bias_beside_large_features_is_seen() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[0].mul_(300)
        model[0].bias[:] = torch.tensor([0.0, 0.0, 0.05, 0.0])
    with tiny.installed(tiny.method("forgets", forgets_bias)):
        peftcore.apply(model, "forgets", target_modules=("0",), value=1.5)
        refused(model)


def test_an_adapter_that_reads_the_weight_merges_alone_or_innermost() -> None:
    with tiny.installed(tiny.method("reads", reads_weight)):
        model, x = nn.Sequential(nn.Linear(8, 8, bias=False)), torch.randn(3, 8)
        peftcore.apply(model, "reads", target_modules=("0",))
        peftcore.apply(model, "around", target_modules=("0",), adapter="outer", value=3.0)
        acting = model(x)
        peftcore.merge(model, undo=True)
        torch.testing.assert_close(model(x), acting)
        peftcore.unmerge(model)
        peftcore.activate(model, ["outer", "default"])
        refused(model, r"merging \['outer', 'default'\] into '0'")


def test_a_subclass_that_changes_the_output() -> None:
    x = torch.randn(5, 8)
    doubled = peftcore.apply(nn.Sequential(Doubled(8, 8, bias=False)), "around", target_modules=("0",), value=1.5)
    acting = doubled(x)
    torch.testing.assert_close(peftcore.merge(doubled, undo=True)(x), acting)  # a gain passes through a factor
    clipped = peftcore.apply(nn.Sequential(Clipped(8, 8, bias=False)), "around", target_modules=("0",), value=1.5)
    refused(clipped)


def test_dropout_and_hooks_do_not_disturb() -> None:
    """In training mode merged is what the adapters compute in evaluation; hooks of the user see no sample."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 8)
    peftcore.apply(model, "lora", lora_dropout=0.5, target_modules=["0", "2"])
    disturb(model, "default", seed=1)
    wanted = model.eval()(x)
    model.train()
    calls: list[Any] = []
    model[0].register_forward_hook(lambda *args: calls.append(args))
    state = torch.get_rng_state()
    peftcore.merge(model, undo=True)
    assert not calls and torch.equal(torch.get_rng_state(), state)
    assert model.training and model[0].peftcore["default"].training
    torch.testing.assert_close(model.eval()(x), wanted)


def test_inside_autocast() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    peftcore.apply(model, "lora", target_modules=["0"])
    disturb(model, "default", seed=1)
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        peftcore.merge(model, undo=True)
    torch.testing.assert_close(model(x), wanted)


def test_normed_weights_are_refused() -> None:
    """Their weight is no parameter."""
    norms = nn.utils.parametrizations
    for layer in (norms.spectral_norm(nn.Linear(8, 8)), norms.weight_norm(nn.Linear(8, 8))):
        model = peftcore.apply(nn.Sequential(layer), "lora", target_modules="0")
        disturb(model, "default", seed=1)
        refused(model, r"no weight format reads ParametrizedLinear, which has no floating-point parameter 'weight'")


def test_a_weight_without_values_is_refused() -> None:
    model = peftcore.apply(nn.Sequential(nn.Linear(8, 8, device="meta")), "lora", target_modules=["0"])
    with pytest.raises(peftcore.PeftcoreError, match=r"'0', because its weight is on the meta device"):
        peftcore.merge(model, undo=True)


@pytest.mark.parametrize("first", ["train", "lora"])
def test_a_weight_that_one_adapter_trains_and_another_changes(first: str) -> None:
    fields = {"train": {"names": ("0.weight",)}, "lora": {"target_modules": ["0"]}}
    for undo in (True, False):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(3, 8)
        base = model[0].weight
        for seed, name in enumerate(sorted(fields, key=lambda name: name != first)):
            disturb(peftcore.apply(model, name, adapter=f"by_{name}", **fields[name]), f"by_{name}", seed)
        acting = model(x)
        torch.testing.assert_close(peftcore.merge(model, undo=undo)(x), acting)
        if undo:
            assert torch.equal(peftcore.unmerge(model)(x), acting)
            for name in fields:
                peftcore.remove(model, f"by_{name}")
            assert model[0].weight is base


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["llama", "gpt2", "bert"]),
    st.lists(st.sampled_from(["around", "lora"]), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_stack_is_exact(kind: str, methods: list[str], train: bool, seed: int) -> None:
    model = tiny.MODELS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    targets = {"llama": ("q_proj", "up_proj"), "gpt2": ("c_attn", "c_fc"), "bert": ("query",)}[kind]
    for i, method in enumerate(methods):
        heads = {"modules_to_save": ()} if method == "lora" else {}
        peftcore.apply(model, method, adapter=f"a{i}", target_modules=targets, **heads)
        disturb(model, f"a{i}", seed + i)
    acting = tiny.logits(model)
    model.train(train)
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(tiny.logits(model.eval()), acting, rtol=0, atol=1e-4 * acting.abs().max().item())


class InPlace(Adapter):
    """y = 2 base(x); `merged` breaks its contract, and changes the weight that it is given."""

    def __init__(self, gives: str = "weight") -> None:
        super().__init__()
        self.gives = gives

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return 2 * base(x)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Any:
        found = {"weight": (weight.mul_(2), bias), "shape": (weight[:1], bias), "nothing": None, "alone": weight}
        return {**found, "a bias": (weight, weight[:, 0])}[self.gives]


@pytest.mark.parametrize("gives", ["weight", "shape", "nothing", "alone", "a bias"])
def test_a_plugin_that_breaks_the_contract(gives: str) -> None:
    with tiny.installed(tiny.method("loose", lambda *_: [Around("0", InPlace(gives))])):
        model, x = nn.Sequential(nn.Linear(8, 4, bias=False)), torch.randn(3, 8)
        base = model(x).detach()
        peftcore.apply(model, "loose")
        if gives == "weight":
            torch.testing.assert_close(peftcore.merge(model, undo=True)(x), 2 * base)
            peftcore.unmerge(model)
        else:
            what = (
                r"(\[1, 8\]|NoneType alone|\[4, 8\] alone) for a weight of shape \[4, 8\]|a bias, but '0' has no bias"
            )
            refused(model, rf"'merged' of the adapter 'default' at '0' returned ({what})")
        peftcore.remove(model)
        assert torch.equal(model(x), base)


def test_a_forward_of_one_instance_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    model[0].forward = lambda x: 3 * nn.Linear.forward(model[0], x)
    peftcore.apply(model, "lora", target_modules=["0"])
    disturb(model, "default", seed=1)
    refused(model, "the module has its own `forward` on the instance")


def test_accelerates_hooks_only_move() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(3, 8)
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(execution_device="cpu"))
    peftcore.apply(model, "lora", target_modules=["0"])
    disturb(model, "default", seed=1)
    acting = model(x)
    torch.testing.assert_close(peftcore.merge(model, undo=True)(x), acting)


def test_what_was_put_aside_is_cast_with_the_model_and_must_fit() -> None:
    model, x = tiny.llama(), torch.tensor([[3, 5, 7]])
    peftcore.apply(model, "lora", target_modules=["embed_tokens", "q_proj"])
    disturb(model, "default", seed=1)
    wanted = model(x).logits
    peftcore.merge(model, undo=True).double()
    found = peftcore.unmerge(model)(x).logits
    torch.testing.assert_close(found.float(), wanted)
    peftcore.merge(model, undo=True)
    model.resize_token_embeddings(128)
    with pytest.raises(peftcore.PeftcoreError, match=r"'model.embed_tokens.weight': it is (gone|of shape \[128, 32\])"):
        peftcore.unmerge(model)
    assert peftcore.summary(model).merged
