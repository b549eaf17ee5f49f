"""How many Python calls an action takes, by `benchmarks/trace.py`: an eighth more than its limit is a regression."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import peftcore


@pytest.fixture(scope="module")
def trace() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "trace.py"
    spec = importlib.util.spec_from_file_location("benchmarks_trace", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@torch.no_grad()
def test_apply_forward_and_merge_stay_short(trace: ModuleType) -> None:
    for _ in range(2):  # the second time is warm
        model = trace.llama()
        actions = {
            "apply": lambda model=model: peftcore.apply(model, "lora", target_modules=trace.TARGETS),
            "forward": lambda model=model: model(trace.TOKENS),
            "merge": lambda model=model: peftcore.merge(model),
        }
        found = trace.traced(actions, "/peftcore/", "/peftcore_lora/")
    calls = {name: each.counts()[0] for name, each in found.items()}
    assert {name: count for name, count in calls.items() if count > 1.125 * trace.LIMITS[name][0]} == {}


def test_a_forward_pre_hook_that_returns_nothing_may_activate(trace: ModuleType) -> None:
    model = peftcore.apply(trace.llama(), "lora", target_modules=["q_proj"])
    torch.nn.init.ones_(model.model.layers[0].self_attn.q_proj.peftcore["default"].lora_B)
    adapted = model(trace.TOKENS).logits
    peftcore.activate(model, [])
    assert not torch.equal(model(trace.TOKENS).logits, adapted)

    def activated(module: torch.nn.Module, _args: object) -> None:
        peftcore.activate(module, "default")

    model.register_forward_pre_hook(activated)
    torch.testing.assert_close(model(trace.TOKENS).logits, adapted)
