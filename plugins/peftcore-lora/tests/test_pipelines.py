"""LoRA in one file for the models of a diffusers pipeline: what diffusers and sd-scripts write is read, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from support import pipelines
from support.pipelines import EVERY, FILE, apply, models, output, pipeline, there
from torch import Tensor

import peftcore

pytestmark = [*pipelines.QUIET, pytest.mark.filterwarnings("ignore:.* reaches ")]


def assert_same(pipe: Any, expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    base = models(pipeline(KIND[type(pipe).__name__]))
    for name, model in models(pipe).items():
        torch.testing.assert_close(output(model), expected[name], rtol=tolerance, atol=tolerance)
        assert (output(base[name]) - expected[name]).abs().max() > 1e-3, name  # it does something


KIND = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "FluxPipeline": "flux",
    "StableDiffusion3Pipeline": "sd3",
}
MIXED = {"lora_alpha": 2, "rank_pattern": {"to_q": 2, "fc1": 3}, "alpha_pattern": {"to_k": 7, "k_proj": 3}}

BLOCKS = {"target_modules_bd_a": ["out"], "target_modules_bd_b": ["_q", "_k", "_v", "q_", "k_", "v_"], "nblocks": 2}


@pytest.mark.parametrize(
    ("kind", "layout", "method", "fields"),
    [
        pytest.param("sd", "diffusers", "lora", {"targets": EVERY, "lora_alpha": 3}, marks=pytest.mark.nightly),
        ("sd", "diffusers", "lora", {**MIXED, "use_rslora": True}),
        ("sd", "kohya", "lora", {**MIXED, "use_rslora": True}),
        ("sd", "diffusers", "lora", {"lora_bias": True}),
        pytest.param("sd", "diffusers", "lora", {"r": 4, "use_bdlora": BLOCKS}, marks=pytest.mark.nightly),
        ("sd", "kohya", "lora", {"r": 4, "use_bdlora": BLOCKS}),
        ("sd", "diffusers", "dora", {"targets": ("to_q", "conv1", "fc1")}),
        pytest.param("sdxl", "diffusers", "lora", {"r": 3}, marks=pytest.mark.nightly),
        ("sdxl", "kohya", "lora", {"targets": EVERY, "r": 3, "lora_alpha": 1}),
        ("flux", "diffusers", "lora", {"targets": EVERY, **MIXED}),
        (
            "flux",
            "kohya",
            "lora",
            {"targets": r"(transformer_blocks|encoder).*(to_q|to_v|ff.*|linear|out_proj|fc1)", **MIXED},
        ),
        ("sd3", "diffusers", "lora", {"targets": EVERY}),
    ],
)
def test_what_is_written_is_read(kind: str, layout: str, method: str, fields: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipeline(kind)
    expected = apply(pipe, method, **fields)
    assert peftcore.save(pipe.components, tmp_path, format=layout) == tmp_path
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    diffusers_pipe, peftcore_pipe = pipeline(kind), pipeline(kind)
    diffusers_pipe.load_lora_weights(tmp_path)
    assert_same(diffusers_pipe, expected)
    peftcore.load(peftcore_pipe.components, tmp_path)
    assert_same(peftcore_pipe, expected)


def test_names_in_the_file(tmp_path: Path) -> None:
    pipe = pipeline("sd")
    apply(pipe, targets=("to_q", "fc1", "out_proj"), lora_alpha=2)
    peftcore.save(pipe.components, tmp_path / "a", format="diffusers")
    names, header = load_file(tmp_path / "a" / FILE), _header(tmp_path / "a" / FILE)
    block = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert f"unet.{block}.lora_A.weight" in names
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight" in names
    about = json.loads(header["lora_adapter_metadata"])
    assert (about["unet.r"], about["unet.lora_alpha"], about["unet.target_modules"]) == (4, 2, ["to_q"])
    peftcore.save(pipe.components, tmp_path / "b.safetensors", format="kohya")
    names = load_file(tmp_path / "b.safetensors")
    assert names[f"lora_unet_{block.replace('.', '_')}.alpha"] == 2
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in names
    both = pipeline("sdxl")
    apply(both, targets=("to_q", "out_proj"))
    peftcore.save(both.components, tmp_path / "c.safetensors", format="kohya")
    assert {name.partition("_text_model")[0] for name in load_file(tmp_path / "c.safetensors") if "_te" in name} == {
        "lora_te1",
        "lora_te2",
    }


def _header(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


def of_peft(kind: str, **fields: Any) -> tuple[Any, dict[str, Tensor]]:
    """A pipeline with PEFT's layers, as diffusers' training scripts make it, and the outputs."""
    pipe = pipeline(kind)
    torch.manual_seed(5)
    for model in models(pipe).values():
        chosen = there(model, ("to_q", "to_out.0", "conv1", "proj_in", "q_proj", "out_proj"))
        inject_adapter_in_model(LoraConfig(r=4, target_modules=chosen, init_lora_weights=False, **fields), model)
    return pipe, {name: output(model) for name, model in models(pipe).items()}


def save_peft(pipe: Any, folder: Path, convert: Any = None, metadata: bool = True) -> Path:
    given: dict[str, Any] = {}
    for name, model in models(pipe).items():
        tensors = get_peft_model_state_dict(model)
        given[f"{name}_lora_layers"] = tensors if convert is None else convert(tensors)
        if metadata:
            given[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(folder, **given)
    return folder


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_what_diffusers_wrote(kind: str, tmp_path: Path) -> None:
    diffusers_pipe, expected = of_peft(
        kind, lora_alpha=9, use_rslora=True, rank_pattern={"to_q": 3}, alpha_pattern={"to_q": 5}
    )
    peftcore_pipe = pipeline(kind)
    peftcore.load(peftcore_pipe.components, save_peft(diffusers_pipe, tmp_path))
    assert_same(peftcore_pipe, expected)


@pytest.mark.parametrize("convert", [None, convert_state_dict_to_diffusers], ids=["peft", "diffusers"])
def test_what_older_ones_wrote(convert: Any, tmp_path: Path) -> None:
    diffusers_pipe, expected = of_peft("sd", lora_alpha=4)
    peftcore_pipe = pipeline("sd")
    peftcore.load(peftcore_pipe.components, save_peft(diffusers_pipe, tmp_path, convert, metadata=False))
    assert_same(peftcore_pipe, expected)


def test_dora_that_diffusers_wrote(tmp_path: Path) -> None:
    pipe = pipeline("sd")
    fields = {"target_modules": ["to_q", "conv1"], "init_lora_weights": False, "use_dora": True}
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, **fields))
    expected = output(pipe.unet)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    torch.testing.assert_close(output(peftcore.load(pipeline("sd").unet, tmp_path)), expected, rtol=1e-5, atol=1e-5)


def test_a_file_of_one_model_names_no_part(tmp_path: Path) -> None:
    diffusers_pipe, expected = of_peft("sd", lora_alpha=7)
    diffusers_pipe.unet.save_lora_adapter(tmp_path)
    peftcore_pipe = peftcore.load(pipeline("sd").unet, tmp_path / FILE)
    torch.testing.assert_close(output(peftcore_pipe), expected["unet"], rtol=1e-5, atol=1e-5)
    with pytest.raises(
        peftcore.CheckpointError, match=r"tensors are not for a layer of CLIPTextModel, or not LoRA: 'down_"
    ):
        peftcore.load(pipeline("sd").text_encoder, tmp_path / FILE)


def test_old_spellings(tmp_path: Path) -> None:
    model = pipelines.unet()
    peftcore.apply(model, "lora", r=4, lora_alpha=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    expected = output(model)
    tensors = {}
    for name, tensor in peftcore.state_dict(model, "default").items():
        name = name.removeprefix("base_model.model.").replace(".to_out.0.", ".to_out.")
        for peftcore_pipe, diffusers_pipe in ((".lora_A", "_lora.down"), (".lora_B", "_lora.up")):
            name = name.replace(peftcore_pipe, diffusers_pipe)
        tensors["unet." + name.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")] = tensor
    save_file(tensors, tmp_path / "old.safetensors")
    torch.manual_seed(0)
    fresh = pipeline("sd", 1).unet
    fresh.load_state_dict({n: t for n, t in model.state_dict().items() if "peftcore" not in n}, strict=False)
    peftcore.load(fresh, tmp_path / "old.safetensors")
    torch.testing.assert_close(output(fresh), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_in_16_bits(layout: str, tmp_path: Path) -> None:
    unet = pipelines.unet().bfloat16()
    fields = {"lora_alpha": 5, "alpha_pattern": {"to_k": 7}, "init_lora_weights": False}
    peftcore.apply(unet, "lora", r=4, target_modules=["to_q", "to_k", "conv1"], **fields)
    expected = output(unet)
    peftcore.save(unet, tmp_path, format=layout)
    other = pipelines.unet().bfloat16()
    other.load_state_dict({n: t for n, t in unet.state_dict().items() if "peftcore" not in n}, strict=False)
    torch.testing.assert_close(output(peftcore.load(other, tmp_path)), expected, rtol=0.02, atol=0.02)


def test_swapped_in_place(tmp_path: Path) -> None:
    unet = peftcore.apply(pipeline("sd").unet, "lora", r=4, target_modules=["to_q"], init_lora_weights=False)
    expected = output(unet)
    peftcore.save(unet, tmp_path, format="kohya")
    other = peftcore.apply(pipeline("sd").unet, "lora", r=4, target_modules=["to_q"])
    peftcore.set_state_dict(other, "default", tmp_path / FILE)
    torch.testing.assert_close(output(other), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux", "sd3"])
def test_merge_and_remove_are_exact(kind: str) -> None:
    pipe = pipeline(kind)
    before = {name: output(model) for name, model in models(pipe).items()}
    expected = apply(pipe, targets=EVERY)
    for name, model in models(pipe).items():
        weights = {n: t.clone() for n, t in model.state_dict().items()}
        peftcore.merge(model, undo=True)
        torch.testing.assert_close(output(model), expected[name], rtol=1e-5, atol=1e-5)
        peftcore.unmerge(model)
        assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
        assert torch.equal(output(model), expected[name])
        peftcore.remove(model)
        assert torch.equal(output(model), before[name])


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_on_a_base_in_4_bits(layout: str, tmp_path: Path) -> None:
    models = [peftcore.quantize(pipeline("flux").transformer, "nf4") for _ in range(2)]
    fields = {"target_modules": r"(single_)?transformer_blocks.*(to_q|to_v|proj_mlp)", "init_lora_weights": False}
    peftcore.apply(models[0], "lora", r=4, **fields)
    peftcore.save(models[0], tmp_path, format=layout)
    peftcore.load(models[1], tmp_path)
    torch.testing.assert_close(output(models[1]), output(models[0]), rtol=1e-5, atol=1e-5)


def test_the_command_line_says_what_is_in_it(tmp_path: Path) -> None:
    from peftcore_cli.app import build
    from typer.testing import CliRunner

    pipe = pipeline("sd")
    apply(pipe)
    peftcore.save(pipe.components, tmp_path / "a.safetensors", format="kohya")
    words = ["info", str(tmp_path / "a.safetensors")]
    printed = CliRunner().invoke(build(words), words).output
    assert "kohya" in printed and "24 tensors, float32" in printed
