"""`Method.initialize`: first values from the base or from data; whatever happens, the base is as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_modules
from peftcore.plugin import run

BATCHES = [{"input_ids": tiny.TOKENS + i, "labels": tiny.TOKENS + i} for i in range(3)]


def everything(model: nn.Module) -> dict[str, Any]:
    """All that must be as it was: tensors, flags, classes, modes, the next random number."""
    facts = {name: (type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    flags = {name: (t.requires_grad, t.grad is None or t.grad.sum().item()) for name, t in tensors.items()}
    return {"facts": facts, "flags": flags, "random": torch.get_rng_state().tolist(), "tensors": tensors}


def same(found: dict[str, Any], before: dict[str, Any], values: dict[str, Tensor]) -> bool:
    return (
        all(found[key] == before[key] for key in ("facts", "flags", "random"))
        and all(found["tensors"][name] is tensor for name, tensor in before["tensors"].items())
        and all(torch.equal(found["tensors"][name], value) for name, value in values.items())
    )


def from_data(model: nn.Module, adapters: Any, config: Any, batches: Any) -> None:
    """The gain is the mean square of the inputs of the layer."""
    if batches is None:
        raise peftcore.PeftcoreError("from-data needs batches: apply(..., batches=...)")
    sums = dict.fromkeys(adapters, 0.0)

    def add(path: str, x: Tensor, batch: Any) -> None:
        assert not x.requires_grad and not model.training
        sums[path] += x.square().mean() / len(BATCHES)

    peftcore.model.inputs_of(model, adapters, batches, add)
    torch.rand(7)
    for path, adapter in adapters.items():
        adapter.gain.copy_(sums[path])


def test_values_come_from_data_and_the_base_is_left(tmp_path: Path) -> None:
    base = tiny.llama().train()
    base.lm_head.weight.grad = torch.ones_like(base.lm_head.weight)
    model, seen = copy.deepcopy(base), {}
    model.lm_head.weight.grad = base.lm_head.weight.grad.clone()
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"):
        base.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.setdefault(path, []).append(args[0].square().mean().item())
        )
    for batch in BATCHES:
        base.eval()(**batch)
    with tiny.installed(tiny.method("from-data", initialize=from_data)):
        state, random = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
        peftcore.apply(model, "from-data", batches=iter(BATCHES))
        assert torch.equal(torch.get_rng_state(), random) and model.training
        assert model.lm_head.weight.grad.eq(1).all()
        assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in state.items())
        gains = {path: adapter.gain.item() for path, adapter in adapter_modules(model, "default")}
        assert gains == {path: pytest.approx(sum(values) / 3, abs=1e-6) for path, values in seen.items()}
        assert all(p.requires_grad for _, adapter in adapter_modules(model, "default") for p in adapter.parameters())
        peftcore.save(model, tmp_path)
        loaded = peftcore.load(tiny.llama(), tmp_path)  # needs no batches
        assert {path: adapter.gain.item() for path, adapter in adapter_modules(loaded, "default")} == gains
        other = peftcore.apply(tiny.llama(), "from-data", batches=BATCHES, adapter="first")
        peftcore.apply(other, "from-data", batches=BATCHES, adapter="second")  # on what the first one computes
        second = {path: adapter.gain.item() for path, adapter in adapter_modules(other, "second")}
        first, last = gains
        assert second[first] == gains[first] and second[last] != gains[last]


def failing(model: nn.Module, adapters: Any, config: Any, batches: Any) -> None:
    model.train()  # which moves the statistics of a BatchNorm
    parameter = next(model.parameters()).requires_grad_(True)
    with torch.enable_grad():
        output = model(**BATCHES[0]).logits if hasattr(model, "config") else model(tiny.IMAGES)
        output.sum().backward()
    parameter.requires_grad_(False)
    torch.rand(3)
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [tiny.llama, tiny.batchnorm_net])
@pytest.mark.parametrize("there", [False, True])
def test_where_it_fails_the_model_is_as_it_was(kind: Any, there: bool) -> None:
    model = kind().train()
    target = "head" if kind is tiny.batchnorm_net else "q_proj"
    with tiny.installed(tiny.method("failing", initialize=failing), tiny.method("around")):
        if there:
            peftcore.apply(model, "around", adapter="first", target_modules=(target,))
        before = everything(model)
        values = {name: tensor.clone() for name, tensor in before["tensors"].items()}
        with pytest.raises(KeyboardInterrupt):
            peftcore.apply(model, "failing", target_modules=(target,))
        after = everything(model)
        assert same(after, before, values)


def test_statistics_do_not_move() -> None:
    def moving(model: nn.Module, adapters: Any, config: Any, batches: Any) -> None:
        model.train()
        model(tiny.IMAGES)

    model = tiny.batchnorm_net()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with tiny.installed(tiny.method("moving", initialize=moving)):
        peftcore.apply(model, "moving", target_modules=("head",))
        assert not model.norm.training
        peftcore.remove(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_problem_type_that_labels_imply_is_not_kept() -> None:
    def labelled(model: nn.Module, adapters: Any, config: Any, batches: Any) -> None:
        peftcore.model.run(model, batches[0])
        assert model.config.problem_type == "single_label_classification"

    model = tiny.bert_classifier()
    with tiny.installed(tiny.method("labelled", initialize=labelled)):
        batch = {"input_ids": tiny.TOKENS, "labels": torch.zeros(len(tiny.TOKENS), dtype=torch.long)}
        peftcore.apply(model, "labelled", target_modules=("query",), batches=[batch])
        assert model.config.problem_type is None


def broken(model: nn.Module, adapters: Any, config: Any, batches: Any) -> None:
    next(iter(adapters.values())).gain.fill_(float("nan"))


def greedy(model: nn.Module, adapters: Any, config: Any, batches: Any) -> None:
    model.model.norm.weight.mul_(2)
    if batches:
        raise ValueError("and it fails")


@pytest.mark.parametrize(
    ("initialize", "batches", "match"),
    [
        (from_data, None, "needs batches"),
        (from_data, [], "`batches` is empty"),
        (from_data, ["text"], "a batch must be a mapping .* found 'text'"),
        (broken, None, r"it initialised 'model.layers.0.self_attn.q_proj.gain' with NaN or Inf"),
        (greedy, None, "it has changed the base tensor 'model.norm.weight'"),
        (greedy, BATCHES, "it has changed the base tensor 'model.norm.weight'"),
        (None, BATCHES, "it does not initialise from data, but batches were passed. Leave batches out"),
    ],
)
def test_what_is_wrong_is_said(initialize: Any, batches: Any, match: str) -> None:
    with tiny.installed(tiny.method("it", initialize=initialize)):
        model = tiny.llama()
        before = everything(model)
        with pytest.raises(peftcore.PeftcoreError, match=match):
            peftcore.apply(model, "it", batches=batches)
        assert same(everything(model), before, {})


def test_a_method_that_prepares_for_another_has_its_first_values() -> None:
    told = []
    initialize = lambda model, adapters, config, batches: told.append((type(config), batches))  # noqa: E731
    plain = tiny.method("plain", initialize=initialize)
    record = lambda config: plain.config_class(config.target_modules)  # noqa: E731
    with tiny.installed(plain, tiny.method("prepared", recorded_as=record)):
        assert peftcore.engine.takes_batches("prepared", {}) and peftcore.engine.takes_batches("plain", {})
        peftcore.apply(tiny.llama(), "prepared", batches=BATCHES)
    assert told == [(plain.config_class, BATCHES)]


def test_batches_reach_the_method_with_all_their_columns() -> None:
    """A method that needs a column which the model does not take, such as marks of true answers, takes it out."""

    def from_marked_rows(model: nn.Module, adapters: Any, config: Any, batches: Any) -> None:
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "is_true"}
            logits = run(model, inputs).logits[batch["is_true"]]
            for adapter in adapters.values():
                adapter.gain.copy_(logits.square().mean())

    marked = {**BATCHES[0], "is_true": torch.tensor([True, False])}
    with tiny.installed(tiny.method("from-marked", initialize=from_marked_rows)):
        model = peftcore.apply(tiny.llama(), "from-marked", batches=[marked])
    expected = tiny.llama()(**BATCHES[0]).logits[0].square().mean()
    for _, adapter in adapter_modules(model, "default"):
        torch.testing.assert_close(adapter.gain.detach(), expected.detach())
