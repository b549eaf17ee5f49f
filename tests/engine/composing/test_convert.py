"""Any change of weights approximated by low-rank adapters: exact, with the fraction that a rank keeps, or refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import quiet
from support.composed_models import Images, output, qwen2
from support.mixtures import mixture
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_modules, adapter_parameters, applied
from peftcore.engine.merging.merged_layers import merged_copies
from peftcore.model.weight_formats import find_weight_format
from peftcore.plugin import Adapter, Around, LowRank, OnWeight
from peftcore.testing import disturb

Q = "model.layers.0.self_attn.q_proj"


def adapted(method: str, make: Any = tiny.llama, **fields: Any) -> nn.Module:
    model = quiet(peftcore.apply, make(), method, adapter="a", **fields)
    disturb(model, "a", seed=1)
    return model


CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "lora": ("lora", tiny.llama, {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("lora", tiny.llama, {"r": 3, "use_rslora": True, "target_modules": ["q_proj"]}),
    "embedding": ("lora", tiny.llama, {"r": 3, "target_modules": ["embed_tokens"]}),
    "gpt2": ("lora", tiny.gpt2, {"r": 3, "target_modules": ["c_attn", "c_fc"]}),
    "conv": ("lora", Images, {"r": 3, "target_modules": ["one", "two", "head"]}),
    "vera": ("vera", tiny.llama, {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "vera gpt2": ("vera", tiny.gpt2, {"r": 4, "target_modules": ["c_attn"]}),
    "adalora": ("adalora", tiny.llama, {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["q_proj"]}),
    "ia3": ("ia3", tiny.llama, {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_rank_that_is_large_enough_is_exact(case: str) -> None:
    method, make, fields = CASES[case]
    model = adapted(method, make, **fields)
    wanted = output(model)
    kept = peftcore.convert(model, "a", method="lora", r=64)
    assert kept.keys() == dict(adapter_modules(model, "a")).keys() == dict(adapter_modules(model, "a-lora")).keys()
    assert all(share == pytest.approx(1, abs=1e-6) for share in kept.values())
    assert torch.equal(output(model), wanted)  # the new one rests
    peftcore.activate(model, "a-lora")
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=2e-5)


def changes(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    found = {}
    for path, _ in adapter_modules(model, adapter):
        module = model.get_submodule(path)
        with torch.no_grad():
            copies = merged_copies(path, module, {adapter: "ours"}, find_weight_format(module))
            found[path] = copies.merged.weight - copies.base.weight
    return found


def test_a_smaller_one_is_the_nearest_and_its_share_is_reported() -> None:
    model = adapted("ia3", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    kept = peftcore.convert(model, "a", method="lora", r=5, adapter="b")
    whole, part = changes(model, "a"), changes(model, "b")
    for path, share in kept.items():
        s = torch.linalg.svdvals(whole[path].double())
        assert share == pytest.approx((s[:5].norm() / s.norm()).item(), rel=1e-5)
        assert (part[path].norm() / whole[path].norm()).item() == pytest.approx(share, rel=1e-4)
        assert ((whole[path] - part[path]).norm() / whole[path].norm()).item() == pytest.approx(
            math.sqrt(1 - share**2), rel=1e-3
        )
    assert 0.3 < min(kept.values()) < 0.99


def test_without_a_rank_each_layer_has_the_smallest_that_keeps_enough() -> None:
    model = adapted("lora", r=6, target_modules=["q_proj", "up_proj"])
    with torch.no_grad():  # one layer of rank 2, and one without a change
        (_, first), (_, second), *_ = adapter_modules(model, "a")
        first.lora_B[:, 2:] = 0
        second.lora_B.zero_()
    kept = peftcore.convert(model, "a", method="lora", r=None, adapter="b")
    ranks = {path: module.lora_A.shape[0] for path, module in adapter_modules(model, "b")}
    for path, change in changes(model, "a").items():
        s = torch.linalg.svdvals(change.double())
        shares = s.square().cumsum(0).sqrt() / s.norm().clamp(min=1e-30)
        assert ranks[path] == (1 if not change.any() else int((shares < 0.99).sum()) + 1)
    assert min(kept.values()) >= 0.99
    assert len(set(ranks.values())) > 1


def test_it_is_a_file_as_any_and_peft_reads_it(tmp_path: Path) -> None:
    model = adapted("vera", r=4, target_modules=["q_proj", "v_proj"])
    peftcore.convert(model, "a", method="lora", r=None, adapter="b")
    peftcore.activate(model, "b")
    wanted = output(model)
    peftcore.save(model, tmp_path, adapter="b")
    theirs = quiet(peft.PeftModel.from_pretrained, tiny.llama(), tmp_path).eval()
    torch.testing.assert_close(output(theirs), wanted, rtol=0, atol=1e-5)
    assert torch.equal(output(peftcore.load(tiny.llama(), tmp_path)), wanted)


def test_a_factor_is_converted_with_the_change_and_a_packed_base_stays() -> None:
    model = adapted("lora", r=3, target_modules=["q_proj"])
    peftcore.scale(model, "a", 0.5)
    wanted = output(model)
    peftcore.convert(model, "a", method="lora", r=3, adapter="b")
    peftcore.activate(model, "b")
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=2e-6)
    packed = tiny.llama()
    peftcore.quantize(packed, "nf4")
    quiet(peftcore.apply, packed, "ia3", adapter="a", target_modules=["q_proj"], feedforward_modules=[])
    disturb(packed, "a", seed=1)
    wanted = output(packed)
    peftcore.convert(packed, "a", method="lora", r=64, adapter="b")
    peftcore.activate(packed, "b")
    torch.testing.assert_close(output(packed), wanted, rtol=0, atol=1e-5)


def test_a_change_of_a_parameter_is_converted_where_that_is_the_weight() -> None:
    def place(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
        return [OnWeight(Q, "weight", tiny.LowRank(32, 32))]

    with tiny.installed(tiny.method("changes", place)):
        model = adapted("changes")
        wanted = output(model)
        assert peftcore.convert(model, "a", method="lora", r=2, adapter="b") == {Q: pytest.approx(1)}
        peftcore.activate(model, "b")
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)


def test_a_change_of_the_bias_is_refused() -> None:
    model = adapted("ia3", qwen2, target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot be converted: .*q_proj' includes the bias"):
        peftcore.convert(model, "a", method="lora")
    assert list(peftcore.engine.state_of(model).applied) == ["a"]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(("kind", "method"), [("qwen3_moe", "dora"), ("qwen3_moe", "lora"), ("gpt_oss", "hra")])
def test_experts_have_a_product_each(kind: str, method: str, bits: int) -> None:
    model = mixture(kind)  # gpt-oss' weights are [experts, in, out]
    if bits == 4:
        peftcore.quantize(model)
    model = adapted(method, lambda: model, target_modules=["experts", "q_proj"])
    wanted = output(model)
    kept = peftcore.convert(model, "a", method="lora", r=64)
    peftcore.activate(model, "a-lora")
    torch.testing.assert_close(output(model), wanted, rtol=0, atol=2e-5)
    experts = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]
    assert kept == {
        path: pytest.approx(1) for path in [*experts, *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))]
    }


@pytest.mark.parametrize("r", [3, None])
def test_experts_of_a_smaller_rank_keep_the_share_that_is_reported(r: int | None) -> None:
    model = adapted("dora", lambda: mixture("qwen3_moe"), r=6, target_modules=["experts"])
    kept = peftcore.convert(model, "a", method="lora", r=r, adapter="b")
    experts = model.get_submodule("model.layers.1.mlp.experts")
    whole, part = (merged_copies("", experts, {name: "ours"}, None) for name in "ab")
    for name in ("gate_up_proj", "down_proj"):
        before = getattr(whole.base, name)
        wanted, found = getattr(whole.merged, name) - before, getattr(part.merged, name) - before
        s = torch.linalg.svdvals(wanted.double())
        shares = s.square().cumsum(-1).sqrt() / s.norm(dim=-1, keepdim=True)
        rank = r or int((shares < 0.99).sum(-1).max()) + 1  # which the expert that needs most asks for
        share = kept[f"model.layers.1.mlp.experts.{name}"]
        assert share == pytest.approx((s[:, :rank].norm() / s.norm()).item(), rel=1e-5)
        assert (found.norm() / wanted.norm()).item() == pytest.approx(share, rel=1e-4)
        assert ((wanted - found).norm() / wanted.norm()).item() == pytest.approx(math.sqrt(1 - share**2), rel=1e-3)
    assert max(kept.values()) < 0.9999


def test_a_change_of_experts_biases_is_refused() -> None:
    model = adapted("ia3", lambda: mixture("gpt_oss"), target_modules=["experts"], feedforward_modules=[])
    with pytest.raises(peftcore.PeftcoreError, match=r"at 'model.layers.0.mlp.experts' includes 'down_proj_bias'"):
        peftcore.convert(model, "a", method="lora")


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("prompt-tuning", {"num_virtual_tokens": 2}, "is not a change of a weight"),
        ("adapter", {}, "is not a change of a weight"),
        ("lora", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save=\\['lm_head'\\]"),
    ],
)
def test_what_is_no_change_of_a_weight_is_refused(method: str, fields: dict[str, Any], message: str) -> None:
    model = adapted(method, **fields)
    with pytest.raises(peftcore.PeftcoreError, match=f"'a' .{method}. cannot be converted: .*{message}"):
        peftcore.convert(model, "a", method="lora")


def test_names_methods_and_ranks_are_checked() -> None:
    model = adapted("lora", r=2, target_modules=["q_proj"])
    for fields, message in (
        ({"method": "bitfit"}, "method='bitfit' does not make low-rank adapters. Choose one of: .*'lora'"),
        ({"method": "nonsense"}, "nonsense"),
        ({"method": "lora", "r": 0}, "r must be"),
        ({"method": "lora", "adapter": "a"}, "already has an adapter 'a'"),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=message):
            peftcore.convert(model, "a", **fields)


def test_tensors_of_ia3_are_summed() -> None:
    model = adapted("ia3", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    once = changes(model, "a")
    peftcore.combine(model, ["a"], weights=[-0.5], adapter="c")
    for path, change in changes(model, "c").items():
        torch.testing.assert_close(change, -0.5 * once[path], rtol=1e-4, atol=1e-6)
    assert applied(model, "c").method == "ia3"
    assert {p.dtype for _, p in adapter_parameters(model, "c")} == {torch.float32}


class Twice(Adapter):
    """y = base(x) + 2 · B A x, whose factors are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(2, 32)), nn.Parameter(torch.zeros(32, 2))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x) + 2 * x @ self.a.T @ self.b.T

    def low_rank(self) -> list[LowRank]:
        return [LowRank(2 * self.a, 1 * self.b, 1.0)]

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + 2 * self.b @ self.a, bias


def test_adapters_of_different_methods_are_summed_as_products() -> None:
    def place(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
        return [Around(f"model.layers.{i}.self_attn.q_proj", Twice()) for i in range(2)]

    with tiny.installed(tiny.method("twice", place)):
        model = adapted("lora", r=2, target_modules=["q_proj", "v_proj"])
        peftcore.apply(model, "twice", adapter="b")
        disturb(model, "b", seed=2)
        wanted = output(model)
        peftcore.combine(model, ["b", "a"], adapter="c")
        peftcore.activate(model, "c")
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-5)
        with pytest.raises(
            peftcore.PeftcoreError, match=r"the sum of twice adapters is not a twice adapter\. Convert it"
        ):
            peftcore.combine(model, ["b"], adapter="d")
