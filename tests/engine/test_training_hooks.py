"""What methods say to training: their modules, the end of a step, a term of the loss, groups of parameters."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_modules, adapter_parameters, method_modules
from peftcore.plugin import (
    AdapterModules,
    After,
    Architecture,
    Method,
    Placement,
    SoftPrompt,
    StateRules,
    Train,
    targets,
)
from peftcore.testing import check_method


def test_modules_of_a_method_are_its_own_by_path(toys: None) -> None:
    model = peftcore.apply(tiny.llama(), "around")
    assert method_modules(model, "default") == dict(adapter_modules(model, "default"))
    assert list(method_modules(model, "default")) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    other = copy.deepcopy(model)
    assert method_modules(other, "default") == dict(adapter_modules(other, "default"))


@pytest.mark.parametrize("method", ["soft", "prefix"])
def test_a_prompt_is_the_methods_module_and_not_what_stands_around_the_backbone(method: str, toys: None) -> None:
    model = peftcore.apply(tiny.llama(), method)
    ((path, module),) = method_modules(model, "default").items()
    assert path == "" and type(module) is tiny.Vectors
    assert module.vectors is next(p for _, p in adapter_parameters(model, "default"))


def test_a_prompt_beside_an_adapter_around_the_model_has_a_key_of_its_own() -> None:
    def place(model: nn.Module, config: Any, architecture: Architecture) -> list[Any]:
        return [SoftPrompt(tiny.Vectors(2, architecture.hidden_size)), After("", nn.Identity())]

    with tiny.installed(tiny.method("several", place)):
        found = method_modules(peftcore.apply(tiny.llama(), "several"), "default")
    assert {key: type(module) for key, module in found.items()} == {"": nn.Identity, "#1": tiny.Vectors}


def test_after_step_is_given_the_modules_of_each_adapter_that_trains() -> None:
    calls = []
    method = tiny.method("stepping", after_step=lambda *args: calls.append(args))
    with tiny.installed(method):
        model = peftcore.apply(tiny.llama(), "stepping")
        for name in ("rests", "frozen"):
            peftcore.apply(model, "stepping", adapter=name)
        peftcore.activate(model, ["default", "frozen"])
        peftcore.engine.set_trainable(model, "frozen", False)
        peftcore.after_step(model, 3, 10)
        ((adapters, config, step, total),) = calls
        assert adapters == method_modules(model, "default") and type(config) is method.config_class
        assert (step, total) == (3, 10)
        for wrong in (0, 1.0, None):
            with pytest.raises(peftcore.PeftcoreError, match="takes the 1-based number"):
                peftcore.after_step(model, wrong, 10)


def steps(model: nn.Module, count: int, after: bool = False) -> list[str]:
    """The warnings of so many optimizer steps, each with `after_step` or without."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, count + 1):
            model(tiny.TOKENS).logits.square().mean().backward()
            optimizer.step()
            if after:
                peftcore.after_step(model, step, count)
            optimizer.zero_grad()
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_training_without_after_step_is_said_once_at_the_second_step() -> None:
    with tiny.installed(tiny.method("stepping", after_step=lambda *_: None)):
        model = peftcore.apply(tiny.llama(), "stepping")
        assert steps(model, 1) == []
        (message,) = steps(model, 3)
        assert "two steps on the adapter 'default' (stepping) without peftcore.after_step" in message
        assert "Call peftcore.after_step(model, step, total_steps)" in message
        assert steps(model, 3) == []
        peftcore.apply(model, "stepping", adapter="other")
        peftcore.activate(model, "other")
        (message,) = steps(model, 2)
        assert "'other'" in message


@pytest.mark.parametrize("case", ["called", "no hook", "nothing to do", "inactive", "frozen", "another model"])
def test_nothing_is_said_where_after_step_is_called_or_does_nothing(case: str) -> None:
    hooks: dict[str, Any] = {"after_step": lambda *_: None, "needs_after_step": lambda _: case != "nothing to do"}
    with tiny.installed(tiny.method("stepping", **({} if case == "no hook" else hooks)), tiny.method("plain")):
        model = peftcore.apply(tiny.llama(), "stepping")
        trained = model
        if case in ("inactive", "frozen"):
            peftcore.apply(model, "plain", adapter="other")
            peftcore.activate(model, ["other", "default"] if case == "frozen" else "other")
            peftcore.engine.set_trainable(model, "default", False)
        elif case == "another model":
            trained = peftcore.apply(tiny.llama(), "plain")
        assert steps(trained, 3, after=case == "called") == []


def pull(adapters: Any, config: Any) -> Tensor | None:
    """Draws the gains of `tiny.Scaled` to 3; no term where there is one only."""
    gains = torch.stack([adapter.gain for adapter in adapters.values()])
    return 10 * (gains - 3).square().sum() if len(gains) > 1 else None


