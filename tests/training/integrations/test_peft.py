"""PEFT beside adapters of peftcore: refused, and left alone where there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import fresh_process, tiny

import peftcore

CODE = """
import torch, peftcore
from support import tiny
model = peftcore.apply(tiny.llama(), "lora", r=2)
import peft
try:
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
except peftcore.PeftcoreError as error:
    print(error)
"""


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.mark.parametrize("kind", ["lora", "prompt", "mixed", "inject"])
def test_a_model_with_adapters_is_refused(kind: str, peft: Any) -> None:
    model = peftcore.apply(tiny.llama(), "lora", r=2)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    config = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(peftcore.PeftcoreError, match=r"because it has peftcore's adapters default. Add another"):
        match kind:
            case "inject":
                peft.inject_adapter_in_model(config, model)
            case "prompt":
                peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
            case _:
                peft.get_peft_model(model, config, mixed=kind == "mixed")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers has deprecated
def test_a_model_without_is_not(peft: Any) -> None:
    model = peftcore.remove(peftcore.apply(tiny.llama(), "lora", r=2))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert isinstance(wrapped, peft.PeftModel)
    assert torch.isfinite(wrapped(input_ids=torch.arange(3, 9)[None]).logits).all()


def test_peft_that_is_imported_after_apply(peft: Any) -> None:
    folder = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {folder!r})\n{CODE}"
    done = fresh_process.run(code)
    assert done.stdout.startswith("PEFT cannot adapt LlamaForCausalLM"), done.stderr
