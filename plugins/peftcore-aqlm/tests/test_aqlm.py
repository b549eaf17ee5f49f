"""Checkpoints of AQLM: values, gradients, adapters, saving, merging, errors, and training on the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import peftcore_aqlm
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import aqlm_checkpoints
from support.aqlm_checkpoints import LAYOUTS, by_loop, change_config, stored
from support.commands import SPECIAL, WORDS, printed, save_tokenizer, write_jsonl
from torch import Tensor, nn
from torch.nn import functional as F

import peftcore

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
FILE = "adapter_model.safetensors"
LAYER = "model.layers.0.self_attn.q_proj"


def write_folder(folder: Path, layout: str = "2x8") -> dict[str, Tensor]:
    """Write a Llama in AQLM, with a tokenizer, and return the state dict of the dense model with its values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(SPECIAL + WORDS), **SIZES))
    save_tokenizer(folder)
    return aqlm_checkpoints.write_folder(model, folder, layout)


def change_tensors(folder: Path, **parts: Tensor | None) -> None:
    """Replace tensors of one layer, or remove them."""
    state = load_file(folder / "model.safetensors") | {f"{LAYER}.{name}": value for name, value in parts.items()}
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_values_are_those_of_the_formula(layout: str) -> None:
    torch.manual_seed(0)
    parts = stored(8, 16, layout)
    assert torch.equal(peftcore_aqlm.dequantize(**parts), by_loop(**parts))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_values_are_those_of_the_aqlm_package(layout: str) -> None:
    utils = pytest.importorskip("aqlm.utils", reason="aqlm is not installed")
    torch.manual_seed(0)
    parts = stored(8, 16, layout)
    codes = utils.unpack_int_data(parts["codes"], LAYOUTS[layout][1])
    expected = utils._dequantize_weight(codes, parts["codebooks"], parts["scales"])
    assert torch.equal(peftcore_aqlm.dequantize(**parts), expected)


def test_a_weight_is_dequantized_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore_aqlm.layer._CHUNK_VALUES", 100)  # 3 of 8 rows of blocks
    parts = stored(16, 16, "blocks")
    assert torch.equal(peftcore_aqlm.dequantize(**parts), by_loop(**parts))


@pytest.mark.parametrize("layout", ["1x16", "2x8"])
def test_a_folder_is_read_with_its_codes_as_they_are(tmp_path: Path, layout: str) -> None:
    from transformers import LlamaForCausalLM

    dense = write_folder(tmp_path, layout)
    model = load(tmp_path)
    layer, on_disk = model.get_submodule(LAYER), load_file(tmp_path / "model.safetensors")
    assert type(layer) is peftcore_aqlm.AqlmLinear and type(model.lm_head) is nn.Linear
    assert (
        torch.equal(layer.weight, on_disk[f"{LAYER}.codes"]) and layer.weight.dtype is on_disk[f"{LAYER}.codes"].dtype
    )
    expected = LlamaForCausalLM(model.config)
    expected.load_state_dict(dense)
    ids = torch.arange(6)[None]
    assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-5)


def test_the_gradient_of_x_is_that_of_the_dense_weight(tmp_path: Path) -> None:
    dense = write_folder(tmp_path)
    layer = load(tmp_path).get_submodule(LAYER)
    x = torch.randn(2, 3, 32, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    F.linear(same, dense[f"{LAYER}.weight"]).square().sum().backward()
    assert torch.equal(x.grad, same.grad)


def test_no_dense_weight_is_kept_for_backward(tmp_path: Path) -> None:
    write_folder(tmp_path)
    layer, saved_tensors = load(tmp_path).get_submodule(LAYER), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved_tensors.append(t) or t, lambda t: t):
        layer(torch.randn(2, 32, requires_grad=True))
    assert saved_tensors and not any(t.shape == (32, 32) for t in saved_tensors)


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForSequenceClassification"])
def test_other_heads_read_the_codes(tmp_path: Path, name: str) -> None:
    import transformers

    dense = write_folder(tmp_path)
    model = getattr(transformers, name).from_pretrained(tmp_path)
    path = LAYER if hasattr(model, "score") else LAYER.removeprefix("model.")
    actual = peftcore_aqlm.dequantize(
        *(getattr(model.get_submodule(path), n) for n in ("weight", "codebooks", "scales"))
    )
    assert torch.equal(actual, dense[f"{LAYER}.weight"])
    model.save_pretrained(tmp_path / "again")
    assert path + ".codes" in load_file(tmp_path / "again" / "model.safetensors")