def apart(adapters: Any, config: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    first, *_ = adapters.values()
    return [{"params": first.parameters(), "lr": 16 * lr}]


def test_the_terms_of_adapters_that_train_are_added_up() -> None:
    with tiny.installed(tiny.method("pulled", loss=pull), tiny.method("around")):
        model = peftcore.apply(tiny.llama(), "pulled", value=1.0)
        for name, value in (("second", 2.0), ("frozen", 0.0), ("rests", 0.0)):
            peftcore.apply(model, "pulled", adapter=name, value=value)
        peftcore.apply(model, "around", adapter="none")
        peftcore.apply(model, "pulled", adapter="one", target_modules=("model.layers.0.self_attn.q_proj",))
        peftcore.engine.set_trainable(model, "frozen", False)
        peftcore.activate(model, ["second", "frozen", "default", "none", "one"])
        assert {name: term.item() for name, term in peftcore.loss_terms(model).items()} == {"default": 80, "second": 20}
        peftcore.extra_loss(model).backward()
        gradients = {
            name: [p.grad.item() for _, p in adapter_parameters(model, name) if p.grad is not None]
            for name in ("default", "second", "frozen", "none", "one")
        }
        assert gradients == {"default": [-40.0] * 2, "second": [-20.0] * 2, "frozen": [], "none": [], "one": []}
        with torch.no_grad():
            assert peftcore.extra_loss(model) == 100


def test_no_term_is_a_zero_that_can_be_added() -> None:
    with tiny.installed(tiny.method("around"), tiny.method("pulled", loss=pull)):
        model = peftcore.apply(tiny.llama(), "around")
        assert peftcore.extra_loss(model) == 0 and peftcore.loss_terms(model) == {}
        (model(tiny.TOKENS).logits.sum() + peftcore.extra_loss(model)).backward()
        model = peftcore.merge(peftcore.apply(tiny.llama(), "pulled"), undo=True)
        assert peftcore.extra_loss(model) == 0  # merged adapters do not train


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda adapters, config: torch.zeros(3), r"scalar or None, found a torch.float32 tensor of shape \[3\]"),
        (lambda adapters, config: 0.1, "scalar or None, found 0.1"),
        (lambda adapters, config: pull(adapters, config).detach(), "has no gradient"),
    ],
)
def test_a_term_that_is_none_is_refused(loss: Any, match: str) -> None:
    with tiny.installed(tiny.method("pulled", loss=loss)):
        model = peftcore.apply(tiny.llama(), "pulled")
        with pytest.raises(peftcore.PeftcoreError, match=match):
            peftcore.extra_loss(model)


def test_all_that_trains_is_in_one_group() -> None:
    methods = tiny.method("apart", parameter_groups=apart), tiny.method("train", tiny.PLACES["train"])
    with tiny.installed(*methods):
        model = peftcore.apply(tiny.llama(), "apart")
        peftcore.apply(model, "train", adapter="base", names=("model.norm.weight", "lm_head.weight"))
        groups = peftcore.parameter_groups(model, lr=0.1, weight_decay=0.01)
        own = [p for _, p in adapter_parameters(model, "default")]
        told = [(group["params"], group["lr"], group["weight_decay"]) for group in groups]
        expected = [([own[0]], 1.6, 0.01), ([model.lm_head.weight], 0.1, 0.01)]
        assert [(list(map(id, ps)), *rest) for ps, *rest in told[:2]] == [
            ([id(p) for p in ps], *r) for ps, *r in expected
        ]
        assert {id(p) for p in told[2][0]} == {id(own[1]), id(model.model.norm.weight)} and told[2][1:] == (0.1, 0.0)
        torch.optim.AdamW(groups)
        peftcore.activate(model, ["base"])
        assert len(peftcore.parameter_groups(model, lr=0.1)) == 2


def test_where_nothing_trains_there_are_no_groups(toys: None, tmp_path: Path) -> None:
    peftcore.save(peftcore.apply(tiny.llama(), "around"), tmp_path)
    with pytest.raises(peftcore.PeftcoreError, match=r"the model has no trainable parameters.*trainable=True"):
        peftcore.parameter_groups(peftcore.load(tiny.llama(), tmp_path), lr=1e-3)
    assert peftcore.parameter_groups(peftcore.load(tiny.llama(), tmp_path, trainable=True), lr=1e-3)


def test_a_model_without_adapters_has_no_groups() -> None:
    with pytest.raises(peftcore.PeftcoreError, match="no adapter is applied to this model"):
        peftcore.parameter_groups(tiny.llama(), lr=0.1)


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (
            lambda adapters, *_: [{"params": [a.gain]} for a in [*adapters.values()] * 2],
            "contain 'model.*which already belongs",
        ),
        (lambda adapters, *_: [{"params": [nn.Parameter(torch.ones(1))]}], "not a parameter of the model"),
        (lambda adapters, *_: [[a.gain for a in adapters.values()]], "dictionaries with 'params'"),
    ],
)
def test_wrong_groups_are_refused(groups: Any, match: str) -> None:
    with tiny.installed(tiny.method("grouped", parameter_groups=groups)):
        model = peftcore.apply(tiny.llama(), "grouped")
        with pytest.raises(peftcore.PeftcoreError, match=f"groups of grouped .'default'.*{match}"):
            peftcore.parameter_groups(model, lr=0.1)


