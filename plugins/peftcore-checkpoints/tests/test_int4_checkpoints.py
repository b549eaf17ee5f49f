"""Checkpoints of GPTQ, AutoAWQ and compressed-tensors, loaded without these libraries: values, training, merging."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from int4_checkpoints import awq, compressed, config, gptq, values, write_folder
from peftcore_checkpoints.int4 import to_affine4
from peftcore_cli.bases import models
from safetensors.torch import load_file, save_file
from support.mixtures import mixture
from support.quantized import INPUTS, llama, logits
from torch import Tensor, nn

import peftcore
from peftcore.plugin.registry import registry
from peftcore.quantization import quantized_experts, quantized_layers
from peftcore.quantization.checkpoint_layouts import find_layout
from peftcore.quantization.convert import convert

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gptq": (gptq, {}, {"smallest": 1}),
    "gptq, act-order": (partial(gptq, act_order=True), {"desc_act": True}, {"smallest": 1, "act_order": True}),
    "awq": (awq, {}, {}),
    "compressed-tensors": (compressed, {}, {}),
}


def daily(*cases: str) -> list[Any]:
    """All kinds, those but `cases` marked nightly."""
    return [each if each in cases else pytest.param(each, marks=pytest.mark.nightly) for each in KINDS]


def write_case(folder: Path, case: str = "gptq", group: int = 32, **sizes: Any) -> tuple[dict[str, Tensor], nn.Module]:
    """A folder, the dense weights of its int4 layers in float64, and the dense model with them."""
    write, changes, options = KINDS[case]
    model = llama(num_hidden_layers=1, **sizes)
    dense = write_folder(model, folder, config(case.partition(",")[0], group, **changes), write, group, **options)
    for name, weight in dense.items():
        model.get_parameter(name).data = weight.float()
    return dense, model


@pytest.mark.parametrize("case", KINDS)
def test_values_and_results_are_those_of_the_dense_weights(case: str, tmp_path: Path) -> None:
    dense, reference = write_case(tmp_path, case)
    model = peftcore.quantization.load(tmp_path)
    layers = dict(quantized_layers(model))
    assert len(layers) == len(dense) == 7
    for name, weight in dense.items():
        layer = layers[name.removesuffix(".weight")]
        assert layer.quant_type == "affine4" and layer.blocksize == 32
        assert torch.equal(layer.dequantized(torch.float32), weight.float())
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    assert "lm_head" not in layers and model.lm_head.weight.is_floating_point()


@pytest.mark.parametrize("case", daily("gptq, act-order"))
def test_lora_trains_saves_and_merges(case: str, tmp_path: Path) -> None:
    _, reference = write_case(tmp_path / "base", case)
    model = peftcore.quantization.load(tmp_path / "base")
    for each in (model, reference):
        torch.manual_seed(0)
        peftcore.apply(each, "lora", r=4, init_lora_weights=False)
    for each in (model, reference):
        each(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    actual, expected = ([p.grad for p in each.parameters() if p.requires_grad] for each in (model, reference))
    for grad, expected_grad in zip(actual, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5)
    adapted = logits(model)
    torch.testing.assert_close(adapted, logits(reference), rtol=1e-4, atol=1e-4)
    peftcore.save(model, tmp_path / "adapter")
    reloaded = peftcore.load(peftcore.quantization.load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(reloaded.eval()), adapted)
    peftcore.merge(reloaded, dtype=torch.float32)
    torch.testing.assert_close(logits(reloaded), adapted, rtol=1e-4, atol=1e-4)
    assert not list(quantized_layers(reloaded))


@pytest.mark.parametrize("case", daily("gptq, act-order"))
def test_a_model_is_saved_with_its_bits(case: str, tmp_path: Path) -> None:
    write_case(tmp_path / "theirs", case)
    model = peftcore.quantization.load(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    quantization_config = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    assert (quantization_config["quant_method"], quantization_config["quant_type"]) == (
        "peftcore_4bit",
        "affine4",
    ) and "stored" not in quantization_config
    reloaded = peftcore.quantization.load(tmp_path / "ours")
    actual, expected = reloaded.state_dict(), model.state_dict()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], t) for name, t in expected.items())
    assert torch.equal(logits(reloaded), logits(model))


def test_weights_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that read ahead would make the peak twice the file."""
    write_case(tmp_path)
    monkeypatch.setattr("transformers.core_model_loading.ThreadPoolExecutor", None)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    assert len(list(quantized_layers(peftcore.quantization.load(tmp_path)))) == 7
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "0"


def test_scales_keep_their_dtype_whatever_the_models(tmp_path: Path) -> None:
    dense, _ = write_case(tmp_path)
    model = peftcore.quantization.load(tmp_path, dtype=torch.bfloat16)
    for path, layer in quantized_layers(model):
        assert layer.absmax.dtype is torch.float16
        assert torch.equal(layer.dequantized(torch.float32), dense[f"{path}.weight"].float())
    assert model.lm_head.weight.dtype is torch.bfloat16


