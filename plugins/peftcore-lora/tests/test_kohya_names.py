"""Names and scales of kohya's files: as diffusers understands them, or by the formula."""

from pathlib import Path

import pytest
import torch
from peftcore_lora.pipelines.kohya_file import FORMAT
from peftcore_lora.pipelines.kohya_names import readable_names
from safetensors.torch import save_file
from support import pipelines
from support.pipelines import FILE, is_layer, of_kohya, output, pipeline
from torch import Tensor

import peftcore

pytestmark = [*pipelines.QUIET, pytest.mark.filterwarnings("ignore:.* reaches ")]


def test_names_of_stable_diffusion(tmp_path: Path) -> None:
    """Of every layer of SDXL's UNet, as diffusers understands them, with which sd-scripts writes."""
    pipe = pipeline("sdxl")
    every = {path for path, module in pipe.unet.named_modules() if is_layer(module)}
    known = {
        flat: name.paths[0]
        for flat, name in readable_names(pipe.unet).items()
        if name.paths[0].replace(".", "_") != flat
    }
    assert set(known.values()) == every
    torch.manual_seed(3)
    save_file(of_kohya(pipe.unet, known), tmp_path / FILE)
    pipe.load_lora_weights(tmp_path)
    reloaded_model = peftcore.load(pipeline("sdxl").unet, tmp_path)
    torch.testing.assert_close(output(reloaded_model), output(pipe.unet), rtol=1e-5, atol=1e-5)


def test_alphas_that_differ(tmp_path: Path) -> None:
    """sd-scripts scales each layer by its own, which diffusers does not."""
    unet = pipeline("sd").unet
    paths = [path for path, _ in unet.named_modules() if path.endswith((".to_q", ".conv1"))]
    tensors = of_kohya(unet, {path.replace(".", "_"): path for path in paths})
    expected = {}
    for i, path in enumerate(paths):
        stem = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{stem}.alpha"] = torch.tensor(float(i + 1))
        product = tensors[f"{stem}.lora_up.weight"].flatten(1) @ tensors[f"{stem}.lora_down.weight"].flatten(1)
        weight = unet.get_submodule(path).weight
        expected[path] = weight + (i + 1) / 2 * product.view_as(weight)
    del tensors[f"lora_unet_{paths[1].replace('.', '_')}.alpha"]  # 2, as r is
    save_file(tensors, tmp_path / "last.safetensors")
    peftcore.merge(peftcore.load(unet, tmp_path / "last.safetensors"), undo=True)
    for path, weight in expected.items():
        torch.testing.assert_close(unet.get_submodule(path).weight, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [True, False])
