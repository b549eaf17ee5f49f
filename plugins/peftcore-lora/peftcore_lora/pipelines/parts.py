"""Parts of a diffusers pipeline, found by a model's class without importing diffusers or transformers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftcore.plugin import PeftcoreError, original_class

UNET, TRANSFORMER, TEXT_ENCODER = "unet", "transformer", "text_encoder"
ONE_OF_TEXT = (TEXT_ENCODER, f"{TEXT_ENCODER}_2")


def parts(model: nn.Module, called: str | None) -> list[str]:
    """Return the parts of a pipeline that a model may be; only one if `called` names it.

    Diffusers reads LoRA only of CLIP among text encoders.
    """
    may_be = _parts(model)
    if called is not None and called in may_be:
        return [called]
    if called is None and may_be:
        return may_be
    kind = original_class(model).__name__
    known = f"It may be {' or '.join(map(repr, may_be))}" if may_be else "Save it in PEFT's layout: format='peft'"
    what = (
        f"a {kind} is not read as '{called}' of a pipeline"
        if called
        else f"a {kind} is not a part of a pipeline whose LoRA can be read"
    )
    raise PeftcoreError(f"{what}. {known}")


def _parts(model: nn.Module) -> list[str]:
    cls = original_class(model)
    names = [f"{each.__module__}.{each.__qualname__}" for each in cls.__mro__]
    if is_a(names, "transformers.", "CLIPTextModelWithProjection"):
        return list(ONE_OF_TEXT)  # SDXL's second, SD 3's both
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
    """Return whether it is a CLIP text encoder without the `text_model.` of others' files (transformers 5)."""
    return TEXT_ENCODER in _parts(model) and not hasattr(model, "text_model")
