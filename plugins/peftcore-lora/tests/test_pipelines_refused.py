"""Files for the models of a pipeline: whose part is whose, what has no place, and hostile ones."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import pipelines
from support.pipelines import FILE, apply, has_adapters, of_kohya, output, pipeline
from torch import Tensor

import peftcore

pytestmark = [*pipelines.QUIET, pytest.mark.filterwarnings("ignore:.* reaches ")]


def test_each_model_takes_its_part(tmp_path: Path) -> None:
    pipe = pipeline("sdxl")
    expected = apply(pipe)
    peftcore.save(pipe.components, tmp_path, format="diffusers")
    pipe_to_load = pipeline("sdxl")
    with pytest.warns(
        UserWarning, match=r"also contains text_encoder \(16 tensors\), text_encoder_2 \(16 tensors\), which belong"
    ):
        peftcore.load(pipe_to_load.unet, tmp_path)
    assert torch.equal(output(pipe_to_load.unet), expected["unet"])
    with pytest.raises(
        peftcore.CheckpointError, match=r"contains text_encoder and text_encoder_2, and a CLIPTextModelWithPro"
    ):
        peftcore.load(pipe_to_load.text_encoder_2, tmp_path)
    with pytest.raises(
        peftcore.CheckpointError, match=r"contains text_encoder_2 \(16 tensors\), but no model for it was passed"
    ):
        peftcore.load({"unet": pipeline("sdxl").unet, "text_encoder": pipe_to_load.text_encoder}, tmp_path)
    with pytest.raises(peftcore.CheckpointError, match=r"no part for a FluxTransformer2DModel \(transformer\)"):
        peftcore.load(pipeline("flux").transformer, tmp_path)
    assert peftcore.state_dict(pipe_to_load.unet, "default") and not has_adapters(pipe_to_load.text_encoder)


def test_all_models_or_none(tmp_path: Path) -> None:
    pipe = pipeline("sd")
    apply(pipe)
    peftcore.save(pipe.components, tmp_path, format="diffusers")
    pipe_to_load = pipeline("sd")
    pipe_to_load.unet = pipelines.unet(cross_attention_dim=16)
    with pytest.raises(peftcore.CheckpointError, match="has shape"):
        peftcore.load(
            {"text_encoder": pipe_to_load.text_encoder, "unet": pipe_to_load.unet}, tmp_path, check_base=False
        )
    assert not has_adapters(pipe_to_load.text_encoder) and not has_adapters(pipe_to_load.unet)


def test_no_part_is_lost(tmp_path: Path) -> None:
    pipe = pipeline("sd")
    apply(pipe)
    peftcore.save(pipe.components, tmp_path / "a", format="diffusers")
    for layout in ("diffusers", "kohya"):
        with pytest.raises(
            peftcore.CheckpointError, match=r"also contains text_encoder \(16 tensors\), which this save would de"
        ):
            peftcore.save(pipe.unet, tmp_path / "a", format=layout)
    peftcore.save(pipe.components, tmp_path / "a", format="kohya")
    peftcore.save(pipe.unet, tmp_path / "b")
    with pytest.raises(peftcore.CheckpointError, match="contains an adapter in another format"):
        peftcore.save(pipe.unet, tmp_path / "b", format="diffusers")
    shutil.copy(tmp_path / "a" / FILE, tmp_path / "b" / FILE)
    with pytest.raises(peftcore.CheckpointError, match="contains two adapters"):
        peftcore.load(pipeline("sd").unet, tmp_path / "b")


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    pipe = pipeline("sd3")
    with pytest.raises(peftcore.PeftcoreError, match="none of the models has adapters"):
        peftcore.save(pipe.components, tmp_path, format="diffusers")
    peftcore.apply(pipe.text_encoder, "lora", target_modules=["q_proj", "text_projection"], modules_to_save=())
    with pytest.raises(
        peftcore.PeftcoreError, match=r"can be 'text_encoder' or 'text_encoder_2' of a pipeline. Pass it under its name"
    ):
        peftcore.save(pipe.text_encoder, tmp_path, format="diffusers")
    with pytest.raises(peftcore.PeftcoreError, match="text encoder's attention but without out_proj"):
        peftcore.save({"text_encoder": pipe.text_encoder}, tmp_path, format="kohya")
    peftcore.apply(pipe.transformer, "lora", target_modules=["to_q"])
    with pytest.raises(
        peftcore.PeftcoreError, match="diffusers knows no kohya name for 2 layers of SD3Transformer2DModel"
    ):
        peftcore.save(pipe.transformer, tmp_path, format="kohya")
    unet = peftcore.apply(pipelines.unet(), "lora", target_modules=["to_q"], modules_to_save=["conv_norm_out"])
    with pytest.raises(peftcore.PeftcoreError, match=r"'conv_norm_out.weight' cannot be in a file for pipelines"):
        peftcore.save(unet, tmp_path, format="diffusers")
    with pytest.raises(peftcore.PeftcoreError, match=r"format='peft' saves one model, found dict"):
        peftcore.save({"unet": unet}, tmp_path)
    dora = peftcore.apply(pipelines.unet(), "dora", target_modules=["to_q"])
    with pytest.raises(peftcore.PeftcoreError, match="has DoRA, which diffusers does not read from a kohya file"):
        peftcore.save(dora, tmp_path, format="kohya")
    with pytest.raises(peftcore.PeftcoreError, match="'default' \\(ia3\\) cannot be saved in the format 'kohya'"):
        peftcore.save(peftcore.apply(pipelines.text_encoder(), "ia3"), tmp_path, format="kohya")
    assert not list(tmp_path.iterdir())


STEM = "lora_unet_down_blocks_1_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{STEM}.lora_mid.weight": torch.ones(2, 2, 1, 1)}, r"are not LoRA, such as '.*proj_in.lora_mid.weight'"),
        ({f"{STEM}.alpha": torch.tensor(0.0)}, "must be finite and not 0, found 0.0"),
        ({f"{STEM}.alpha": torch.tensor(float("nan"))}, "must be finite and not 0, found nan"),
        ({f"{STEM}.alpha": torch.ones(3)}, "must be one number, found"),
        ({f"{STEM}.lora_up.weight": torch.ones(32, 3, 1, 1)}, r"has A \[2, 32, 1, 1\] and B \[32, 3, 1, 1\]"),
        ({f"{STEM}.lora_up.weight": torch.ones(0)}, "which are no"),
        ({f"{STEM}.lora_up.weight": None}, r"lora_B \(up\) of .* is missing"),
        ({f"{STEM}.lora_up.weight": torch.ones(31, 2, 1, 1)}, "but in this model it has 32 outputs"),
        ({f"{STEM}.lora_down.weight": torch.ones(2, 31, 1, 1)}, "has shape"),
        ({f"{STEM}.lora_down.weight": torch.full((2, 32, 1, 1), float("inf"))}, "not finite"),
        (
            {"lora_unet_nothing.lora_down.weight": torch.ones(2, 2)},
            r"are not layers of UNet2DConditionModel: 'nothing'",
        ),
        ({"conv_in.weight": torch.ones(2)}, "is not in a known format"),
        ({"unet.conv_in.lora_A.weight": torch.ones(2)}, "is not in a known format"),
    ],
)
def test_hostile_files(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    unet = pipelines.unet()
    tensors = of_kohya(unet, {STEM.removeprefix("lora_unet_"): "down_blocks.1.attentions.0.proj_in"})
    tensors = {name: t for name, t in {**tensors, **change}.items() if t is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(peftcore.CheckpointError, match=message):
        peftcore.load(unet, tmp_path / "a.safetensors")
    assert not has_adapters(unet)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "is not a JSON object"),
        ('{"unet.r": 5, "unet.lora_alpha": 4}', "the header has r=5"),
        ('{"unet.r": 4, "unet.lora_alpha": "x"}', "the header has lora_alpha='x'"),
        ('{"unet.r": 4, "unet.rank_pattern": {"((a+)+)+$": 4}}', None),
        ('{"unet.r": 4, "unet.init_lora_weights": "corda"}', "was trained with init_lora_weights='corda'"),
        ('{"unet.r": 4, "unet.flux": 4}', "flux"),
        ('{"unet.r": 4, "unet.use_dora": true}', "has use_dora=true, but no tensor is a magnitude"),
        ('{"unet.r": 4, "unet.rank_pattern": [1]}', "the plugin 'lora' cannot use"),
    ],
)
def test_hostile_headers(header: str, message: str | None, tmp_path: Path) -> None:
    unet = peftcore.apply(pipelines.unet(), "lora", r=4, target_modules=["to_q"])
    peftcore.save(unet, tmp_path, format="diffusers")
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, {"lora_adapter_metadata": header})
    if message is None:
        peftcore.load(pipelines.unet(), tmp_path)
        return
    with pytest.raises(peftcore.CheckpointError, match=message):
        peftcore.load(pipelines.unet(), tmp_path)


def test_of_another_base(tmp_path: Path) -> None:
    unet = peftcore.apply(pipeline("sd").unet, "lora", target_modules=["to_q"])
    peftcore.save(unet, tmp_path, format="diffusers")
    with pytest.raises(peftcore.CheckpointError, match="was trained on another base"):
        peftcore.load(pipeline("sd", 1).unet, tmp_path)
    peftcore.load(pipeline("sd", 1).unet, tmp_path, check_base=False)
