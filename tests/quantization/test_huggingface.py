"""transformers: quantized as it loads, saved for bitsandbytes, read from bitsandbytes, in bounded memory."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from census import instances
from safetensors.torch import load_file, save_file
from support import fresh_process
from support.quantized import gpt2, llama, logits
from torch import nn
from transformers import AutoModelForCausalLM, modeling_utils

import peftcore
from peftcore.quantization import QuantizedLinear, huggingface, quantized_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def kinds(model):
    return {path for path, _ in quantized_layers(model)}


def same(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.fixture(params=["llama", "tied llama", "gpt2"])
def dense(request, tmp_path):
    """(a folder with a dense model, the same model)."""
    model = {"llama": llama, "tied llama": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2}[request.param]()
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense", model


def test_from_pretrained_quantizes_as_it_loads(dense):
    folder, model = dense
    found = AutoModelForCausalLM.from_pretrained(folder, quantization_config=peftcore.FourBitConfig())
    wanted = peftcore.quantize(model)
    same(found, wanted)
    assert torch.equal(logits(found), logits(wanted))
    assert found.config.quantization_config == wanted.config.quantization_config


def test_load_is_the_same(dense):
    folder, model = dense
    found = peftcore.quantization.load(folder, "nf4", double_quant=False, blocksize=128)
    same(found, peftcore.quantize(model, double_quant=False, blocksize=128))
    assert type(found) is type(model) and not found.training


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, is_quantized):
    model = llama()
    (peftcore.quantize(model) if is_quantized else model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    missing = "model.layers.0.self_attn.q_proj.weight"
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(missing)}
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(peftcore.CheckpointError, match=f"lacks {missing}, which would be initialized at random"):
        peftcore.quantization.load(tmp_path)


def test_a_new_head_may_be_missing(tmp_path):
    llama().save_pretrained(tmp_path)
    found = peftcore.quantization.load(tmp_path, model_class=transformers.LlamaForSequenceClassification)
    assert found.score.weight.isfinite().all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at what the process has mapped")
def test_what_was_read_does_not_stay_with_the_process(tmp_path, monkeypatch):
    """Else all of the dense checkpoint would be there beside the packed model when the last weight is read."""
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    checked, mapped = huggingface.refuse_non_finite, []

    def check(*args):
        mapped.append(str(tmp_path) in Path("/proc/self/maps").read_text())
        return checked(*args)

    monkeypatch.setattr(huggingface, "refuse_non_finite", check)  # called with each weight before it is packed
    model = peftcore.quantization.load(tmp_path)
    assert mapped == [False] * 14
    assert not any(p.untyped_storage().filename for p in model.parameters())


def test_arguments_reach_the_layers(tmp_path):
    llama().save_pretrained(tmp_path)
    config = peftcore.FourBitConfig("fp4", skip=["mlp", "lm_head"], compute_dtype=torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    layer = found.model.layers[0].self_attn.q_proj
    assert (layer.quant_type, layer.compute_dtype, len(kinds(found))) == ("fp4", torch.bfloat16, 8)
    assert peftcore.FourBitConfig.from_dict(json.loads(json.dumps(config.to_dict()))).skip == ["mlp", "lm_head"]


def test_saved_and_read_by_bitsandbytes_and_here(dense, tmp_path):
    folder, _ = dense
    ours = peftcore.quantization.load(folder)
    ours.save_pretrained(tmp_path / "quantized")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").train()
    assert any(type(module).__module__.startswith("bitsandbytes") for module in theirs.modules())
    assert not any(isinstance(module, QuantizedLinear) for module in theirs.modules())
    torch.testing.assert_close(logits(theirs.train()), logits(ours), rtol=1e-4, atol=1e-5)

    again = peftcore.quantization.load(tmp_path / "quantized")
    same(again, ours)
    assert torch.equal(logits(again), logits(ours)) and type(again) is type(ours)
    again.save_pretrained(tmp_path / "again")
    same(peftcore.quantization.load(tmp_path / "again"), ours)


def test_a_checkpoint_that_bitsandbytes_quantized(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config).train()
    theirs.save_pretrained(tmp_path / "quantized")
    ours = peftcore.quantization.load(tmp_path / "quantized")
    assert len(kinds(ours)) == 14 and ours.model.layers[0].mlp.up_proj.nested_absmax is None
    torch.testing.assert_close(logits(ours), logits(theirs.train()), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"quantized with BitsAndBytesConfig but you are passing a FourBitConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", quantization_config=peftcore.FourBitConfig())


def test_options_of_from_pretrained_reach_the_config(tmp_path):
    llama().save_pretrained(tmp_path)
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    classes = {"model_class": transformers.AutoModelForSequenceClassification, "id2label": labels}
    found = peftcore.quantization.load(tmp_path, attn_implementation="eager", use_cache=False, **classes)
    assert found.config.id2label == labels and found.score.weight.shape == (3, 64)
    assert found.config._attn_implementation == "eager" and found.config.use_cache is False
    assert len(kinds(found)) == 14


def test_a_loaded_model_trains_with_transformers_trainer(tmp_path):
    from transformers import Trainer

    llama().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=peftcore.FourBitConfig())
    peftcore.apply(model, "qlora", r=2)
    tokens = torch.arange(3, 12)
    rows = [{"input_ids": tokens, "labels": tokens}] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    result = Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert result.global_step == 2


def test_values_that_are_not_finite_are_named(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"'model.layers.1.mlp.up_proj.weight' contains nan at index \[3, 5\]"
    ):
        peftcore.quantization.load(tmp_path)


def test_what_stays_dense_of_a_quantized_checkpoint_is_cast(tmp_path):
    peftcore.quantize(llama(attention_bias=True)).save_pretrained(tmp_path)
    found = peftcore.quantization.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in found.parameters()} == {torch.uint8, torch.bfloat16}
    assert logits(found).dtype is torch.bfloat16


# One whose projections transformers joins as it saves, and one with `inject_weight.weight`.
@pytest.mark.parametrize("name", ["LaraMiniForCausalLM", "Qwen4ExpForCausalLM"])
def test_names_that_others_take_apart(name, tmp_path):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = peftcore.quantize(instances.build(name).float())
    model.save_pretrained(tmp_path)
    same(peftcore.quantization.load(tmp_path, model_class=type(model)), model)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    peftcore.quantize(llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight.absmax"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(peftcore.CheckpointError, match=r"lacks 'model.layers.1.mlp.up_proj.weight.absmax'"):
        peftcore.quantization.load(tmp_path)


def test_a_checkpoint_with_an_empty_tensor_is_refused(tmp_path):
    peftcore.quantize(llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.empty(0, 1, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(peftcore.CheckpointError, match=r"cannot be read: .*out of bounds.*The checkpoint is damaged"):
        peftcore.quantization.load(tmp_path)


def test_a_weight_of_another_shape_is_refused(tmp_path):
    """Of as many numbers: it would compute something else, or fail in forward."""
    peftcore.quantize(llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(tensors[key].tolist()))
    facts["shape"].reverse()
    tensors[key] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(peftcore.CheckpointError, match=r"up_proj.weight' has shape \[\d+, \d+\], but the layer needs"):
        peftcore.quantization.load(tmp_path)


def test_a_refused_checkpoint_leaves_no_model_in_memory(tmp_path):
    """The error that transformers only logs has a traceback, and with it the model that was being loaded."""

    def alive():
        gc.collect()
        gc.collect()  # also what was only in the caches of collected models
        return sum(issubclass(type(each), transformers.LlamaForCausalLM) for each in gc.get_objects())

    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    before = alive()
    for error, read in [
        (peftcore.PeftcoreError, lambda: peftcore.quantization.load(tmp_path)),
        (RuntimeError, lambda: type(model).from_pretrained(tmp_path, quantization_config=peftcore.FourBitConfig())),
    ]:
        with pytest.raises(error):
            read()
        assert alive() == before


def test_another_quantization_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(peftcore.PeftcoreError, match="is quantized with 'hqq', which is not supported"):
        peftcore.quantization.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_type": "int4"}, "unknown quant_type"),
        ({"blocksize": 3}, "a power of two"),
        ({"compute_dtype": "int8"}, "compute_dtype must be float32"),
    ],
)
def test_a_wrong_config(fields, message):
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.FourBitConfig(**fields)


def test_importing_peftcore_imports_no_transformers():
    code = "import peftcore, peftcore.quantization, sys; peftcore.quantize; print('transformers' in sys.modules)"
    done = fresh_process.run(code)
    assert done.stdout.strip() == "False", done.stderr


def test_a_layer_outside_transformers_needs_no_config():
    assert not hasattr(peftcore.quantize(nn.Sequential(nn.Linear(64, 64))), "config")


@pytest.mark.parametrize("before", [None, "0"])
def test_blocks_that_overlap_leave_the_process_as_it_was(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name, opened = "HF_DEACTIVATE_ASYNC_LOAD", modeling_utils.safe_open
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    blocks = [(huggingface.reading_synchronously(), huggingface.reading_without_mmap()) for _ in range(2)]
    for block in blocks:
        for each in block:
            each.__enter__()
    for number, block in enumerate(blocks):  # the first one leaves first
        assert os.environ[name] == "1" and modeling_utils.safe_open is not opened, number
        for each in block:
            each.__exit__(None, None, None)
    assert os.environ.get(name) == before and modeling_utils.safe_open is opened
