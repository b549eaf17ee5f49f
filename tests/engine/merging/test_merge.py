"""One merge loop: equal to the forward, refused where it cannot be, undone bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.plugin import Adapter, Around

pytestmark = pytest.mark.usefixtures("toys")


def test_merge_equals_forward_and_unmerge_is_exact() -> None:
    model = peftcore.apply(tiny.llama(), "around", value=3.0)
    acting = tiny.logits(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight, 3 * before)
    torch.testing.assert_close(tiny.logits(model), acting)
    assert peftcore.summary(model).merged
    peftcore.unmerge(model)
    assert model.model.layers[0].self_attn.q_proj.weight is weight and torch.equal(weight, before)
    assert torch.equal(tiny.logits(model), acting)


class Added(Adapter):
    """y = base(x) + value · (1 + Σ x)."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x) + self.value * (1 + x.sum(-1, keepdim=True))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.value, None if bias is None else bias + self.value


@pytest.mark.parametrize("order", [("doubled", "raised"), ("raised", "doubled")])
def test_adapters_merge_and_return_in_the_order_of_their_chain(order: tuple[str, str]) -> None:
    raises = tiny.method("raises", lambda *_: [Around("0", Added(3.0))])
    model = nn.Sequential(nn.Linear(2, 2))
    (weight, bias), x = (p.detach().clone() for p in model.parameters()), torch.tensor([[0.5, -2.0]])
    with tiny.installed(raises):
        peftcore.apply(model, "around", target_modules=("0",), value=2.0, adapter="doubled")
        peftcore.apply(model, "raises", adapter="raised")
        peftcore.activate(model, order)
        acting = model(x)
        peftcore.merge(model, undo=True)
        shift = 3.0 if order[-1] == "raised" else 6.0
        torch.testing.assert_close(model[0].weight.detach(), 2 * weight + shift)
        torch.testing.assert_close(model[0].bias.detach(), 2 * bias + shift)
        torch.testing.assert_close(model(x), acting)
        peftcore.unmerge(model)
        assert torch.equal(model(x), acting)


