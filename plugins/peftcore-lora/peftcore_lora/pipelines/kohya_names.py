"""Names of layers in kohya's files, each with the layers that it covers.

They are paths with _ for each dot, and the names of the models' first authors: Stable Diffusion's
(`input_blocks.1.1.proj_in`) and Flux' (`double_blocks.0.img_attn.qkv`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from peftcore.plugin import original_class
from peftcore_lora.pipelines.layer_changes import layers
from peftcore_lora.pipelines.parts import has_flat_clip


class Name(NamedTuple):
    """Layers with concatenated outputs; `swapped`: the halves of the output are exchanged."""

    paths: tuple[str, ...]
    swapped: bool = False


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
SWAPPED = {"final_layer.adaLN_modulation.1"}  # shift and scale in the file, scale and shift in diffusers


def names_of(model: nn.Module) -> dict[str, Name]:
    """Return all names that a file may use for a model's layers, except ambiguous ones."""
    there = layers(model)
    found: dict[str, Name] = {}
    twice: set[str] = set()
    prefixes = ("", "text_model.") if has_flat_clip(model) else ("",)
    own = [(f"{prefix}{path}", Name((path,))) for path in there for prefix in prefixes]
    for path, name in [*own, *_unet(model), *_flux(model)]:
        flat = path.replace(".", "_")
        if all(each in there for each in name.paths) and found.setdefault(flat, name) != name:
            twice.add(flat)
    return {flat: name for flat, name in found.items() if flat not in twice}


def written_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names to write layers with, which diffusers reads."""
    there, known = layers(model), names_of(model)
    if is_flux(model):
        chosen = {path.replace(".", "_") for path, name in _flux(model) if "blocks" in path}
    elif is_unet(model):
        ends = {path.replace(".", "_") for path in UNET_ENDS if path.startswith("label_emb")}
        chosen = {path.replace(".", "_") for path in there if not path.startswith("add_embedding")} | ends
    elif is_clip(model):
        prefix = "text_model." if has_flat_clip(model) else ""
        chosen = {f"{prefix}{path}".replace(".", "_") for path in there}
    else:
        return {}
    return {flat: name.paths for flat, name in known.items() if flat in chosen}


def is_unet(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("down_blocks", "mid_block", "up_blocks", "conv_in"))


def is_flux(model: nn.Module) -> bool:
    return original_class(model).__name__ == "FluxTransformer2DModel"


def is_clip(model: nn.Module) -> bool:
    return original_class(model).__name__ in ("CLIPTextModel", "CLIPTextModelWithProjection")


def _flux(model: Any) -> Iterator[tuple[str, Name]]:
    if not is_flux(model):
        return
    for there, here, table in (
        ("double_blocks", "transformer_blocks", DOUBLE),
        ("single_blocks", "single_transformer_blocks", SINGLE),
    ):
        for i in range(len(getattr(model, here))):
            for name, paths in table.items():
                yield f"{there}.{i}.{name}", Name(tuple(f"{here}.{i}.{path}" for path in paths))
    for name, path in FLUX_ENDS.items():
        yield name, Name((path,), name in SWAPPED)


def _unet(model: Any) -> Iterator[tuple[str, Name]]:
    """Yield Stable Diffusion's original names: every resnet or sampler is a block, with its attention next to it."""
    if not is_unet(model):
        return
    there = layers(model)
    blocks: list[tuple[str, str]] = []  # (original prefix, ours)
    n = 1
    for i, down in enumerate(model.down_blocks):
        for j in range(len(getattr(down, "resnets", ()))):
            blocks += [
                (f"input_blocks.{n}.{k}", f"down_blocks.{i}.{kind}.{j}")
                for k, kind in enumerate(("resnets", "attentions"))
            ]
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
            inside = [f"up_blocks.{i}.{kind}.{j}" for kind in kinds]
            if j == count - 1 and getattr(up, "upsamplers", None):
                inside.append(f"up_blocks.{i}.upsamplers.0")
            blocks += [(f"output_blocks.{n}.{k}", path) for k, path in enumerate(inside)]
            n += 1
    for prefix, path in blocks:
        renamed = {f"{path}.{ours}": f"{prefix}.{theirs}" for theirs, ours in RESNET.items()}
        renamed |= {f"{path}.conv": f"{prefix}.{'op' if 'downsamplers' in path else 'conv'}"}
        for layer in there:
            if layer.startswith(f"{path}."):
                yield renamed.get(layer, f"{prefix}{layer.removeprefix(path)}"), Name((layer,))
    for theirs, ours in UNET_ENDS.items():
        yield theirs, Name((ours,))
