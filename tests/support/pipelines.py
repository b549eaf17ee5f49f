"""diffusers' pipelines, tiny and random, and a forward of each of their models."""

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed (extra `test`)")

import diffusers
import transformers

import peftcore
from peftcore.engine import state_of

QUIET = [  # of diffusers, PEFT and transformers, on tiny configs
    pytest.mark.filterwarnings(f"ignore:::{module}")
    for module in (r"diffusers\..*", r"peft\..*", r"transformers\..*", r"torch\..*", r"huggingface_hub\..*")
]
VOCABULARY = 40
FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
EVERY = (
    r".*\.(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|[qkv]_proj|out_proj|fc[12]|text_projection"
)
EVERY += r"|conv1|conv2|conv_shortcut|conv|time_emb_proj|linear_1|linear_2|add_[qkv]_proj|to_add_out|linear|proj_mlp)"
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
}


def text_encoder(kind: str = "CLIPTextModel") -> nn.Module:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **CLIP, **ends)
    return getattr(transformers, kind)(config).eval()


def unet(**fields: Any) -> nn.Module:
    sizes = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    given = {**sizes, **blocks, "cross_attention_dim": 32, "attention_head_dim": 8, **fields}
    return diffusers.UNet2DConditionModel(**given).eval()


def unet_xl() -> nn.Module:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    return unet(transformer_layers_per_block=(1, 2), use_linear_projection=True, cross_attention_dim=64, **added)


def flux_transformer() -> nn.Module:
    sizes = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    embedded = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    return diffusers.FluxTransformer2DModel(patch_size=1, in_channels=4, **sizes, **embedded).eval()


def sd3_transformer() -> nn.Module:
    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    embedded = {"joint_attention_dim": 32, "pooled_projection_dim": 64}
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, **sizes, **embedded
    ).eval()


def pipeline(kind: str, seed: int = 0) -> Any:
    """Of "sd", "sdxl", "flux", "sd3"; the same weights for the same seed."""
    torch.manual_seed(seed)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if kind in ("flux", "sd3") else _ddim()
    given: dict[str, Any] = {"scheduler": scheduler, "vae": None, "tokenizer": None}
    with_projection = functools.partial(text_encoder, "CLIPTextModelWithProjection")
    if kind == "sd":
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False, "vae": _vae()}
        return diffusers.StableDiffusionPipeline(**{**given, **none}, text_encoder=text_encoder(), unet=unet())
    if kind == "sdxl":
        texts = {"text_encoder": text_encoder(), "text_encoder_2": with_projection(), "tokenizer_2": None}
        return diffusers.StableDiffusionXLPipeline(**{**given, "vae": _vae()}, **texts, unet=unet_xl())
    if kind == "flux":
        texts = {"text_encoder": text_encoder(), "text_encoder_2": None, "tokenizer_2": None}
        return diffusers.FluxPipeline(**given, **texts, transformer=flux_transformer())
    texts = {"text_encoder": with_projection(), "text_encoder_2": with_projection(), "tokenizer_2": None}
    third = {"text_encoder_3": None, "tokenizer_3": None}
    return diffusers.StableDiffusion3Pipeline(**given, **texts, **third, transformer=sd3_transformer())


def _ddim() -> Any:
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def _vae() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=8, **blocks)


def models(pipe: Any) -> dict[str, nn.Module]:
    """Those whose LoRA diffusers reads."""
    return {name: getattr(pipe, name) for name in type(pipe)._lora_loadable_modules if getattr(pipe, name) is not None}


@torch.no_grad()
def output(model: nn.Module, **options: Any) -> Tensor:
    """Of a forward on inputs that are always the same."""
    generator, dtype = (
        torch.Generator().manual_seed(1),
        next(p.dtype for p in model.parameters() if p.is_floating_point()),
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    config: Any = model.config
    match type(model).__name__.removesuffix("WithProjection"):
        case "UNet2DConditionModel":
            added = {"text_embeds": normal(1, 32), "time_ids": torch.arange(6.0)[None]}
            given = {"added_cond_kwargs": added} if config.addition_embed_type else {}
            return model(normal(1, 4, 8, 8), 3, normal(1, 5, config.cross_attention_dim), **given, **options).sample
        case "FluxTransformer2DModel":
            ids = {"img_ids": torch.arange(27.0).view(9, 3), "txt_ids": torch.zeros(5, 3)}
            given = {"pooled_projections": normal(1, 32), "timestep": torch.tensor([0.3]), **ids}
            return model(
                hidden_states=normal(1, 9, 4), encoder_hidden_states=normal(1, 5, 32), **given, **options
            ).sample
        case "SD3Transformer2DModel":
            given = {"pooled_projections": normal(1, 64), "timestep": torch.tensor([3.0])}
            return model(hidden_states=normal(1, 4, 8, 8), encoder_hidden_states=normal(1, 5, 32), **given).sample
        case _:
            found = model(torch.arange(3, 10)[None])
            pooled = found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output
            return torch.cat([found.last_hidden_state.flatten(), pooled.flatten()])


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def there(model: nn.Module, ends: tuple[str, ...]) -> list[str]:
    return [end for end in ends if any(path.endswith(f".{end}") for path, _ in model.named_modules())]


def apply(pipe: Any, method: str = "lora", targets: Any = None, **fields: Any) -> dict[str, Tensor]:
    """LoRA that changes something on every model of a pipeline; the outputs."""
    for model in models(pipe).values():
        chosen = targets if isinstance(targets, str) else there(model, targets or ATTENTION)
        given = {"init_lora_weights": False, "modules_to_save": (), "target_modules": chosen}
        peftcore.apply(model, method, **{"r": 4, **given, **fields})
    return {name: output(model) for name, model in models(pipe).items()}


def of_kohya(model: nn.Module, known: Mapping[str, str], alpha: float = 1.0) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for flat, path in known.items():
        weight = model.get_submodule(path).weight
        tensors[f"lora_unet_{flat}.lora_down.weight"] = torch.randn(2, *weight.shape[1:]) / 8
        tensors[f"lora_unet_{flat}.lora_up.weight"] = torch.randn(weight.shape[0], 2, *[1] * (weight.dim() - 2)) / 8
        tensors[f"lora_unet_{flat}.alpha"] = torch.tensor(alpha)
    return tensors


def has_adapters(model: nn.Module) -> bool:
    return state_of(model) is not None
