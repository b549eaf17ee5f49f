"""Adapters made of adapters: what PEFT's `add_weighted_adapter` computes, sums that are exact, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny
from support.against_peft import quiet
from support.composed_models import Images, output, qwen2
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_modules, adapter_parameters
from peftcore.engine.composing.combining import Pruning, pruned_sum
from peftcore.plugin import Adapter, Around, LowRank, OnWeight
from peftcore.testing import disturb
from peftcore.testing.families import family_of

LLAMA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
# Two adapters of equal ranks, on modules that are not all the same.
EQUAL: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "llama": (tiny.llama, {**LLAMA, "lora_alpha": 16}, {"r": 4, "target_modules": ["v_proj", "down_proj"]}),
    # Not the first: PEFT's sum takes its use_rslora, and is then sqrt(r) times as large as it means.
    "rslora": (tiny.llama, {**LLAMA, "alpha_pattern": {"layers.1.*q_proj": 3}}, {**LLAMA, "use_rslora": True}),
    "qwen2": (qwen2, LLAMA, {**LLAMA, "lora_alpha": 2}),
    "gpt2": (tiny.gpt2, {"r": 4, "target_modules": ["c_attn", "c_fc"]}, {"r": 4, "target_modules": ["c_attn"]}),
    "embedding": (
        tiny.llama,
        {"r": 4, "target_modules": ["embed_tokens"]},
        {"r": 4, "target_modules": ["embed_tokens"]},
    ),
    "conv": (Images, {"r": 2, "target_modules": ["one", "two"]}, {"r": 2, "target_modules": ["one", "head"]}),
}
RANKS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "ranks": (tiny.llama, {**LLAMA, "lora_alpha": 16}, {"r": 2, "target_modules": ["v_proj", "up_proj"]}),
    "patterns": (tiny.llama, {**LLAMA, "rank_pattern": {"layers.0.self_attn.v_proj": 7}}, {**LLAMA, "r": 3}),
    "conv": (Images, {"r": 2, "target_modules": ["one", "two"]}, {"r": 5, "target_modules": ["one", "head"]}),
}


def both(case: tuple[Any, dict[str, Any], dict[str, Any]], folder: Path) -> tuple[nn.Module, nn.Module]:
    """Adapters `a` and `b`, with the same values, on a model of ours and on one of PEFT's."""
    make, *fields = case
    theirs: Any = None
    for name, each in zip("ab", fields, strict=True):
        config = peft.LoraConfig(init_lora_weights=False, **each)
        if theirs is None:
            theirs = quiet(peft.get_peft_model, make(), config, adapter_name=name)
        else:
            quiet(theirs.add_adapter, name, config)
    quiet(theirs.eval().save_pretrained, folder)
    ours = make()
    for name in "ab":
        quiet(peftcore.load, ours, folder / name, adapter=name)
    return ours, theirs


