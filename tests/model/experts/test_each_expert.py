"""Adapters of linear layers at experts, one each, beside a list of linear layers that computes the same."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.checkpointing import enable_checkpointing
from support.mixtures import INPUTS, mixture
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import peftcore
from peftcore.files.tensors import tensors_on_disk
from peftcore.model import targets
from peftcore.plugin import Around, inside_at
from peftcore.plugin.registry import registry
from peftcore.testing import check_method, disturb

TARGETS = ["q_proj", "gate_up_proj", "down_proj"]

METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2},
    "beft": {},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 16},
    "deft": {"r": 4},
    "delora": {"r": 4},
    "dora": {"r": 4},
    "fourierft": {"n_frequency": 20},
    "glora": {"r": 4},
    "gralora": {"r": 8},
    "hira": {"r": 4},
    "hra": {"r": 4},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "loha": {"r": 4},
    "lokr": {"r": 4},
    "miss": {"r": 8},
    "oft": {"oft_block_size": 4, "r": 0},
    "peanut": {},
    "psoft": {"r": 4},
    "pvera": {"r": 8},
    "randlora": {"r": 8},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "supertuning": {},
    "tinylora": {},
    "unilora": {},
    "vblora": {"vector_length": 16, "num_vectors": 16, "topk": 2},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 20},
}


class Listed(nn.Module):
    """Experts as a list of pairs of linear layers, as models had them before they were stacked."""

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.gate = stacked._apply_gate
        for expert in range(stacked.num_experts):
            pair = nn.Module()
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(stacked, name).detach()[expert]
                weight = weight.T if stacked.is_transposed else weight
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=stacked.has_bias, dtype=weight.dtype)
                with torch.no_grad():
                    layer.weight.copy_(weight)
                    if stacked.has_bias:
                        layer.bias.copy_(getattr(stacked, f"{name}_bias")[expert])
                pair.add_module(name, layer)
            self.add_module(str(expert), pair)

    def forward(self, hidden: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        y = torch.zeros_like(hidden)
        for expert in range(len(self._modules)):
            rows, place = torch.where(index == expert)
            pair: Any = self._modules[str(expert)]
            if len(rows):
                own = pair.down_proj(self.gate(pair.gate_up_proj(hidden[rows])))
                y = y.index_add(0, rows, own * shares[rows, place, None])
        return y


def listed(model: nn.Module) -> nn.Module:
    for block in [module for module in model.modules() if hasattr(module, "experts")]:
        block.experts = Listed(block.experts)
    return model


def new(family: str, quantized: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    kinds = {"layer_types": ["full_attention"]} if family == "gpt_oss" else {}
    model = mixture(family, num_hidden_layers=1, **kinds).to(dtype)
    return peftcore.quantize(model) if quantized else model


def outcome(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients by name on disk."""
    y = model(**INPUTS).logits
    y.square().mean().backward()
    found = tensors_on_disk(model, "default").items()
    return y.detach(), {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in found if t.requires_grad}


def applied_to(model: nn.Module, method: str, **changes: Any) -> nn.Module:
    fields = {"target_modules": TARGETS, **METHODS[method], **changes}
    peftcore.apply(model, method, **fields)
    disturb(model, "default", seed=1, std=0.05)
    return model