def test_names_of_flux(blocks: bool, tmp_path: Path) -> None:
    """Projections that were one layer share A, or have a part of it, where B is a diagonal of blocks."""
    pipe = pipeline("flux")
    torch.manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for flat, name in readable_names(pipe.transformer).items():
        if flat.startswith("double_blocks"):
            rows = [pipe.transformer.get_submodule(path).weight.shape[0] for path in name.paths]
            width = pipe.transformer.get_submodule(name.paths[0]).weight.shape[1]
            n, up = len(rows), torch.randn(sum(rows), 6)
            if blocks and n > 1:
                up = torch.block_diag(*(torch.randn(row, 6 // n) for row in rows))
            tensors |= {
                f"lora_unet_{flat}.lora_down.weight": torch.randn(6, width) / 4,
                f"lora_unet_{flat}.lora_up.weight": up,
            }
            tensors[f"lora_unet_{flat}.alpha"] = torch.tensor(3.0)
    assert len(tensors) == 3 * 10
    save_file(tensors, tmp_path / FILE)
    pipe.load_lora_weights(tmp_path)
    reloaded_model = peftcore.load(pipeline("flux").transformer, tmp_path)
    torch.testing.assert_close(output(reloaded_model), output(pipe.transformer), rtol=1e-5, atol=1e-5)
    comfy = {
        name.replace("lora_unet_double_blocks_0_", "diffusion_model.double_blocks.0.")
        .replace("img_attn_", "img_attn.")
        .replace("txt_attn_", "txt_attn."): t
        for name, t in tensors.items()
        if "attn" in name
    }
    save_file(comfy, tmp_path / "comfy.safetensors")
    reloaded = peftcore.load(pipeline("flux").transformer, tmp_path / "comfy.safetensors")
    assert (output(reloaded) - output(pipeline("flux").transformer)).abs().max() > 1e-3


def test_single_blocks_of_flux_as_diffusers_takes_them_apart(tmp_path: Path) -> None:
    """It does so for Flux' own sizes alone; A and B are those that were written, for each of the four."""
    import diffusers

    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=0, num_single_layers=1, guidance_embeds=True)
        peftcore.apply(model, "lora", r=2, lora_alpha=4, target_modules=r"single.*(to_q|to_v|proj_mlp|proj_out)")
    torch.manual_seed(0)
    written_tensors = peftcore.state_dict(model, "default")
    written_tensors = {name: torch.randn(tensor.shape) for name, tensor in written_tensors.items()}

    fields = {"lora_alpha": 4, "alpha_pattern": {}}
    tensors, _ = FORMAT.write({"unet": (model, dict(written_tensors), fields)})
    diffusers_tensors = diffusers.FluxPipeline.lora_state_dict({name: t.clone() for name, t in tensors.items()})
    for path in ("attn.to_q", "attn.to_v", "proj_mlp", "proj_out"):
        a, b = (
            written_tensors[f"base_model.model.single_transformer_blocks.0.{path}.lora_{letter}.weight"]
            for letter in "AB"
        )
        diffusers_factors = [
            diffusers_tensors[f"transformer.single_transformer_blocks.0.{path}.lora_{letter}.weight"] for letter in "AB"
        ]
        x = torch.randn(a.shape[1])
        torch.testing.assert_close(
            diffusers_factors[1] @ (diffusers_factors[0] @ x), 2 * b @ (a @ x), rtol=1e-4, atol=1e-3
        )
    assert not diffusers_tensors["transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight"].any()
    back, read = FORMAT.read(model, "unet", FORMAT.split(tensors)["unet"], {})
    assert read["lora_alpha"] / read["r"] == 2 and back.keys() == written_tensors.keys()
    for name, tensor in written_tensors.items():
        assert torch.equal(back[name], tensor)


def test_the_last_layer_of_flux_has_its_halves_the_other_way_round(tmp_path: Path) -> None:
    model = pipeline("flux").transformer
    before = model.norm_out.linear.weight.detach().clone()
    a, b = torch.randn(2, 32), torch.randn(64, 2)
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    save_file({f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}, tmp_path / "a.safetensors")
    peftcore.merge(peftcore.load(model, tmp_path / "a.safetensors"), undo=True)
    shift, scale = (b @ a).chunk(2)
    torch.testing.assert_close(model.norm_out.linear.weight, before + torch.cat([scale, shift]))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_scale(axis: str, tmp_path: Path) -> None:
    unet = pipelines.unet()
    paths = [path for path, _ in unet.named_modules() if path.endswith((".to_q", ".conv1"))]
    tensors = of_kohya(unet, {path.replace(".", "_"): path for path in paths})
    expected = {}
    for path in paths:
        stem, weight = f"lora_unet_{path.replace('.', '_')}", unet.get_submodule(path).weight.detach()
        size = [weight.shape[0], 1] if axis == "out" else [1, weight.shape[1]]
        scale = torch.rand([*size, *[1] * (weight.dim() - 2)]) + 0.5
        tensors[f"{stem}.dora_scale"] = scale
        product = tensors[f"{stem}.lora_up.weight"].flatten(1) @ tensors[f"{stem}.lora_down.weight"].flatten(1)
        changed = weight + product.view_as(weight) / 2
        norm = changed.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
        expected[path] = scale * changed / norm
    save_file(tensors, tmp_path / "a.safetensors")
    if axis == "in":
        with pytest.raises(peftcore.CheckpointError, match="Numbers per input"):
            peftcore.load(unet, tmp_path / "a.safetensors")
        return
    peftcore.merge(peftcore.load(unet, tmp_path / "a.safetensors"), undo=True)
    for path, weight in expected.items():
        torch.testing.assert_close(unet.get_submodule(path).weight, weight, rtol=1e-5, atol=1e-5)