NORMS = ("model.layers.0.input_layernorm.weight", "model.norm.weight")


def test_hooks_get_the_base_parameters_that_the_adapter_trains() -> None:
    def initialize(model: nn.Module, adapters: AdapterModules, config: Any, batches: Any) -> None:
        adapters.trained[NORMS[0]].fill_(3.0)

    def groups(adapters: AdapterModules, config: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [adapters.trained[NORMS[0]]], "lr": 10 * lr}]

    def after_step(adapters: AdapterModules, config: Any, step: int, total_steps: int) -> None:
        with torch.no_grad():
            adapters.trained[NORMS[1]].clamp_(max=0.5)

    def loss(adapters: AdapterModules, config: Any) -> Tensor:
        return sum(parameter.sum() for parameter in adapters.trained.values())

    hooks = {"initialize": initialize, "parameter_groups": groups, "after_step": after_step, "loss": loss}
    with tiny.installed(tiny.method("norms", tiny.PLACES["train"], **hooks)):
        model = peftcore.apply(tiny.llama(), "norms", names=NORMS)
        first, last = model.model.layers[0].input_layernorm.weight, model.model.norm.weight
        assert first.eq(3).all() and last.eq(1).all()
        own, rest = peftcore.parameter_groups(model, lr=0.1)
        assert own["lr"] == 1 and own["params"][0] is first and rest["params"][0] is last
        assert peftcore.extra_loss(model).item() == 3 * len(first) + len(last)
        peftcore.after_step(model, 1, 2)
        assert first.eq(3).all() and last.eq(0.5).all()
        peftcore.remove(model)
        assert model.model.layers[0].input_layernorm.weight.eq(1).all() and model.model.norm.weight.eq(1).all()


def test_modules_to_save_are_among_them_and_adapters_keep_their_keys() -> None:
    found = []
    with tiny.installed(tiny.method("around", after_step=lambda adapters, *_: found.append(adapters))):
        model = peftcore.apply(tiny.llama(), "around")
        peftcore.apply(model, "lora", adapter="head", target_modules=["q_proj"], modules_to_save=["lm_head"])
        peftcore.after_step(model, 1, 2)
        assert found[0].trained == {} and len(found[0]) == 2
        adapters = method_modules(model, "head")
        assert adapters.trained == {"lm_head.weight": model.lm_head.weight}
        assert list(adapters) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


@dataclass(frozen=True)
class LayersInTurnConfig:
    """Train `layers` random layers at a time, and choose again every `interval` steps (LISA, arXiv 2403.17919)."""

    layers: int = 1
    interval: int = 2
    seed: int = 0


def place_layers(model: nn.Module, config: LayersInTurnConfig, architecture: Architecture) -> list[Placement]:
    return [Train([name for name, parameter in targets.base_parameters(model) if parameter.is_floating_point()])]


def choose_layers(adapters: AdapterModules, config: LayersInTurnConfig, step: int, total_steps: int) -> None:
    numbers = {name: re.search(r"[.](\d+)[.]", name) for name in adapters.trained}
    count = 1 + max(int(number[1]) for number in numbers.values() if number)
    generator = torch.Generator().manual_seed(config.seed + step // config.interval)
    chosen = torch.randperm(count, generator=generator)[: config.layers].tolist()
    for name, parameter in adapters.trained.items():
        number = numbers[name]
        parameter.requires_grad_(number is None or int(number[1]) in chosen)


LAYERS_IN_TURN = Method(
    "layers-in-turn", LayersInTurnConfig, place_layers, StateRules("LAYERS_IN_TURN"), after_step=choose_layers
)


def test_layers_in_turn() -> None:
    trained = []
    with tiny.installed(LAYERS_IN_TURN):
        model = peftcore.apply(tiny.llama(), "layers-in-turn")
        optimizer = torch.optim.AdamW(peftcore.parameter_groups(model, lr=1e-2))
        for step in range(1, 9):
            before = {name: parameter.clone() for name, parameter in model.named_parameters()}
            optimizer.zero_grad()
            model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss.backward()
            optimizer.step()
            peftcore.after_step(model, step, 8)
            moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
            assert "lm_head.weight" in moved
            trained.append({int(name.split(".")[2]) for name in moved if ".layers." in name})
        # The first choice is made after the first step, a later one after every second.
        assert trained == [{0, 1}, {0}, {1}, {1}, {0}, {0}, {0}, {0}]


def test_layers_in_turn_pass_the_conformance_suite() -> None:
    reasons = {
        "resume is exact": "which layers train is not saved: all do in the first step after resuming",
        "a file of a dense base on a quantized one (NF4), and the reverse": "it trains the weights that NF4 packs",
    }
    with tiny.installed(LAYERS_IN_TURN):
        check_method(LayersInTurnConfig(), families=["Llama"], not_applicable=reasons)
