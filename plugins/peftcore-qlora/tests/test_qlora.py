"""What QLoRA does to the base, what it records and saves, and its losses beside PEFT on bitsandbytes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peftcore_lora import LoraConfig
from peftcore_qlora import QLoraConfig
from support import tiny
from support.quantized import INPUTS, llama, logits, of_bnb
from torch import nn

import peftcore
from peftcore.engine import adapter_parameters, applied
from peftcore.plugin import disturb
from peftcore.quantization import QuantizedLinear, quantized_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def kinds(model: nn.Module) -> set[str]:
    return {path for path, _ in quantized_layers(model)}


def test_apply_quantizes_the_base_and_places_lora() -> None:
    model = peftcore.apply(llama(), "qlora", r=4)
    assert len(kinds(model)) == 14 and not isinstance(model.lm_head, QuantizedLinear)
    assert applied(model, "default").method == "lora" and type(applied(model, "default").config) is LoraConfig
    assert applied(model, "default").config.r == 4
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 28 and all("lora_" in name for name in trained)
    same = peftcore.apply(peftcore.quantize(llama()), "lora", r=4)
    torch.manual_seed(0)
    assert torch.equal(logits(model), logits(same))


def test_plan_leaves_the_model_alone() -> None:
    model = llama()
    plan = peftcore.plan(model, "qlora", r=4)
    assert not kinds(model) and plan.method == "qlora"
    assert plan.trainable_parameters == peftcore.plan(model, "lora", r=4).trainable_parameters


def test_a_wrong_config_leaves_the_base_dense() -> None:
    model = llama()
    with pytest.raises(peftcore.PeftcoreError, match="matches no module"):
        peftcore.apply(model, "qlora", target_modules=["q_projs"])
    with pytest.raises(peftcore.PeftcoreError, match="skip: 'heads' matches no module"):
        peftcore.apply(model, "qlora", skip=["heads"])
    assert not kinds(model) and peftcore.engine.state_of(model) is None
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_type": "int4"}, "unknown quant_type 'int4'. Choose one of: nf4, fp4"),
        ({"blocksize": 100}, "a power of two from 32 to 4096, found 100"),
        ({"compute_dtype": "int8"}, "compute_dtype must be None, 'float32', 'bfloat16' or 'float16', found 'int8'"),
        ({"r": 0}, "r must be a positive whole number"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.apply(llama(), "qlora", **fields)


def test_how_the_base_is_quantized() -> None:
    fields = {"quant_type": "fp4", "double_quant": False, "blocksize": 128, "compute_dtype": "bfloat16"}
    model = peftcore.apply(llama(), "qlora", skip=["mlp", "lm_head"], **fields)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.quant_type, layer.blocksize, layer.compute_dtype) == ("fp4", 128, torch.bfloat16)
    assert layer.nested_absmax is None and len(kinds(model)) == 8


def test_a_quantized_base_is_taken_as_it_is() -> None:
    model = peftcore.quantize(llama(), blocksize=128, skip=["mlp", "lm_head"])
    weight = model.model.layers[0].self_attn.q_proj.weight
    peftcore.apply(model, "qlora", r=4)
    assert model.model.layers[0].self_attn.q_proj.weight is weight and len(kinds(model)) == 8
    peftcore.apply(model, "qlora", r=2, adapter="second")
    peftcore.remove(model, "second")
    peftcore.remove(model)
    assert type(model.model.layers[0].self_attn.q_proj) is QuantizedLinear


def test_what_is_trained_whole_stays_dense() -> None:
    model = peftcore.apply(llama(), "qlora", r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    assert not any("down_proj" in path for path in kinds(model)) and len(kinds(model)) == 12
    model = peftcore.apply(tiny.bert_classifier(), "qlora", r=4)
    assert not isinstance(model.classifier, QuantizedLinear) and model.classifier.weight.requires_grad


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # PEFT asks for it
def test_the_file_is_a_lora_adapter(tmp_path: Path) -> None:
    model = peftcore.apply(llama(), "qlora", r=4, lora_alpha=8)
    disturb(model, "default", 1)
    peftcore.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and "double_quant" not in config
    expected = logits(model)
    for base in (peftcore.quantize(llama()), llama()):
        peftcore.load(base, tmp_path)
        assert applied(base, "default").method == "lora"
        near = (logits(base) - expected).norm() / expected.norm()
        assert near == 0 if kinds(base) else 0 < near < 0.3
    dense = peft.PeftModel.from_pretrained(llama(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(dense(**INPUTS).logits, logits(base), rtol=1e-4, atol=1e-5)


def test_of_two_methods_one_reads_the_files() -> None:
    from peftcore.plugin.peft_fields import method_of_fields
    from peftcore.plugin.registry import registry

    assert method_of_fields("a file", {"peft_type": "LORA"}).name == "lora"
    assert registry.method_of_config(QLoraConfig()).name == "qlora"


def peft_on_bitsandbytes(**fields: Any) -> nn.Module:
    model = llama()
    for path in kinds(peftcore.quantize(llama())):
        model.set_submodule(path, of_bnb(model.get_submodule(path)))
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))


def losses(model: nn.Module, steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    actual = []
    for step in range(steps):
        tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(step % 4))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        actual.append(loss.item())
    return actual


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_the_losses_are_those_of_peft_on_bitsandbytes() -> None:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    peft_model = peft_on_bitsandbytes(**fields).train()
    model = peftcore.apply(llama(), "qlora", **fields).train()
    start = {name.replace(".default.weight", ""): p for name, p in peft_model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, "default"):
            parameter.copy_(start[f"base_model.model.{name}"])
    expected, actual = losses(peft_model), losses(model)
    assert expected[-1] < 0.95 * expected[0]
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-2, atol=0)


def test_a_field_that_no_method_has_is_not_taken_for_one_of_lora() -> None:
    with pytest.raises(peftcore.PeftcoreError) as actual:
        peftcore.config("qlora", optim="paged_adamw_8bit")
    assert "QLoraConfig has no field 'optim'. Its fields are: " in str(actual.value)
    with pytest.raises(peftcore.PeftcoreError, match=r"'use_dora'.*It belongs to the method 'dora'"):
        peftcore.config("qlora", use_dora=True)
