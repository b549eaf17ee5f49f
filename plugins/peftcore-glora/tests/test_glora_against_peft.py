"""Hugging Face PEFT loads adapters saved here, and vice versa, in each form; invalid configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.against_peft import TASKS, both_ways, quiet
from support.whole_run import nightly_but

import peftcore

TARGETS = {"llama": ["k_proj", "v_proj", "down_proj"], "bert": ["key", "output.dense"]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 3},
    "vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    "constants": {"config_A_B": "constant", "config_C": "none", "config_D_E": "constant"},
    "weights alone": {"config_C": "none", "config_D_E": "none", "r": 2},
    "drawn": {"init_weights": False, "config_D_E": "vector", "r": 2},
    "biases too": {"bias": "glora_only", "r": 2},
}


@pytest.mark.parametrize("kind", nightly_but(TARGETS, ["bert"]))
@pytest.mark.parametrize("case", list(CASES))
def test_files(case: str, kind: str, tmp_path: Path) -> None:
    fields = {"target_modules": TARGETS[kind], **CASES[case]}
    config = peft.GloraConfig(task_type=TASKS[kind], **fields)
    both_ways(tiny.MODELS[kind], tmp_path, peftcore.apply(tiny.MODELS[kind](), "glora", **fields), config)


def test_biases_alone(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["key"], "config_A_B": "none", "config_C": "vector"}
    model = peftcore.apply(tiny.MODELS["bert"](), "glora", **fields)
    both_ways(tiny.MODELS["bert"], tmp_path, model, peft.GloraConfig(task_type="SEQ_CLS", **fields))


@pytest.mark.parametrize("case", list(CASES))
def test_it_starts_as_peft_s(case: str, tmp_path: Path) -> None:
    """Tensors of the same names, shapes and widths, but for the zeros that PEFT writes."""
    fields = {"target_modules": TARGETS["bert"], **CASES[case]}
    torch.manual_seed(0)
    config = peft.GloraConfig(task_type="SEQ_CLS", **fields)
    peft_state = peft.get_peft_model_state_dict(quiet(peft.get_peft_model, tiny.MODELS["bert"](), config))
    expected = {name: t for name, t in peft_state.items() if ".glora_" in name and not name.endswith(".zeros")}
    model = peftcore.apply(tiny.MODELS["bert"](), "glora", **fields)
    tensors = load_file(peftcore.save(model, tmp_path) / "adapter_model.safetensors")
    actual = {name: t for name, t in tensors.items() if ".glora_" in name}
    assert {name: t.shape for name, t in actual.items()} == {name: t.shape for name, t in expected.items()}
    for kind in {name.partition(".glora_")[2] for name in actual}:
        initial, peft_initial = (
            torch.cat([t.flatten() for n, t in s.items() if n.endswith(kind)]) for s in (actual, expected)
        )
        assert bool(initial.any()) == bool(peft_initial.any())
        if len(initial) > 60:
            assert float(initial.std()) == pytest.approx(float(peft_initial.std()), rel=0.4)


def test_what_does_not_fit_is_refused() -> None:
    def refused(match: str, make: Any = tiny.llama, **fields: Any) -> None:
        with pytest.raises(peftcore.PeftcoreError, match=match):
            peftcore.apply(make(), "glora", **fields)

    refused("are all 'none': nothing would be trained", config_A_B="none", config_C="none", config_D_E="none")
    refused("has no bias, and config_A_B is 'none'", config_A_B="none")
    refused("r must be", r=0)
    refused(r"'0' matches Conv2d .* which this method cannot adapt", tiny.convnet, target_modules=["0"])