def test_biases_are_added_and_can_train() -> None:
    layer, parts = nn.Linear(16, 8), stored(8, 16, "2x8")
    layer.__class__ = peftcore_aqlm.AqlmLinear
    layer.weight = nn.Parameter(parts["codes"], requires_grad=False)
    layer.register_buffer("codebooks", parts["codebooks"])
    layer.register_buffer("scales", parts["scales"])
    x = torch.randn(16)
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.ones(8))
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x[None])
    expected = F.linear(x[None].bfloat16(), by_loop(**parts).bfloat16(), layer.bias.bfloat16())
    assert actual.dtype is torch.bfloat16 and torch.equal(actual, expected)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "oft", "vera"])
def test_adapters_learn_over_the_codes(tmp_path: Path, method: str) -> None:
    write_folder(tmp_path)
    model, ids = load(tmp_path), torch.arange(6)[None]
    base = model(ids).logits
    peftcore.apply(model, method)
    assert torch.allclose(model(ids).logits, base, atol=1e-4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert "weight" not in {n for n, p in model.get_submodule(LAYER).named_parameters(recurse=False) if p.requires_grad}
    peftcore.save(model, tmp_path / "adapter")
    other_model = load(tmp_path)
    peftcore.load(other_model, tmp_path / "adapter")
    assert torch.equal(other_model(ids).logits, model(ids).logits)


def test_saving_writes_the_folder_that_was_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "base")
    model = load(tmp_path / "base")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "again")]
    assert configs[0]["quantization_config"].items() <= configs[1]["quantization_config"].items()


def test_merging_is_into_dense_weights_only(tmp_path: Path) -> None:
    write_folder(tmp_path / "base")
    model, ids = load(tmp_path / "base"), torch.arange(6)[None]
    peftcore.apply(model, "lora", target_modules=["q_proj"], init_lora_weights=False)
    expected = model(ids).logits
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot merge into AQLM codes.*dtype=torch.bfloat16"):
        peftcore.merge(model, undo=True)
    peftcore.merge(model, dtype=torch.float32, undo=True)
    assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    peftcore.unmerge(model)
    assert torch.equal(model(ids).logits, expected)
    peftcore.merge(model, dtype=torch.float32)
    model.save_pretrained(tmp_path / "merged")
    reloaded = load(tmp_path / "merged")  # one layer dense, the others in codes
    assert type(reloaded.get_submodule(LAYER)) is nn.Linear
    assert torch.allclose(reloaded(ids).logits, expected, atol=1e-4)


