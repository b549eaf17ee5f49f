"""transformers' own calls for adapters, by peftcore."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import quantized
import torch
from commands import save_tokenizer
from safetensors.torch import load_file
from whole import nightly_but

import peftcore
from peftcore.integrations import adapter_methods


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    quantized.llama(eos_token_id=2).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """The folder of an adapter with values."""
    model = quantized.llama(eos_token_id=2)
    model.config._name_or_path = str(base)
    quantized.moved(peftcore.apply(model, "lora", r=2))
    return peftcore.save(model, base / "adapter")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model without adapters, as if PEFT were not installed."""
    monkeypatch.setattr(adapter_methods, "is_peft_available", lambda: False)
    return quantized.llama(eos_token_id=2)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**quantized.INPUTS).logits


def wanted(adapter: Path) -> torch.Tensor:
    return logits(peftcore.load(quantized.llama(eos_token_id=2), adapter).eval())


def test_load_adapter(model: Any, adapter: Path) -> None:
    before = logits(model)
    report = model.train().load_adapter(str(adapter))
    assert not model.training and not report.missing_keys and not report.unexpected_keys
    assert torch.equal(logits(model), wanted(adapter)) and not torch.equal(logits(model), before)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.active_adapters() == ["default"]
    model.load_adapter(adapter, "second", is_trainable=True)
    assert model.active_adapters() == ["second"]  # alone, as with PEFT
    assert torch.equal(logits(model), wanted(adapter)) and any(p.requires_grad for p in model.parameters())
    model.disable_adapters()
    model.load_adapter(adapter, "third")
    assert torch.equal(logits(model), before) and model.active_adapters() == ["third"]
    with pytest.raises(peftcore.PeftcoreError, match="'second'"):
        model.load_adapter(adapter, "second")


def test_the_subfolder_and_options_of_the_hub(model: Any, base: Path, adapter: Path) -> None:
    model.load_adapter(base, adapter_kwargs={"subfolder": "adapter", "token": "t"})
    assert torch.equal(logits(model), wanted(adapter))
    match = "'org/none' is not a folder, and token cannot be used to download it. Download it with huggingface_hub"
    with pytest.raises(peftcore.PeftcoreError, match=match):
        model.load_adapter("org/none", "other", adapter_kwargs={"token": "t"})
    with pytest.raises(peftcore.PeftcoreError, match="load_adapter needs a folder"):
        model.load_adapter()


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_an_adapter_in_memory(prefix: str, model: Any, adapter: Path) -> None:
    fields = json.loads((adapter / "adapter_config.json").read_text())
    file = load_file(adapter / "adapter_model.safetensors")
    tensors = {prefix + name.removeprefix("base_model.model."): tensor for name, tensor in file.items()}
    model.load_adapter(peft_config=fields, adapter_state_dict=tensors)
    assert torch.equal(logits(model), wanted(adapter))
    read = model.get_adapter_state_dict()
    assert read.keys() == {name.removeprefix("base_model.model.") for name in file}
    assert all(torch.equal(read[name.removeprefix("base_model.model.")], tensor) for name, tensor in file.items())
    with pytest.raises(peftcore.PeftcoreError, match="needs both peft_config"):
        model.load_adapter(peft_config=fields)


@pytest.mark.parametrize("enabled", [True, False])
def test_hotswap(enabled: bool, model: Any, adapter: Path) -> None:
    if enabled:
        model.enable_peft_hotswap(target_rank=2)
    quantized.moved(peftcore.apply(model, "lora", r=2))
    module = model.model.layers[0].self_attn.q_proj
    model.load_adapter(adapter, **({} if enabled else {"adapter_name": "default", "hotswap": True}))
    assert torch.equal(logits(model), wanted(adapter)) and model.model.layers[0].self_attn.q_proj is module


def test_add_set_disable_enable_delete(model: Any) -> None:
    before = logits(model)
    for name in ("a", "b"):
        model.add_adapter(peftcore.config("lora", r=2), name)
        quantized.moved(model)
    assert model.active_adapters() == ["b"]
    b = logits(model)
    model.set_adapter("a")
    a = logits(model)
    model.set_adapter(["a", "b"])
    assert len({tuple(each.flatten().tolist()) for each in (before, a, b, logits(model))}) == 4
    model.set_adapter("a")
    model.disable_adapters()
    assert torch.equal(logits(model), before) and model.active_adapters() == ["a"]
    model.set_adapter("b")
    assert torch.equal(logits(model), before) and model.active_adapters() == ["b"]  # still disabled, as with PEFT
    model.enable_adapters()
    assert torch.equal(logits(model), b)
    with pytest.raises(peftcore.PeftcoreError, match="'none'"):
        model.delete_adapter(["a", "none"])
    with pytest.warns(UserWarning, match="the active adapter was deleted; 'a' is active now"):
        model.delete_adapter("b")
    assert torch.equal(logits(model), a)
    model.delete_adapter("a")
    assert torch.equal(logits(model), before)
    with pytest.raises(peftcore.PeftcoreError, match="no adapter is applied to this model"):
        model.active_adapters()