def compare(ours: nn.Module, theirs: nn.Module, folder: Path, weights: list[float], how: str, **fields: Any) -> None:
    """The same output of both, and of what PEFT loads from our file."""
    theirs_too = {"svd_rank" if key == "r" else key: value for key, value in fields.items()}
    quiet(theirs.add_weighted_adapter, ["a", "b"], weights, "c", combination_type=how, **theirs_too)
    theirs.set_adapter("c")
    assert peftcore.combine(ours, ["a", "b"], weights=weights, how=how, adapter="c", **fields) is ours
    peftcore.activate(ours, "c")
    wanted = output(theirs)
    torch.testing.assert_close(output(ours), wanted, rtol=0, atol=1e-5)
    quiet(peftcore.save, ours, folder, adapter="c")
    quiet(theirs.load_adapter, folder, adapter_name="read")
    theirs.set_adapter("read")
    torch.testing.assert_close(output(theirs), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", [[0.7, -0.4], [1.0, 1.0]], ids=str)
@pytest.mark.parametrize("kind", list(EQUAL))
def test_linear_is_that_of_peft(kind: str, weights: list[float], tmp_path: Path) -> None:
    ours, theirs = both(EQUAL[kind], tmp_path)
    compare(ours, theirs, tmp_path / "c", weights, "linear")


@pytest.mark.parametrize("how", ["cat", "svd"])
@pytest.mark.parametrize("kind", list(RANKS))
def test_adapters_of_other_ranks_are_those_of_peft(kind: str, how: str, tmp_path: Path) -> None:
    ours, theirs = both(RANKS[kind], tmp_path)
    compare(ours, theirs, tmp_path / "c", [0.7, -0.4], how)


@pytest.mark.parametrize("kind", ["gpt2", "embedding"])
@pytest.mark.parametrize("fields", [{"how": "cat"}, {"how": "svd", "r": 3}], ids=lambda f: f["how"])
def test_layouts_are_those_of_peft(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(EQUAL[kind], tmp_path)
    compare(ours, theirs, tmp_path / "c", [0.7, -0.4], **fields)


PRUNED = [
    ("magnitude_prune", {}),
    ("ties", {}),
    ("ties", {"majority_sign_method": "frequency"}),
    ("ties_svd", {"r": 6}),
    ("dare_linear", {}),
    ("dare_ties", {}),
    ("dare_linear_svd", {}),
]


@pytest.mark.parametrize("kind", ["llama", "conv"])
@pytest.mark.parametrize(("method", "fields"), PRUNED, ids=lambda value: str(value))
def test_thinned_out_ones_are_those_of_peft(
    kind: str, method: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def every_other(p: Tensor, **_: Any) -> Tensor:  # PEFT draws its own after values that are overwritten
        return (torch.arange(p.numel()) % 2).view(p.shape).to(p.dtype)

    monkeypatch.setattr(torch, "bernoulli", every_other)
    ours, theirs = both(EQUAL[kind], tmp_path)
    compare(ours, theirs, tmp_path / "c", [0.7, -0.4], method, density=0.5, **fields)


def test_what_is_dropped_at_random_is_made_up_for() -> None:
    how = Pruning(random=True, elects=False, density=0.25, generator=torch.Generator().manual_seed(0))
    found = pruned_sum([torch.ones(40_000), torch.zeros(40_000)], [2.0, 1.0], how)
    assert found.unique().tolist() == [0.0, 8.0]
    assert found.mean().item() == pytest.approx(2.0, abs=0.05)
    again = Pruning(random=True, elects=False, density=0.25, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pruned_sum([torch.ones(40_000), torch.zeros(40_000)], [2.0, 1.0], again), found)


def two(make: Any = tiny.llama, **fields: Any) -> nn.Module:
    """A model with adapters `a` (rank 4) and `b` (rank 2), of values that are not those of the start."""
    model = make()
    for seed, (name, r) in enumerate({"a": 4, "b": 2}.items()):
        torch.manual_seed(seed)
        chosen = {"target_modules": ["q_proj", "down_proj"], "r": r, "lora_alpha": 6, **fields}
        peftcore.apply(model, "lora", adapter=name, **chosen)
    for name in "ab":
        disturb(model, name, seed=ord(name))
    return model


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_the_exact_ones_compute_the_sum_of_the_changes(method: str) -> None:
    model = two()
    together = tiny.logits(model)
    peftcore.combine(model, ["a", "b"], how=method, adapter="c", **({"r": 6} if method == "svd" else {}))
    assert torch.equal(tiny.logits(model), together)  # it rests, the others act
    peftcore.activate(model, "c")
    torch.testing.assert_close(tiny.logits(model), together, rtol=0, atol=2e-6)
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(tiny.logits(model), together, rtol=0, atol=2e-6)
    peftcore.unmerge(model)
    assert all(p.requires_grad for _, p in adapter_parameters(model, "c"))


def test_a_combined_adapter_has_the_dtype_of_the_first_and_loads_as_any() -> None:
    model = tiny.llama().bfloat16()
    peftcore.apply(model, "lora", adapter="a", r=4, dtype=torch.bfloat16, lora_dropout=0.1)
    disturb(model, "a", seed=0)
    peftcore.combine(model, ["a"], weights=[0.5], adapter="c")
    assert {p.dtype for _, p in adapter_parameters(model, "c")} == {torch.bfloat16}
    config = peftcore.engine.applied(model, "c").config
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 4, 0.1)
    assert config.target_modules == peftcore.engine.applied(model, "a").config.target_modules


def test_a_scale_by_the_root_of_the_rank_is_not_taken_twice() -> None:
    model = two(use_rslora=True)
    together = tiny.logits(model)
    peftcore.combine(model, ["a", "b"], adapter="c")
    peftcore.activate(model, "c")
    torch.testing.assert_close(tiny.logits(model), together, rtol=0, atol=2e-6)


def test_attention_has_two_products() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    x = torch.linspace(-2, 2, 2 * 5 * 16).sin().view(2, 5, 16)
    for name in "ab":
        peftcore.apply(layer, "lora", adapter=name, r=2, target_modules=["self_attn"])
        disturb(layer, name, seed=ord(name))
    together = layer(x)
    peftcore.combine(layer, ["a", "b"], adapter="c")
    peftcore.activate(layer, "c")
    torch.testing.assert_close(layer(x), together, rtol=0, atol=2e-6)


class Gain(Adapter):
    """y = gain · base(x), whose change is linear in the gain."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(value))
        self.sign = 1 if value > 0 else -1

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return self.sign * self.gain * base(x)

    def neutral(self) -> dict[str, Tensor]:
        return {"gain": torch.ones(())}


def gains(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
    return [Around(f"model.layers.{i}.self_attn.{n}", Gain(config.value)) for i in range(2) for n in config.names]


def test_adapters_that_are_linear_in_their_tensors_are_summed() -> None:
    with tiny.installed(tiny.method("gains", gains)):
        model = tiny.llama()
        for name, value in (("a", 1.5), ("b", 0.25)):
            peftcore.apply(model, "gains", adapter=name, value=value, names=("q_proj",))
        peftcore.combine(model, ["a", "b"], weights=[2, -1], adapter="c", how="linear")
        assert [m.gain.item() for _, m in adapter_modules(model, "c")] == [2.75, 2.75]  # 1 + 2 · 0.5 - (-0.75)
        peftcore.apply(model, "gains", adapter="d", value=1.5, names=("k_proj",))
        with pytest.raises(peftcore.PeftcoreError, match="other methods, adapted modules, or shapes"):
            peftcore.combine(model, ["a", "d"], adapter="e")
        peftcore.remove(model, "d")
        peftcore.apply(model, "gains", adapter="d", value=-1.5, names=("q_proj",))
        with pytest.raises(peftcore.PeftcoreError, match=r"'a' .*and 'd' .*since they differ: sign=-1 instead of 1"):
            peftcore.combine(model, ["a", "d"], adapter="e")
        with pytest.raises(peftcore.PeftcoreError, match=r"'a' .gains. cannot be combined by 'ties': its change at"):
            peftcore.combine(model, ["a", "b"], adapter="e", how="ties", density=0.5)
        assert list(peftcore.engine.state_of(model).applied) == ["a", "b", "c", "d"]


class Projected(Adapter):
    """W -> W + scaling · out · inᵀ, with drawn vectors that stay; linear in `scaling`, and of rank 1."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("out", torch.randn(32, 1, generator=generator))
        self.register_buffer("inner", torch.randn(1, 32, generator=generator))
        self.scaling = nn.Parameter(torch.zeros(1))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x) + (self.scaling * (x @ self.inner.T)) @ self.out.T

    def low_rank(self) -> list[LowRank]:
        return [LowRank(self.scaling * self.inner, self.out)]

    def neutral(self) -> dict[str, Tensor]:
        return {"scaling": torch.zeros(1)}


def projected(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
    return [Around("model.layers.0.self_attn.q_proj", Projected(int(config.value)))]


def test_adapters_with_factors_and_without_a_method_of_products_are_summed_by_their_parameters() -> None:
    with tiny.installed(tiny.method("projected", projected)):
        model = tiny.llama()
        for name, seed, value in (("a", 1, 2.0), ("b", 1, 3.0), ("c", 2, 1.0)):
            peftcore.apply(model, "projected", adapter=name, value=float(seed))
            with torch.no_grad():
                next(parameter for _, parameter in adapter_parameters(model, name)).fill_(value)
                for _, module in adapter_modules(model, name):
                    module.out.add_(1)  # the new adapter cannot draw such a vector: its buffers are copied
        with pytest.raises(peftcore.PeftcoreError, match=r"cannot be scaled: .*peftcore\.combine\(model, \['a'\]"):
            peftcore.scale(model, "a", 0.5)
        peftcore.combine(model, ["a", "b"], weights=[2, -1], adapter="d")
        ((_, first),), ((_, made),) = adapter_modules(model, "a"), adapter_modules(model, "d")
        assert made.scaling.item() == 1.0 and torch.equal(made.out, first.out)
        with pytest.raises(peftcore.PeftcoreError, match=r"different values of the buffer 'out' at 'model\.layers\.0"):
            peftcore.combine(model, ["a", "c"], adapter="e")


class WeightGain(Gain):
    """W -> gain · W."""

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain * weight


def weight_gains(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
    return [OnWeight("model.layers.0.mlp", f"{n}_proj.weight", WeightGain(config.value)) for n in config.names]


@pytest.mark.parametrize("kind", ["parameters of a module", "experts"])
def test_those_that_one_module_joins_are_summed_too(kind: str) -> None:
    if kind == "experts":
        model, fields = family_of("Qwen3-MoE").make(), {"target_modules": ["experts"], "feedforward_modules": []}
    else:
        model, fields = tiny.llama(), {"names": ("up", "down")}
    with tiny.installed(tiny.method("weight-gains", weight_gains)):
        for name, value in (("a", 1.5), ("b", 0.25)):
            method = "ia3" if kind == "experts" else "weight-gains"
            more = {} if kind == "experts" else {"value": value}
            peftcore.apply(model, method, adapter=name, **fields, **more)
            with torch.no_grad():
                for _, p in adapter_parameters(model, name):
                    p.fill_(value)
        peftcore.combine(model, ["a", "b"], weights=[2, -1], adapter="c", how="linear")
        found = [p for _, p in adapter_parameters(model, "c")]
        assert len(found) > 1
        assert all(p.eq(2.75).all() for p in found)  # 1 + 2 · 0.5 - (-0.75)


def test_adapters_whose_tensors_mean_something_else_are_not_summed() -> None:
    model = tiny.llama()
    for name, seed in (("a", 1), ("b", 2), ("c", 1)):
        peftcore.apply(model, "fourierft", adapter=name, n_frequency=20, random_loc_seed=seed)
        disturb(model, name, seed=seed)
    with pytest.raises(peftcore.PeftcoreError, match=r"since they differ: other values of the non-persistent buffer"):
        peftcore.combine(model, ["a", "b"], adapter="d", how="linear")
    peftcore.combine(model, ["a", "c"], adapter="d", how="linear")


def test_trained_parameters_of_the_base_are_summed_as_changes() -> None:
    model = qwen2()
    base = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias")}
    for name, moved in (("a", 0.5), ("b", -0.25)):
        if name == "b":
            peftcore.activate(model, [])
        quiet(peftcore.apply, model, "bitfit", adapter=name)
        with torch.no_grad():
            for _, p in adapter_parameters(model, name):
                p.add_(moved)
    peftcore.combine(model, ["a", "b"], weights=[2, 4], adapter="c")
    peftcore.combine(model, ["a"], weights=[0.5], adapter="less")
    biases = dict(adapter_parameters(model, "c"))
    assert {n.rpartition(".")[2] for n in biases} == {"bias"}
    for name, found in biases.items():
        torch.testing.assert_close(found, base[name])  # 2 · 0.5 - 4 · 0.25
    for name, found in adapter_parameters(model, "less"):
        torch.testing.assert_close(found, base[name] + 0.25)


class Magnitude(Adapter):
    """LowRank that are not all there is."""

    def __init__(self, tensor: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 32)), nn.Parameter(torch.randn(32, 2))
        if tensor:
            self.magnitude = nn.Parameter(torch.ones(32))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x)

    def low_rank(self) -> list[LowRank]:
        return [LowRank(self.a, self.b, 1.0)]

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return 2 * (weight + self.b @ self.a), bias


@pytest.mark.parametrize(
    ("tensor", "why"),
    [(True, "the adapter also has the tensor 'magnitude'"), (False, "is not just the product of its factors")],
)
def test_factors_that_are_not_all_are_not_believed(tensor: bool, why: str) -> None:
    def place(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
        return [Around("model.layers.0.self_attn.q_proj", Magnitude(tensor))]

    with tiny.installed(tiny.method("more", place)):
        model = peftcore.apply(tiny.llama(), "more", adapter="a")
        with pytest.raises(peftcore.PeftcoreError, match=rf"'model.layers.0.self_attn.q_proj' .*{why}.*convert"):
            peftcore.combine(model, ["a"], adapter="c")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"how": "mean"}, "how='mean' is not supported"),
        ({"how": "ties"}, "how='ties' needs density, .* found None"),
        ({"how": "ties", "density": 1.5}, "found 1.5"),
        ({"how": "cat", "density": 0.5}, "density=0.5 has no effect with how='cat'"),
        ({"how": "cat", "r": 4}, "r=4 has no effect with how='cat'"),
        ({"how": "svd", "r": 0}, "r must be"),
        ({"weights": [1.0]}, "weights must contain 2 finite numbers"),
        ({"weights": [1.0, float("nan")]}, "weights must contain 2 finite numbers"),
        ({"adapter": "a"}, "the model already has an adapter 'a'"),
        ({"how": "linear"}, r"needs equal ranks, but the ranks at 'model.layers.0.self_attn.q_proj' are \[2, 4\]"),
        ({"adapters": ["a", "x"]}, "no adapter 'x' is applied"),
        ({"adapters": "ab"}, "combine takes a list of adapter names"),
        ({"weights": [1e38, 1e38]}, "NaN or Inf in torch.float32"),
        ({"how": "ties", "density": 0.5, "majority_sign_method": "most"}, "majority_sign_method must be one of"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_and_leaves_the_model(fields: dict[str, Any], message: str) -> None:
    model = two()
    with torch.no_grad():
        next(p for _, p in adapter_parameters(model, "a")).mul_(1e3)
    before = tiny.logits(model)
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.combine(model, **{"adapters": ["a", "b"], "adapter": "c", **fields})
    assert peftcore.engine.state_of(model).active == ("a", "b")
    assert list(peftcore.engine.state_of(model).applied) == ["a", "b"]
    assert torch.equal(tiny.logits(model), before)


def test_modules_that_are_trained_whole_and_biases_are_refused() -> None:
    for fields, message in (
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=\\['lm_head'\\]"),
        ({"bias": "all"}, "it also trains the base parameter '.*bias'"),
    ):
        model = peftcore.apply(qwen2(), "lora", adapter="a", target_modules=["q_proj"], **fields)
        with pytest.raises(peftcore.PeftcoreError, match=message):
            peftcore.combine(model, ["a"], adapter="c")


def test_other_changes_say_what_works() -> None:
    model = peftcore.apply(tiny.llama(), "prompt-tuning", adapter="a", num_virtual_tokens=2)
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot be combined: .*does not change weights"):
        peftcore.combine(model, ["a"], adapter="c")
    merged = peftcore.merge(two(), undo=True)
    with pytest.raises(peftcore.PeftcoreError, match="cannot combine adapters: adapters are merged"):
        peftcore.combine(merged, ["a", "b"], adapter="c")