def test_tied_weights_that_one_adapter_changes_stay_tied() -> None:
    one = tiny.Scaled(3.0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = original = model[0].weight
    before = original.detach().clone()
    with tiny.installed(tiny.method("both", lambda *_: [Around("0", one), Around("1", one)])):
        peftcore.merge(peftcore.apply(model, "both"), undo=True)
        assert model[0].weight is model[1].weight
        torch.testing.assert_close(model[0].weight.detach(), 3 * before)
        peftcore.unmerge(model)
        assert model[0].weight is original and model[1].weight is original
        peftcore.merge(model)
    assert model[0].weight is model[1].weight


def test_merge_for_good_leaves_a_plain_model() -> None:
    model = peftcore.apply(tiny.llama(), "around", value=3.0)
    acting, keys = tiny.logits(model), list(tiny.llama().state_dict())
    peftcore.merge(model)
    torch.testing.assert_close(tiny.logits(model), acting)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(peftcore.PeftcoreError, match="nothing to unmerge"):
        peftcore.unmerge(model)


def test_a_conv1d_is_stored_transposed() -> None:
    model = peftcore.apply(tiny.gpt2(), "around", target_modules=("c_attn",))
    model.transformer.h[0].attn.c_attn.bias.data.zero_()
    acting = tiny.logits(model)
    peftcore.merge(model, undo=True)
    assert model.transformer.h[0].attn.c_attn.weight.shape == (32, 96)
    torch.testing.assert_close(tiny.logits(model), acting)


@pytest.mark.parametrize("untie_first", [False, True])
def test_a_tied_weight_is_refused_or_untied(untie_first: bool) -> None:
    model = tiny.gpt2()
    peftcore.apply(model, "around", target_modules=("lm_head",), value=3.0)
    acting = tiny.logits(model)
    if not untie_first:
        with pytest.raises(peftcore.PeftcoreError, match=r"'lm_head' is tied to 'transformer.wte.weight'.*untie=True"):
            peftcore.merge(model, undo=True)
    with pytest.warns(UserWarning, match="untied 'lm_head' from"):
        peftcore.merge(model, untie=True, undo=True)
    torch.testing.assert_close(tiny.logits(model), acting)
    assert model.config.tie_word_embeddings is False
    peftcore.unmerge(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("undo", [True, False])
def test_values_that_are_not_finite_are_refused_and_nothing_changes(undo: bool) -> None:
    model = peftcore.apply(tiny.llama(), "around", value=3.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bad = model.model.layers[1].self_attn.q_proj.peftcore["default"].gain
    with torch.no_grad():
        bad.fill_(float("nan"))
    with pytest.raises(peftcore.PeftcoreError, match=r"into 'model.layers.1.self_attn.q_proj' gives NaN or Inf"):
        peftcore.merge(model, undo=undo)
    for name, parameter in model.named_parameters():
        assert parameter is bad or torch.equal(parameter, before[name]), name


def test_overflow_in_half_precision_is_refused() -> None:
    model = peftcore.apply(tiny.llama().half(), "around", value=1e7)
    with pytest.raises(peftcore.PeftcoreError, match=r"NaN or Inf in torch.float16"):
        peftcore.merge(model, undo=True)


@pytest.mark.parametrize("kind", ["after", "soft", "prefix"])
def test_what_is_no_change_of_a_weight_is_refused(kind: str) -> None:
    model = peftcore.apply(tiny.llama(), kind)
    with pytest.raises(peftcore.PeftcoreError, match=rf"'default' \({kind}\) cannot be merged"):
        peftcore.merge(model, undo=True)


def test_trained_parameters_merge_by_value() -> None:
    model = tiny.gpt2()
    original = model.lm_head.weight
    peftcore.apply(model, "train", names=("lm_head.weight",))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    acting = tiny.logits(model)
    peftcore.merge(model, undo=True)
    assert torch.equal(tiny.logits(model), acting)
    assert model.lm_head.weight is model.transformer.wte.weight
    peftcore.unmerge(model)
    assert torch.equal(tiny.logits(model), acting)
    peftcore.merge(model)
    assert torch.equal(tiny.logits(model), acting)
    assert original is not model.lm_head.weight


@pytest.mark.parametrize(
    "call",
    [
        lambda m: peftcore.apply(m, "around", adapter="b"),
        lambda m: peftcore.activate(m, "default"),
        lambda m: peftcore.remove(m, "default"),
        lambda m: peftcore.merge(m, undo=True),
        lambda m: peftcore.save(m, "unused"),
    ],
)
def test_while_merged_the_base_is_not_the_base(call) -> None:
    model = peftcore.merge(peftcore.apply(tiny.llama(), "around"), undo=True)
    with pytest.raises(peftcore.PeftcoreError, match=r"merged into the base. Call peftcore.unmerge"):
        call(model)


def test_nothing_to_merge() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="no adapter is applied"):
        peftcore.merge(tiny.llama(), undo=True)
    model = peftcore.apply(tiny.llama(), "around")
    with pytest.raises(peftcore.PeftcoreError, match="nothing to unmerge"):
        peftcore.unmerge(model)
    peftcore.activate(model, [])
    with pytest.raises(peftcore.PeftcoreError, match="no adapter is active"):
        peftcore.merge(model, undo=True)


def test_modules_that_were_replaced_or_deleted_are_named() -> None:
    model, path = peftcore.apply(tiny.llama(), "around", value=3.0), "model.layers.0.self_attn.q_proj"
    model.model.layers[0].self_attn.q_proj = nn.Linear(32, 32, bias=False)
    with pytest.raises(peftcore.PeftcoreError, match=f"'{path}' was replaced by another Linear"):
        peftcore.merge_error(model)
    model = peftcore.merge(peftcore.apply(tiny.llama(), "around", value=3.0), undo=True)
    del model.model.layers[0].self_attn.q_proj
    with pytest.raises(peftcore.PeftcoreError, match=f"'{path}.weight': it is gone"):
        peftcore.unmerge(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16"])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype: Any, tmp_path: Any) -> None:
    model = peftcore.apply(tiny.llama(), "around", value=3.0)
    acting = tiny.logits(model)
    for use in (peftcore.merge, lambda model, dtype: peftcore.save(model, tmp_path, dtype=dtype)):
        with pytest.raises(peftcore.PeftcoreError, match=r"dtype must be .* with at least 16 bits"):
            use(model, dtype=dtype)
    assert torch.equal(tiny.logits(model), acting) and not list(tmp_path.iterdir())


def test_can_merge_tells_what_merge_would_do() -> None:
    assert peftcore.can_merge(peftcore.apply(tiny.llama(), "lora", target_modules=["q_proj"]))
    assert not peftcore.can_merge(peftcore.apply(tiny.llama(), "adapter"))
    with pytest.raises(peftcore.PeftcoreError, match="no adapter"):
        peftcore.can_merge(tiny.llama())