def test_adapters_that_leave_the_memory_while_they_are_disabled(model: Any, adapter: Path) -> None:
    for name in ("a", "b", "c"):
        peftcore.load(model, adapter, adapter=name, resident=False)
    model.set_adapter("a")
    model.disable_adapters()
    peftcore.set_resident_limit(model, 0)
    assert not peftcore.engine.require_state(model).applied and model.active_adapters() == ["a"]
    peftcore.set_resident_limit(model, None)
    model.enable_adapters()
    assert model.active_adapters() == ["a"] and torch.equal(logits(model), wanted(adapter))
    model.set_adapter(["a", "b"])
    model.disable_adapters()
    model.delete_adapter("a")
    assert model.active_adapters() == ["b"]
    model.enable_adapters()
    assert model.active_adapters() == ["b"] and torch.equal(logits(model), wanted(adapter))


def test_adapters_of_single_samples_are_not_disabled(model: Any, adapter: Path) -> None:
    peftcore.load(model, adapter, adapter="a")
    peftcore.activate(model.eval(), ["a", None], per_sample=True)
    match = "cannot disable adapters while each sample has its own adapter"
    with pytest.raises(peftcore.PeftcoreError, match=match):  # enabled again, they would act on all samples
        model.disable_adapters()
    assert peftcore.engine.require_state(model).samples == ("a", None)


def test_the_parameters_that_train(model: Any) -> None:
    model.add_adapter(peftcore.config("lora", r=2), "a")
    model.add_adapter(peftcore.config("lora", r=2), "b")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for _, p in peftcore.engine.adapter_parameters(model, "b")}
    model.disable_adapters()
    assert not any(p.requires_grad for p in model.parameters())
    model.enable_adapters()
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_where_peft_is_installed() -> None:
    """A model with adapters of peftcore never reaches PEFT; others do, except with a config of peftcore."""
    pytest.importorskip("peft")
    ours = quantized.llama()
    ours.add_adapter(peftcore.config("lora", r=2))
    assert ours.active_adapters() == ["default"]
    ours.disable_adapters()
    ours.delete_adapter("default")
    with pytest.raises(ValueError, match=r"No adapter loaded|PEFT you are using is not compatible"):
        ours.set_adapter("default")


WITHOUT = """
import sys
sys.modules["peft"] = None
sys.path[:0] = sys.argv[1].split(":")
{order}
from pathlib import Path
import torch, quantized
from transformers import AutoModelForCausalLM, LlamaForCausalLM, pipeline
from test_adapter_methods import logits, wanted
folder = sys.argv[2]
for each in (AutoModelForCausalLM, LlamaForCausalLM):
    model, report = each.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert torch.equal(logits(model), wanted(Path(folder))), each
    assert not report["missing_keys"] and not report["unexpected_keys"]
assert model.active_adapters() == ["default"]
pipe = pipeline("text-generation", model=folder, dtype=torch.float32)
assert torch.equal(logits(pipe.model), logits(model))
print(pipe("the film is", max_new_tokens=2)[0]["generated_text"])
plain = AutoModelForCausalLM.from_pretrained(str(Path(folder).parent))
assert not peftcore.engine.state_of(plain)
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[3])
except peftcore.PeftcoreError as error:
    print(error)
"""
ORDERS = ["import peftcore", "import transformers.pipelines, peftcore"]


@pytest.mark.parametrize("order", nightly_but(ORDERS, ORDERS[1:]))
def test_where_peft_is_not_installed(order: str, adapter: Path, tmp_path: Path) -> None:
    nameless = shutil.copytree(adapter, tmp_path / "nameless")
    (nameless / "peftcore_manifest.json").unlink()
    fields = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    here = Path(__file__).parent
    code = WITHOUT.format(order=order)
    done = fresh_process.run(code, f"{here}:{here.parent}", str(adapter), str(nameless))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the film is" in done.stdout and "does not name its base model" in done.stdout
