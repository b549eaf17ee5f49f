"""Images beside text: what a model takes that puts them in the place of tokens, or attends to them across."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from census.case import Case
from peftcore.model.inputs import BATCH, LENGTH, Facts
from peftcore.plugin.architecture import text_config

_TOKEN = ("image_token_id", "image_token_index")


def with_images(model: nn.Module) -> Case | None:
    """A case with an image before most of each row's text; None for a model that takes none, or not so.

    An image stands for as many tokens as the model makes vectors of it.
    """
    facts = Facts(model, torch.device("cpu"))
    if not facts.has("input_ids") or not facts.has("pixel_values"):
        return None
    named = (getattr(model.config, name, None) for name in _TOKEN)
    token = next((each for each in named if each is not None), None)
    features = next((m.get_image_features for m in model.modules() if hasattr(m, "get_image_features")), None)
    if token is None or features is None:
        return None
    known = inspect.signature(features).parameters
    for pixels in _pixels(facts):
        with suppress(Exception):
            found = features(**{name: value for name, value in pixels.items() if name in known})
            count, rest = divmod(_vectors(found, text_config(model.config).hidden_size), BATCH)
            if count and not rest:
                return Case.of(model, _beside_text(facts, pixels, token, count))
    return None


def _beside_text(facts: Facts, pixels: dict[str, Any], token: int, count: int) -> dict[str, Any]:
    tokens = facts.tokens(BATCH, count + LENGTH)
    tokens[:, 1 : 1 + count] = token
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **pixels}
    if getattr(facts.model.config, "is_encoder_decoder", False):  # else some make them of `input_ids`
        inputs["decoder_input_ids"] = facts.tokens(BATCH, LENGTH)
    types = (tokens == token).long()
    inputs |= {name: types for name in ("token_type_ids", "mm_token_type_ids")}
    return {name: value for name, value in inputs.items() if facts.has(name)}


def _vectors(found: Any, width: int) -> int:
    """How many vectors of the language model's width an image's features are."""
    found = getattr(found, "pooler_output", found)
    if isinstance(found, Tensor):
        return found.numel() // width
    return sum(_vectors(each, width) for each in found) if isinstance(found, (list, tuple)) else 0


def _pixels(facts: Facts) -> Iterator[dict[str, Any]]:
    """Ways in which models take an image for each row."""
    image = facts.floats(BATCH, 3, *_size(facts))
    sizes = torch.tensor([_size(facts)] * BATCH)
    patch = facts.find("patch_size", inside="vision", default=16)
    patch = patch if isinstance(patch, int) else 16
    if facts.has("image_grid_thw"):
        merge = facts.find("spatial_merge_size", "merge_size", inside="vision", default=2)
        frames = facts.find("temporal_patch_size", "patch_temporal", inside="vision", default=1)
        grid = torch.tensor([[1, 2 * merge, 2 * merge]] * BATCH)
        yield {"pixel_values": facts.floats(int(grid.prod(-1).sum()), 3 * frames * patch**2), "image_grid_thw": grid}
        yield {"pixel_values": facts.floats(int(grid.prod(-1).sum()), 3 * patch**2), "image_grid_thw": grid}
        yield {"pixel_values": facts.floats(int(grid.prod(-1).sum()), 3, patch, patch), "image_grid_thw": grid}
    if facts.has("image_position_ids"):
        side = 2 * facts.find("pooling_kernel_size", default=1)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(BATCH, -1, -1)
        yield {"pixel_values": facts.floats(BATCH, side**2, 3 * patch**2), "image_position_ids": places}
    if facts.has("spatial_shapes"):
        shapes = torch.tensor([[4, 4]] * BATCH)
        mask = facts.whole(1, BATCH, 16)
        yield {
            "pixel_values": facts.floats(BATCH, 16, 3 * patch**2),
            "spatial_shapes": shapes,
            "pixel_attention_mask": mask,
        }
    yield {"pixel_values": image}
    yield {"pixel_values": image, "image_sizes": sizes}
    yield {"pixel_values": image[:, None].repeat(1, 2, 1, 1, 1), "image_sizes": sizes}
    yield {"pixel_values": image[:, None].repeat(1, 2, 1, 1, 1)}
    yield {"pixel_values": image[:, None]}


def _size(facts: Facts) -> tuple[int, int]:
    size = facts.find("image_size", inside="vision", default=64)
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