def test_dequantizing_gives_a_plain_model(tmp_path: Path) -> None:
    dense = write_folder(tmp_path / "base")
    model = peftcore.dequantize(load(tmp_path / "base"))
    assert not any(isinstance(each, peftcore_aqlm.AqlmLinear) for each in model.modules())
    assert {name: True for name in dense} == {k: torch.equal(v, dense[k]) for k, v in model.state_dict().items()}
    model.float().save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"codes": torch.zeros(32, 4, 1, dtype=torch.int8)},
            r"codes' has shape \[32, 4, 1\] and dtype I8.*\[32, 4, 2\]",
        ),
        ({"codes": torch.zeros(32, 4, 2, dtype=torch.int32)}, r"codes' has shape \[32, 4, 2\] and dtype I32.* I8"),
        ({"codebooks": torch.zeros(2, 255, 1, 8)}, r"codebooks' has shape \[2, 255, 1, 8\].*need \[2, 256, 1, 8\]"),
        ({"scales": torch.zeros(32)}, r"scales' has shape \[32\] .*need \[32, 1, 1, 1\]"),
        ({"scales": None}, r"scales' is not in the checkpoint"),
        ({"codes": None}, r"codes' is not in the checkpoint"),
        ({"codebooks": torch.full((2, 256, 1, 8), torch.nan)}, r"codebooks' contains NaN or Inf"),
    ],
)
def test_damaged_tensors_are_errors(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    write_folder(tmp_path)
    change_tensors(tmp_path, **parts)
    with pytest.raises(peftcore.CheckpointError, match=message):
        load(tmp_path)


def test_codes_out_of_range_are_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, "blocks")
    change_tensors(tmp_path, codes=torch.full((16, 8, 2), 32, dtype=torch.int8))  # 6 bits: -32 to 31
    with pytest.raises(peftcore.CheckpointError, match=r"codes' has values from 32 to 32.*from -32 to 31"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_group_size": 5}, r"not whole blocks of 1 x 5"),
        ({"nbits_per_codebook": 17}, r"nbits_per_codebook from 1 to 16, found .* 17"),
        ({"num_codebooks": 3}, r"codes' has shape \[.*, 2\] and dtype I8.* need \[.*, 3\]"),
    ],
)
def test_configs_that_do_not_fit_are_errors(tmp_path: Path, fields: dict[str, int], message: str) -> None:
    write_folder(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(peftcore.CheckpointError, match=message):
        load(tmp_path)


def test_codes_of_experts_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.mlp.experts.0.up_proj.codes"] = torch.zeros(64, 4, 2, dtype=torch.int8)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(peftcore.PeftcoreError, match=r"AQLM codes for '.*experts.0.up_proj' \(experts\), but only"):
        load(tmp_path)


def test_files_of_pickle_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(peftcore.PeftcoreError, match=r"pytorch_model.bin' is not a safetensors file"):
        load(tmp_path)


def test_a_dense_folder_that_says_aqlm_is_an_error(tmp_path: Path) -> None:
    dense = write_folder(tmp_path)
    save_file(dense, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(peftcore.CheckpointError, match="has no codes for any layer of the model"):
        load(tmp_path)


def test_commands_that_would_quantize_it_again_say_how_it_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    with pytest.raises(peftcore.PeftcoreError, match=r"from_pretrained after `import peftcore_aqlm`.* --quantize"):
        peftcore.quantization.load(tmp_path)


def test_without_the_package_an_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcore.plugin.registry import registry

    write_folder(tmp_path)
    plugins = [each for each in registry.plugins() if each.distribution != "peftcore-aqlm"]
    monkeypatch.setattr(registry, "plugins", lambda: plugins)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"quantized with 'aqlm', .* Run in .* pip install ./plugins/peftcore-aqlm"
    ):
        peftcore.estimate(tmp_path, "lora")


def test_an_adapter_trains_resumes_and_merges_on_the_command_line(tmp_path: Path) -> None:
    write_folder(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"the {word}", "completion": "is good"} for word in WORDS])
    train = ("train", "-m", tmp_path / "base", "-d", data, "--method", "lora", "--lr", "0.01", "--dtype", "fp32")
    train = (*train, "--steps", "4", "--save-every", "2", "--eval-data", data)
    for name in ("run", "parted"):
        status, output = printed(*train, "-o", tmp_path / name)
        assert status == 0, output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["after"]["loss"] < result["before"]["loss"]

    parted = tmp_path / "parted"  # as if it had been stopped after two steps
    for folder in (parted / "adapter", parted / "checkpoints" / "checkpoint-4"):
        shutil.rmtree(folder)
    status, output = printed(*train, "-o", parted, "--resume")
    assert status == 0 and "checkpoint-2" in output, output
    actual, expected = (load_file(each / "adapter" / FILE) for each in (parted, tmp_path / "run"))
    assert all(torch.equal(actual[key], expected[key]) for key in expected)

    asked = ("-d", data, "--dtype", "fp32")
    status, output = printed("eval", tmp_path / "run", *asked)
    assert status == 0 and f"{result['after']['loss']:.4f}" in output
    status, output = printed("merge", tmp_path / "run", "-o", tmp_path / "merged", "--dtype", "fp32")
    assert status == 0, output
    merged = load(tmp_path / "merged")
    assert not any(isinstance(each, peftcore_aqlm.AqlmLinear) for each in merged.modules())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    adapted, ids = load(tmp_path / "base"), torch.arange(6)[None]
    peftcore.load(adapted, tmp_path / "run" / "adapter")
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
