"""Names of layers in kohya's files, and the layers of a diffusers model that each name covers.

A name is a path with _ for each dot. It is diffusers' path, or the one in the model's original release: Stable
Diffusion's `input_blocks.1.1.proj_in`, Flux' `double_blocks.0.img_attn.qkv`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from peftcore.plugin import original_class
from peftcore_lora.pipelines.layer_changes import adaptable_layers
from peftcore_lora.pipelines.parts import has_flat_clip


class Name(NamedTuple):
    """Layers whose outputs one name concatenates, and whether the file has the halves of the output exchanged."""

    paths: tuple[str, ...]
    swaps_halves: bool = False


RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
SWAPPED_HALVES = {"final_layer.adaLN_modulation.1"}  # shift and scale in the file, scale and shift in diffusers


def readable_names(model: nn.Module) -> dict[str, Name]:
    """Return all names that a file may use for a model's layers, except ambiguous ones."""
    layers = adaptable_layers(model)
    names: dict[str, Name] = {}
    ambiguous: set[str] = set()
    diffusers_names = [(path, Name((path,))) for path in layers]
    if has_flat_clip(model):
        diffusers_names += [(f"text_model.{path}", Name((path,))) for path in layers]
    for path, name in [*diffusers_names, *_unet(model), *_flux(model)]:
        flat_name = path.replace(".", "_")
        if all(layer in layers for layer in name.paths) and names.setdefault(flat_name, name) != name:
            ambiguous.add(flat_name)
    return {flat_name: name for flat_name, name in names.items() if flat_name not in ambiguous}


def names_to_write(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names to save a model's layers under, which diffusers can read, and the layers that each covers."""
    layers = adaptable_layers(model)
    if is_flux(model):
        paths = [path for path, _ in _flux(model) if "blocks" in path]
    elif is_unet(model):
        paths = [path for path in layers if not path.startswith("add_embedding")]
        paths += [path for path in UNET_ENDS if path.startswith("label_emb")]
    elif is_clip(model):
        prefix = "text_model." if has_flat_clip(model) else ""
        paths = [f"{prefix}{path}" for path in layers]
    else:
        return {}
    flat_names = {path.replace(".", "_") for path in paths}
    return {flat_name: name.paths for flat_name, name in readable_names(model).items() if flat_name in flat_names}


def is_unet(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("down_blocks", "mid_block", "up_blocks", "conv_in"))


def is_flux(model: nn.Module) -> bool:
    return original_class(model).__name__ == "FluxTransformer2DModel"


def is_clip(model: nn.Module) -> bool:
    return original_class(model).__name__ in ("CLIPTextModel", "CLIPTextModelWithProjection")


def _flux(model: Any) -> Iterator[tuple[str, Name]]:
    if not is_flux(model):
        return
    for original_blocks, diffusers_blocks, table in (
        ("double_blocks", "transformer_blocks", DOUBLE),
        ("single_blocks", "single_transformer_blocks", SINGLE),
    ):
        for i in range(len(getattr(model, diffusers_blocks))):
            for name, paths in table.items():
                yield f"{original_blocks}.{i}.{name}", Name(tuple(f"{diffusers_blocks}.{i}.{path}" for path in paths))
    for name, path in FLUX_ENDS.items():
        yield name, Name((path,), name in SWAPPED_HALVES)


def _unet(model: Any) -> Iterator[tuple[str, Name]]:
    """Yield Stable Diffusion's original names, where each resnet or sampler has a block, with its attention if any."""
    if not is_unet(model):
        return
    layers = adaptable_layers(model)
    blocks: list[tuple[str, str]] = []  # (prefix in the original release, prefix in diffusers)
    n = 1
    for i, down in enumerate(model.down_blocks):
        for j in range(len(getattr(down, "resnets", ()))):
            blocks.append((f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}"))
            blocks.append((f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}"))
            n += 1
        if getattr(down, "downsamplers", None):
            blocks.append((f"input_blocks.{n}.0", f"down_blocks.{i}.downsamplers.0"))
            n += 1
    middle = ("resnets.0", "attentions.0", "resnets.1")
    blocks += [(f"middle_block.{k}", f"mid_block.{path}") for k, path in enumerate(middle)]
    n = 0
    for i, up in enumerate(model.up_blocks):
        count = len(getattr(up, "resnets", ()))
        for j in range(count):
            kinds = ["resnets", *(["attentions"] if getattr(up, "attentions", None) else [])]
            block_paths = [f"up_blocks.{i}.{kind}.{j}" for kind in kinds]
            if j == count - 1 and getattr(up, "upsamplers", None):
                block_paths.append(f"up_blocks.{i}.upsamplers.0")
            blocks += [(f"output_blocks.{n}.{k}", path) for k, path in enumerate(block_paths)]
            n += 1
    for prefix, path in blocks:
        original_names = {f"{path}.{name}": f"{prefix}.{original}" for original, name in RESNET.items()}
        original_names[f"{path}.conv"] = f"{prefix}.op" if "downsamplers" in path else f"{prefix}.conv"
        for layer in layers:
            if layer.startswith(f"{path}."):
                yield original_names.get(layer, f"{prefix}{layer.removeprefix(path)}"), Name((layer,))
    for original, name in UNET_ENDS.items():
        yield original, Name((name,))