@pytest.mark.parametrize(
    ("method", "family", "quantized"),
    [
        *((method, "gpt_oss", False) for method in METHODS),
        *((method, family, True) for method in ("dora", "ia3") for family in ("gpt_oss", "qwen3_moe")),
    ],
)
def test_each_method_computes_what_it_does_in_a_list(method: str, family: str, quantized: bool, tmp_path: Path) -> None:
    """Its file is that of a list, too. Experts of gpt-oss have biases, and weights [in, out]."""
    base = new(family, quantized)
    before, state = base(**INPUTS).logits, {name: t.clone() for name, t in base.state_dict().items()}
    model = applied_to(base, method)
    assert peftcore.summary(model).experts.adapted == peftcore.summary(model).experts.weights
    can_exclude = hasattr(peftcore.engine.applied(model, "default").config, "exclude_modules")
    way = "exclude_modules=" if can_exclude else "adapt none of "  # VeRA's config cannot
    with pytest.warns(UserWarning, match=rf"PEFT cannot read this file.*{way}\['mlp.experts'\]"):
        peftcore.save(model, tmp_path)
    again = peftcore.load(new(family, quantized), tmp_path, trainable=True)
    beside = listed(peftcore.dequantize(new(family, True)) if quantized else new(family))
    beside = peftcore.load(beside, tmp_path, check_base=False, trainable=True)
    (y, gradients), (z, others) = outcome(model), outcome(beside)
    assert torch.equal(again(**INPUTS).logits, y) and (y - before).abs().max() > 0.02
    torch.testing.assert_close(y, z, rtol=0, atol=1e-5)
    assert set(gradients) == set(others)
    size = max(gradient.abs().max() for gradient in others.values()).item()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=0, atol=1e-5 * size, msg=name)
    peftcore.merge(model, dtype=torch.float32 if quantized else None, undo=True)
    torch.testing.assert_close(model(**INPUTS).logits, y, rtol=0, atol=2e-5)
    peftcore.unmerge(model)
    assert torch.equal(model(**INPUTS).logits, y)
    peftcore.remove(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_beside_a_list_in_float64(method: str) -> None:
    model, beside = (applied_to(each, method) for each in (new("qwen3_moe"), listed(new("qwen3_moe").double())))
    with torch.no_grad():
        theirs = tensors_on_disk(beside, "default")
        for name, tensor in tensors_on_disk(model, "default").items():
            theirs[name].copy_(tensor)
    (y, gradients), (z, others) = outcome(model), outcome(beside)
    torch.testing.assert_close(y.double(), z, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), others[name].double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("named", [["q_proj", "down_proj"], ["experts"]])
@pytest.mark.parametrize(("method", "why"), [("lily", "mixes the rows"), ("poly", "reads the call of the model")])
def test_methods_that_must_know_whose_rows_they_are(method: str, why: str, named: list[str]) -> None:
    with pytest.raises(
        peftcore.PeftcoreError, match=f"{method} cannot adapt the experts of .*mlp.experts': the method {why}"
    ):
        peftcore.apply(new("qwen3_moe"), method, target_modules=named)


def test_an_expert_has_no_rows_of_tokens() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"gate_up_proj' is a layer of one expert.*Leave it out"):
        peftcore.apply(new("qwen3_moe"), "trainable-tokens", target_modules=["experts"])


class Gain(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, base: Any, x: Tensor) -> Tensor:
        return base(x) * self.gain


@pytest.mark.parametrize(
    ("left_out", "read", "message"),
    [
        (None, lambda model, path: model.get_submodule(path), "has no attribute .0.* with peftcore.plugin.layer_at"),
        ("2.down_proj", targets.layer_at, r"on experts of '.*experts.down_proj', but none on expert 2. Place one"),
        (None, lambda model, path: model.heads, "has no attribute 'heads'"),
        (
            "twice",
            targets.layer_at,
            r"gain places two adapters on '.*experts.0.gate_up_proj', but a module can have only one",
        ),
    ],
)
def test_what_authors_of_methods_miss_is_said(left_out: str | None, read: Any, message: str) -> None:
    times = 2 if left_out == "twice" else 1

    def place(model: nn.Module, config: Any, architecture: Any) -> list[Any]:
        layers = targets.select(model, architecture, target_modules=["experts"])
        sizes = {path: targets.sizes(read(model, path))[1] for path in layers}
        return [Around(path, Gain(size)) for path, size in sizes.items() if not path.endswith(f"{left_out}")] * times

    model = new("qwen3_moe")
    with (
        tiny.installed(tiny.method("gain", place)),
        pytest.raises((peftcore.PeftcoreError, AttributeError), match=message),
    ):
        peftcore.apply(model, "gain")
    assert peftcore.engine.state_of(model) is None


