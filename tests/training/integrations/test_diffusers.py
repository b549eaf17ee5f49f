"""diffusers on a model with adapters: what would pass them over is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from support import pipelines
from support.pipelines import apply, output, pipeline

import peftcore

pytestmark = [*pipelines.QUIET, pytest.mark.filterwarnings("ignore:.* reaches ")]


@pytest.fixture(scope="module")
def adapted() -> tuple[Any, dict[str, torch.Tensor]]:
    pipe = pipeline("sd")
    return pipe, apply(pipe)


@pytest.mark.parametrize(
    ("act", "instead"),
    [
        (lambda pipe: output(pipe.unet, cross_attention_kwargs={"scale": 0.5}), r"peftcore.scale\(model, NAME"),
        (lambda pipe: pipe.disable_lora(), "peftcore.activate"),
        (lambda pipe: pipe.enable_lora(), "peftcore.activate"),
        (lambda pipe: pipe.unload_lora_weights(), "peftcore.remove"),
        (lambda pipe: pipe.delete_adapters("default"), "peftcore.remove"),
        (lambda pipe: pipe.fuse_lora(), "peftcore.merge"),
        (lambda pipe: pipe.unet.set_adapters("default"), "peftcore.activate"),
        (lambda pipe: pipe.unet.disable_adapters(), "peftcore.activate"),
        (lambda pipe: pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"])), "PEFT cannot adapt"),
        (lambda pipe: pipe.unet.fuse_qkv_projections(), r"peftcore.remove\(model\)"),
        (lambda pipe: pipe.fuse_qkv_projections(vae=False), r"peftcore.remove\(model\)"),
    ],
)
def test_calls_that_mean_layers_of_peft(act: Callable[[Any], Any], instead: str, adapted: Any) -> None:
    pipe, wanted = adapted
    with pytest.raises(peftcore.PeftcoreError, match=instead):
        act(pipe)
    assert torch.equal(output(pipe.unet), wanted["unet"])
    assert torch.equal(output(pipe.unet, cross_attention_kwargs={"scale": 1.0}), wanted["unet"])


def test_the_text_encoder_alone() -> None:
    pipe = pipeline("sd")
    peftcore.apply(pipe.text_encoder, "lora")
    for act in (pipe.disable_lora, pipe.unload_lora_weights, pipe.fuse_lora):
        with pytest.raises(peftcore.PeftcoreError, match="would ignore peftcore's adapters on CLIPTextModel"):
            act()


def test_a_file_beside_adapters_of_ours(tmp_path: Path) -> None:
    pipe = pipeline("sd")
    peftcore.apply(pipe.unet, "lora", target_modules=["to_q"])
    peftcore.save(pipe.unet, tmp_path, format="diffusers")
    with pytest.raises(peftcore.PeftcoreError, match="PEFT cannot adapt UNet2DConditionModel"):
        pipe.load_lora_weights(tmp_path)
    other = pipeline("sd")
    other.load_lora_weights(tmp_path)
    for act in (lambda: peftcore.apply(other.unet, "lora"), lambda: peftcore.load(other.unet, tmp_path)):
        with pytest.raises(peftcore.PeftcoreError, match="already has adapters of Hugging Face PEFT"):
            act()


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_projections_that_were_fused(kind: str) -> None:
    pipe = pipeline(kind)
    model = pipe.unet if kind == "sd" else pipe.transformer
    model.fuse_qkv_projections()
    before = output(model)
    with pytest.raises(peftcore.PeftcoreError, match="'to_qkv' contains its weight and is called"):
        peftcore.apply(model, "lora", target_modules=["to_q"])
    peftcore.apply(model, "lora", target_modules=["to_qkv"], init_lora_weights=False)
    changed = output(model)
    assert (changed - before).abs().max() > 1e-3
    with pytest.raises(peftcore.PeftcoreError, match="unfuse_qkv_projections would replace"):
        model.unfuse_qkv_projections()
    assert torch.equal(output(model), changed)
    with pytest.raises(peftcore.PeftcoreError, match="cannot be in a file for pipelines"):
        peftcore.save(model, "nowhere", format="diffusers")
    peftcore.remove(model)
    model.unfuse_qkv_projections()
    peftcore.apply(model, "lora", target_modules=["to_q"], init_lora_weights=False)
    assert (output(model) - before).abs().max() > 1e-3
    if kind == "sd":  # where the fused one stays, and is not called
        with pytest.raises(peftcore.PeftcoreError, match="to_q, to_k, to_v are called instead"):
            peftcore.apply(model, "lora", adapter="b", target_modules=["to_qkv"])


def test_save_pretrained(tmp_path: Path) -> None:
    unet = pipeline("sd").unet
    peftcore.apply(unet, "lora", target_modules=["to_q", "conv1"], init_lora_weights=False)
    with pytest.raises(peftcore.PeftcoreError, match="without its adapters"):
        unet.save_pretrained(tmp_path)
    peftcore.merge(unet, undo=True)
    unet.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "diffusion_pytorch_model.safetensors") if "peftcore" in name]
    reloaded = output(type(unet).from_pretrained(tmp_path).eval())
    torch.testing.assert_close(reloaded, output(unet), rtol=1e-6, atol=1e-6)


def test_a_pipeline_is_saved_whole(tmp_path: Path) -> None:
    pipe = pipeline("sd")
    peftcore.apply(pipe.text_encoder, "lora", target_modules=["q_proj"], init_lora_weights=False)
    with pytest.raises(peftcore.PeftcoreError, match=r"cannot write the adapters of 'text_encoder' \(CLIPTextModel\)"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    peftcore.merge(pipe.text_encoder, undo=True)
    wanted = output(pipe.text_encoder)
    pipe.save_pretrained(tmp_path)
    again = type(pipe.text_encoder).from_pretrained(tmp_path / "text_encoder").eval()
    torch.testing.assert_close(output(again), wanted, rtol=1e-6, atol=1e-6)


def test_offloading_comes_after_adapters(tmp_path: Path) -> None:
    model, plain = pipeline("sd").text_encoder, pipeline("sd").text_encoder
    peftcore.apply(model, "lora", target_modules=["q_proj"], init_lora_weights=False)
    wanted = output(model)
    peftcore.save(model, tmp_path, format="diffusers")
    for each in (model, plain):
        accelerate.cpu_offload(each, execution_device=torch.device("cpu"))
    assert torch.equal(output(model), wanted)
    for act in (lambda: peftcore.apply(plain, "lora"), lambda: peftcore.load(plain, tmp_path)):
        with pytest.raises(
            peftcore.PeftcoreError, match=r"accelerate offloads the weights .*Apply or load adapters first"
        ):
            act()