def test_one_scale_for_each_row(tmp_path: Path) -> None:
    """A row of 96 inputs is three blocks of 32 with one scale."""
    layer, weight_values = nn.Linear(96, 40), values(40, 96, 96)
    weight = find_layout(config("compressed-tensors", -1, weights={"strategy": "channel"}), "folder")
    assert weight is not None
    convert(layer, to_affine4(weight.read(compressed(weight_values), "layer"), torch.float32, "layer"), None)
    assert layer.blocksize == 32 and torch.equal(layer.dequantized(torch.float32), weight_values.dense().float())
    small = find_layout(config("gptq", 16), "folder").read(gptq(values(40, 96, 16, smallest=1)), "layer")
    with pytest.raises(
        peftcore.PeftcoreError, match="'layer' has groups of 16 inputs, but the group size must be a multiple of 32"
    ):
        to_affine4(small, torch.float32, "layer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(next(k for k in s if k.endswith("qzeros"))), "lacks 'model.layers.0.mlp.down_proj.qzeros'"),
        (lambda s: [s.pop(k) for k in [*s] if k.endswith("q_proj.qweight")], "lacks '.*q_proj.qweight'"),
        (
            lambda s: [s.pop(k) for k in [*s] if k.endswith(("qweight", "qzeros", "scales"))],
            "was quantized by GPTQ, but it has no 'qweight'",
        ),
        (
            lambda s: s.update({k.replace("layers.0", "layers.7"): s.pop(k) for k in [*s] if "layers.0.mlp" in k}),
            r"has 3 int4 weights of GPTQ \('model.layers.7",
        ),
    ],
)
def test_folders_that_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    write_case(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.quantization.load(tmp_path)


@pytest.mark.parametrize("case", daily("gptq, act-order"))
def test_the_estimate_knows_the_checkpoint(case: str, tmp_path: Path) -> None:
    write_case(tmp_path, case)
    model = peftcore.quantization.load(tmp_path)
    estimates = [
        peftcore.estimate(each, "lora", r=2, batch_size=2, length=8, dtype=torch.float32) for each in (tmp_path, model)
    ]
    packed = [layer for _, layer in quantized_layers(model)]
    for each in estimates:
        assert each.summary.packed_parameters == sum(layer.in_features * layer.out_features for layer in packed)
        assert each.summary.packed_bytes == sum(t.nbytes for one in packed for t in (one.weight, *one.buffers()))


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("qwen3_moe", "gptq"),
        ("mixtral", "awq"),
        *(pytest.param("qwen3_moe", case, marks=pytest.mark.nightly) for case in ("awq", "compressed-tensors")),
    ],
)
def test_experts_stored_one_by_one_become_one_parameter(family: str, case: str, tmp_path: Path) -> None:
    write, changes, options = KINDS[case]
    source = mixture(family, num_hidden_layers=1)
    dense = write_folder(source, tmp_path, config(case, 32, **changes), write, 32, **options)
    model = peftcore.quantization.load(tmp_path)
    ((path, experts),) = quantized_experts(model)
    assert {packing.quant_type for packing in experts.packings.values()} == {"affine4"}
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    prefix = path.replace("mlp", "block_sparse_moe") if family == "mixtral" else path
    gate, up, down = (torch.stack([dense[f"{prefix}.{i}.{name}.weight"] for i in range(4)]) for name in names)
    assert torch.equal(experts.dequantized_parameter("gate_up_proj"), torch.cat((gate, up), 1).float())
    assert torch.equal(experts.dequantized_parameter("down_proj"), down.float())
    reference = peftcore.dequantize(peftcore.quantization.load(tmp_path))
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(peftcore.quantization.load(tmp_path / "ours")), logits(model))
    byte_count = sum(t.nbytes for _, layer in quantized_layers(model) for t in (layer.weight, *layer.buffers()))
    byte_count += sum(experts.get_parameter(name).nbytes for name in experts.packings)
    byte_count += sum(t.nbytes for t in experts.buffers())
    assert peftcore.estimate(tmp_path, "lora", r=2, length=8, dtype=torch.float32).summary.packed_bytes == byte_count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.0.mlp.experts.2.up_proj.qzeros"), "stores '.*up_proj.qzeros' of only 3 experts"),
        (
            lambda s: s.update({"model.layers.0.mlp.experts.1.down_proj.g_idx": torch.arange(32).int()}),
            "stores '.*down_proj.g_idx' of only 1 experts",
        ),
        (
            lambda s: s.update(
                {f"model.layers.0.mlp.experts.{i}.up_proj.g_idx": torch.arange(64).int() % 2 for i in range(4)}
            ),
            "gate_up_proj' has int4 experts with act-order",
        ),
    ],
)
def test_experts_that_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    write_folder(mixture("qwen3_moe", num_hidden_layers=1), tmp_path, config("gptq", 32), gptq, 32, smallest=1)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.quantization.load(tmp_path)


def test_without_the_package_an_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(tmp_path)
    plugins = [each for each in registry.plugins() if each.distribution != "peftcore-checkpoints"]
    monkeypatch.setattr(registry, "plugins", lambda: plugins)
    message = r"quantized with 'gptq', which needs the package .* Run in .* pip install ./plugins/peftcore-checkpoints"
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.quantization.load(tmp_path)
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.estimate(tmp_path, "lora")
    with pytest.raises(peftcore.PeftcoreError, match=message):
        models.load_model(str(tmp_path), "causal-lm")