def test_an_expert_s_base_has_the_adapters_inside_in_their_order() -> None:
    model, path = new("qwen3_moe"), "model.layers.0.mlp.experts"

    def place(*_: Any) -> list[Any]:
        return [Around(f"{path}.{i}.down_proj", tiny.Scaled(3.0)) for i in range(4)]

    peftcore.apply(model, "lora", adapter="inner", target_modules=["down_proj"], r=2)
    disturb(model, "inner", seed=1, std=0.5)
    with tiny.installed(tiny.method("thrice", place)):
        peftcore.apply(model, "thrice", adapter="outer")
        found = inside_at(model, f"{path}.2.down_proj").weight().detach()
        peftcore.merge(model, undo=True)
        torch.testing.assert_close(found, model.get_submodule(path).down_proj[2].detach())


def test_beside_lora_on_the_same_experts(tmp_path: Path) -> None:
    """In the order in which they act, with a start that is read off what stands inside."""
    model, beside = new("gpt_oss"), listed(new("gpt_oss"))
    for each in (model, beside):
        torch.manual_seed(1)
        peftcore.apply(
            each, "lora", r=4, target_modules=TARGETS[1:], adapter="first", expert_r=4 if each is model else None
        )
    with torch.no_grad():
        for name, adapter in model.model.layers[0].mlp.experts.peftcore["first"].changes.items():
            for a, b in ((adapter.lora_A, adapter.lora_B),):
                nn.init.normal_(a, std=0.2)
                nn.init.normal_(b, std=0.2)
            for expert in range(4):
                own = getattr(beside.model.layers[0].mlp.experts.get_submodule(str(expert)), name).peftcore["first"]
                own.lora_A.copy_(adapter.lora_A[expert])
                own.lora_B.copy_(adapter.lora_B[expert])
    for each in (model, beside):
        torch.manual_seed(2)
        peftcore.apply(each, "dora", r=4, target_modules=TARGETS[1:])
    found, wanted = (tensors_on_disk(each, "default") for each in (model, beside))
    for name in found:
        if "magnitude" in name:
            torch.testing.assert_close(found[name], wanted[name])
    with torch.no_grad():
        for name in wanted:
            found[name].normal_(std=0.2)
            wanted[name].copy_(found[name])
    (y, gradients), (z, others) = outcome(model), outcome(beside)
    torch.testing.assert_close(y, z, rtol=0, atol=2e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-3, atol=1e-6)
    peftcore.merge(model, undo=True)
    torch.testing.assert_close(model(**INPUTS).logits, y, rtol=0, atol=2e-5)
    peftcore.unmerge(model)
    peftcore.activate(model, ["default", "first"])
    assert not torch.allclose(model(**INPUTS).logits, y, rtol=0, atol=1e-3)  # they do not commute


def test_training_with_checkpointing_and_dropout() -> None:
    model, plain = (applied_to(new("qwen3_moe").train(), "dora", lora_dropout=0.5) for _ in range(2))
    enable_checkpointing(model)
    gradients = []
    for each in (model, plain):
        torch.manual_seed(3)
        gradients.append(outcome(each)[1])
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert not torch.equal(model(**INPUTS).logits, model(**INPUTS).logits)
    assert torch.equal(model.eval()(**INPUTS).logits, model(**INPUTS).logits)


def test_experts_without_rows_get_gradients_of_zero() -> None:
    model = applied_to(new("qwen3_moe"), "ia3", target_modules=["experts"])
    token = {"input_ids": torch.tensor([[7]])}
    model(**token).logits.sum().backward()
    adapters = model.model.layers[0].mlp.experts.peftcore["default"].changes["down_proj"]
    moved = [bool(adapters.of_expert(expert).ia3_l.grad.any()) for expert in range(4)]
    assert sum(moved) == 2
    wanted = model(**INPUTS).logits[0, :1]
    first = {"input_ids": INPUTS["input_ids"][:1, :1]}
    torch.testing.assert_close(model(**first).logits[0], wanted, rtol=0, atol=1e-5)  # as in decoding


def test_half_precision_and_autocast() -> None:
    model, half = applied_to(new("gpt_oss"), "dora"), applied_to(new("gpt_oss", dtype=torch.bfloat16), "dora")
    wanted = model(**INPUTS).logits
    found = half(**INPUTS).logits
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.1 * wanted.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**INPUTS).logits.float(), wanted, rtol=0, atol=0.1 * wanted.abs().max().item())


