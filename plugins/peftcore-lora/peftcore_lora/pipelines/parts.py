"""Parts of a diffusers pipeline, told by a model's class without importing diffusers or transformers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftcore.plugin import PeftcoreError, original_class

UNET, TRANSFORMER, TEXT_ENCODER = "unet", "transformer", "text_encoder"
CLIP_WITH_PROJECTION = (TEXT_ENCODER, f"{TEXT_ENCODER}_2")  # SDXL's second text encoder, and both of SD 3


def parts(model: nn.Module, part_name: str | None) -> list[str]:
    """Return the parts of a pipeline that a model may be; only `part_name`, if it is one of them.

    Of text encoders, diffusers reads LoRA only for CLIP.

    Raises:
        PeftcoreError: the model is not such a part, or not `part_name`.
    """
    candidates = _parts(model)
    if part_name is not None and part_name in candidates:
        return [part_name]
    if part_name is None and candidates:
        return candidates
    class_name = original_class(model).__name__
    problem = f"diffusers does not support LoRA for a {class_name}"
    if part_name:
        problem += f" as '{part_name}' of a pipeline"
    if candidates:
        raise PeftcoreError(f"{problem}. It can be {' or '.join(map(repr, candidates))}")
    raise PeftcoreError(f"{problem}. Save it in PEFT's layout: format='peft'")


def _parts(model: nn.Module) -> list[str]:
    cls = original_class(model)
    names = [f"{base_class.__module__}.{base_class.__qualname__}" for base_class in cls.__mro__]
    if is_a(names, "transformers.", "CLIPTextModelWithProjection"):
        return list(CLIP_WITH_PROJECTION)
    if is_a(names, "transformers.", "CLIPTextModel"):
        return [TEXT_ENCODER]
    if is_a(names, "diffusers.", "ModelMixin"):
        if cls.__name__.startswith("UNet"):
            return [UNET]
        if "Transformer" in cls.__name__:
            return [TRANSFORMER]
    return []


def is_a(names: Iterable[str], library: str, kind: str) -> bool:
    return any(name.startswith(library) and name.endswith(f".{kind}") for name in names)


def has_flat_clip(model: nn.Module) -> bool:
    """Return whether the model is a CLIP text encoder of transformers 5, which has no `text_model.` in its paths."""
    return TEXT_ENCODER in _parts(model) and not hasattr(model, "text_model")
