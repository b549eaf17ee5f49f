"""An error that a method's function raises names the plugin, its distribution and the function."""

import dataclasses

import pytest
import torch
from support import mixtures, tiny

import peftcore
from peftcore.plugin import Around, OnWeight, StateRules
from peftcore.plugin.registry import registry


def raising(*_):
    raise KeyError("vision_config")


def refusing(*_):
    raise peftcore.PeftcoreError("it has no attention")


def named(function: str) -> str:
    return rf"^`{function}` of the plugin 'faulty' \(peftcore-faulty 1.0\) failed: KeyError: 'vision_config'$"


@pytest.mark.parametrize("function", ["place", "initialize", "prepare"])
def test_functions_that_apply_calls(function: str) -> None:
    method = dataclasses.replace(tiny.method("faulty"), **{function: raising})
    with tiny.installed(method):
        model = tiny.llama()
        before = tiny.logits(model)
        with pytest.raises(peftcore.PluginError, match=named(function)) as found:
            peftcore.apply(model, "faulty")
        assert isinstance(found.value.__cause__, KeyError)
        assert torch.equal(tiny.logits(model), before)


def test_resolved() -> None:
    method = tiny.method("faulty")
    method.config_class.resolved = raising
    with tiny.installed(method), pytest.raises(peftcore.PluginError, match=named("resolved")):
        peftcore.apply(tiny.llama(), "faulty")


@pytest.mark.parametrize("function", ["loss", "after_step", "parameter_groups"])
def test_functions_that_training_calls(function: str) -> None:
    with tiny.installed(tiny.method("faulty", **{function: raising})):
        model = peftcore.apply(tiny.llama(), "faulty")
        calls = {
            "loss": lambda: peftcore.extra_loss(model),
            "after_step": lambda: peftcore.after_step(model, 1, 2),
            "parameter_groups": lambda: peftcore.parameter_groups(model, lr=1e-3),
        }
        with pytest.raises(peftcore.PluginError, match=named(function)):
            calls[function]()


@pytest.mark.parametrize("function", ["write", "export", "tensor_name"])
def test_functions_that_save_calls(tmp_path, function: str) -> None:
    state = StateRules(peft_type="FAULTY", **{function: raising})
    with tiny.installed(tiny.method("faulty", state=state)):
        model = peftcore.apply(tiny.llama(), "faulty")
        with pytest.raises(peftcore.PluginError, match=named(function)):
            peftcore.save(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        if function == "write":
            with pytest.raises(peftcore.PluginError, match=named(function)):
                peftcore.state_dict(model, "default")


class Faulty(tiny.Scaled):
    """Its factors may be had or not."""

    def merged(self, weight, bias):
        raising()


class FaultyFactors(tiny.Scaled):
    def low_rank(self):
        raising()


def placing(adapter: type[tiny.Scaled]):
    return lambda model, config, architecture: [Around("model.layers.0.self_attn.q_proj", adapter(1.5))]


def test_merging() -> None:
    with tiny.installed(tiny.method("faulty", placing(Faulty))):
        model = peftcore.apply(tiny.llama(), "faulty")
        wanted = tiny.logits(model)
        for merge in (peftcore.merge, peftcore.merge_error):
            with pytest.raises(peftcore.PluginError, match=named("merged")):
                merge(model)
        with pytest.raises(peftcore.PluginError, match=named("merged")):
            peftcore.convert(model, "default", method="lora", r=2)
        assert torch.equal(tiny.logits(model), wanted)


def test_merging_of_a_changed_parameter() -> None:
    class Change(tiny.LowRank):
        forward = raising

    def place(model, config, architecture):
        path = "model.layers.0.self_attn.q_proj"
        return [OnWeight(path, "weight", Change(*model.get_submodule(path).weight.shape))]

    with tiny.installed(tiny.method("faulty", place)):
        model = peftcore.apply(tiny.llama(), "faulty")
        with pytest.raises(peftcore.PluginError, match=named("forward")):
            peftcore.merge(model, undo=True)


def test_merging_of_experts_one_by_one() -> None:
    def place(model, config, architecture):
        experts = model.get_submodule("model.layers.0.mlp.experts")
        paths = [f"model.layers.0.mlp.experts.{i}.down_proj" for i in range(len(experts.down_proj))]
        return [Around(path, Faulty(1.5)) for path in paths]

    with tiny.installed(tiny.method("faulty", place)):
        model = peftcore.apply(mixtures.mixture("mixtral"), "faulty")
        with pytest.raises(peftcore.PluginError, match=named("merged")):
            peftcore.merge(model, undo=True)


def test_factors() -> None:
    with tiny.installed(tiny.method("faulty", placing(FaultyFactors))):
        model = peftcore.apply(tiny.llama(), "faulty")
        with pytest.raises(peftcore.PluginError, match=named("low_rank")):
            peftcore.convert(model, "default", method="lora", r=2)


def test_a_methods_own_refusal_is_its_word() -> None:
    refused = pytest.raises(peftcore.PeftcoreError, match=r"^it has no attention$")
    with tiny.installed(tiny.method("faulty", place=refusing)), refused as found:
        peftcore.apply(tiny.llama(), "faulty")
    assert type(found.value) is peftcore.PeftcoreError


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of 2 GiB"), MemoryError(), UserWarning("odd")])
def test_a_lack_of_memory_and_warnings_pass(error: Exception) -> None:
    with pytest.raises(type(error)), registry.naming("faulty", "place"):
        raise error