def test_an_adapter_for_each_sample() -> None:
    model = applied_to(new("qwen3_moe"), "ia3", target_modules=["experts"])
    peftcore.apply(model, "dora", r=2, target_modules=["experts"], adapter="other")
    disturb(model, "other", seed=2)
    wanted = []
    for row, name in enumerate(["other", "default"]):
        peftcore.activate(model, [name])
        wanted.append(model(**INPUTS).logits[row])
    peftcore.activate(model, ["other", "default"], per_sample=True)
    torch.testing.assert_close(model(**INPUTS).logits, torch.stack(wanted), rtol=0, atol=1e-5)


def test_copied_pickled_and_switched() -> None:
    model = applied_to(new("qwen3_moe"), "dora")
    wanted = model(**INPUTS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**INPUTS).logits, wanted)
    with peftcore.disabled(model):
        assert torch.equal(model(**INPUTS).logits, new("qwen3_moe")(**INPUTS).logits)
    other = applied_to(new("qwen3_moe"), "dora")
    disturb(other, "default", seed=5)
    peftcore.set_state_dict(model, "default", peftcore.state_dict(other, "default"))
    assert torch.equal(model(**INPUTS).logits, other(**INPUTS).logits)


def test_what_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        peftcore.PeftcoreError, match=r"feed_forward.experts' cannot be adapted one by one: its weights"
    ):
        peftcore.apply(mixture("llama4_text"), "dora", target_modules=["experts"])
    spread = new("qwen3_moe")
    spread.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(peftcore.PeftcoreError, match="they are sharded"):
        peftcore.apply(spread, "dora", target_modules=["experts"])
    with pytest.raises(
        peftcore.PeftcoreError, match=r"bias='all' is not supported for experts \('model.layers.0.mlp.experts.0."
    ):
        peftcore.apply(new("gpt_oss"), "vera", r=4, target_modules=["experts"], bias="all")
    model = applied_to(new("qwen3_moe"), "dora")
    with pytest.raises(peftcore.PeftcoreError, match="cannot be combined"):
        peftcore.combine(model, ["default"], adapter="sum", how="cat")
    model.config._experts_implementation = "twice"
    ALL_EXPERTS_FUNCTIONS.register("twice", lambda module, x, index, weights: 2 * x)
    with pytest.raises(peftcore.PeftcoreError, match="Dora adapts single experts, which needs transformers'"):
        model(**INPUTS)


def test_planned_and_summed_up() -> None:
    model = new("qwen3_moe")
    plan = peftcore.plan(model, "dora", r=4, target_modules=["experts"])
    assert [row[:2] for row in plan.rows] == [("model.layers.0.mlp.experts", "Dora")]
    assert plan.coverage.reached == 4 * (64 * 64 + 32 * 64) and "one expert at a time" in str(plan)
    applied_to(model, "dora", r=4, target_modules=["experts"])
    assert "one expert at a time" in str(peftcore.summary(model))
    assert plan.rows[0][2] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_one_graph_is_refused_with_the_reason() -> None:
    model = applied_to(mixture("qwen3_moe", num_hidden_layers=1), "dora", r=4, target_modules=["experts"])
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"Message: cannot compile an adapter on single experts.*Compile"
    ):
        torch.compile(model, backend="eager", fullgraph=True)(**INPUTS)


@pytest.mark.filterwarnings("ignore:Hugging Face PEFT cannot read this file")
def test_what_the_suite_tries(capsys: pytest.CaptureFixture[str]) -> None:
    peft_lacks = "PEFT has no DoRA of stacked experts"
    config = registry.method("dora").config_class(r=4, target_modules=TARGETS)
    excused = {
        "Hugging Face PEFT computes the same from the file": peft_lacks,
        "a file that Hugging Face PEFT writes computes the same here": peft_lacks,
        "torch.compile(fullgraph=True)": "how many rows an expert has is data",
        "shared tensors are saved once, and stay shared after load, deepcopy and .to()": "may share none",
    }
    report = check_method(config, families=["Qwen3-MoE"], not_applicable=excused)
    assert len([result for result in report.results if not result.reason]) > 22
