"""An error that a method's function raises names the plugin, its distribution and the function."""

import dataclasses

import pytest
import tiny
import torch

import peftcore
from peftcore.registry import registry


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


@pytest.mark.parametrize("function", ["write_config", "write_tensors", "exported", "tensor_name"])
def test_functions_that_save_calls(tmp_path, function: str) -> None:
    state = peftcore.StateRules(peft_type="FAULTY", **{function: raising})
    with tiny.installed(tiny.method("faulty", state=state)):
        model = peftcore.apply(tiny.llama(), "faulty")
        with pytest.raises(peftcore.PluginError, match=named(function)):
            peftcore.save(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        if function == "write_tensors":
            with pytest.raises(peftcore.PluginError, match=named(function)):
                peftcore.state_dict(model, "default")


def test_a_methods_own_refusal_is_its_word() -> None:
    refused = pytest.raises(peftcore.PeftcoreError, match=r"^it has no attention$")
    with tiny.installed(tiny.method("faulty", place=refusing)), refused as found:
        peftcore.apply(tiny.llama(), "faulty")
    assert type(found.value) is peftcore.PeftcoreError


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of 2 GiB"), MemoryError(), UserWarning("odd")])
def test_a_lack_of_memory_and_warnings_pass(error: Exception) -> None:
    with pytest.raises(type(error)), registry.naming("faulty", "place"):
        raise error
