"""What model classes expect of images and videos."""

from __future__ import annotations

from typing import Any

import torch

from census.changes import of
from peftcore.model.inputs import BATCH, LENGTH, Facts


@of("PerceiverForImageClassification.*")
def _images_as_inputs(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    size = facts.model.config.image_size if "Learned" in type(facts.model).__name__ else 224
    return {"inputs": facts.floats(BATCH, 3, size, size)}


@of("Siglip2.*")
def _patches_of_each_image(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    size = getattr(config, "vision_config", config).patch_size
    shapes = torch.tensor([[4, 4], [2, 3]])
    mask = torch.arange(16) < shapes.prod(-1, keepdim=True)
    patches = facts.floats(BATCH, 16, 3 * size * size)
    return {**found, "pixel_values": patches, "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}


@of("LightGlueForKeypointMatching", "SuperGlueForKeypointMatching", "EfficientLoFTR.*")
def _pairs_of_images(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"pixel_values": facts.floats(BATCH, 2, 3, 64, 64)}


@of("InstructBlip.*", "Blip2ForConditionalGeneration", "Blip2Model")
def _queries_as_tokens(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    video = "Video" in type(facts.model).__name__
    queries = config.num_query_tokens * (facts.find("num_frames", default=4) if video else 1)
    tokens = facts.tokens(BATCH, queries + LENGTH)
    tokens[:, :queries] = config.video_token_index if video else config.image_token_index
    return {**found, "input_ids": tokens}


@of("VideoMAEForPreTraining")
def _hidden_patches(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    patches = (config.image_size // config.patch_size) ** 2 * (config.num_frames // config.tubelet_size)
    return {**found, "bool_masked_pos": (torch.arange(patches) % 2 == 0).expand(BATCH, -1)}


@of("MllamaVisionModel")
def _tiles(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    pixels = facts.floats(BATCH, 1, config.max_num_tiles, 3, config.image_size, config.image_size)
    mask = torch.ones(BATCH, 1, config.max_num_tiles, dtype=torch.long)
    return {"pixel_values": pixels, "aspect_ratio_ids": facts.whole(1, BATCH, 1), "aspect_ratio_mask": mask}


@of("Pix2StructForConditionalGeneration")
def _flattened_patches(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config.vision_config
    places = torch.cartesian_prod(torch.arange(1.0, 3), torch.arange(1.0, 4)).expand(BATCH, -1, -1)
    values = facts.floats(BATCH, places.shape[1], config.patch_embed_hidden_size)
    return {**found, "flattened_patches": torch.cat([places, values], dim=-1)}


@of("Lxmert.*")
def _regions(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    boxes = facts.floats(BATCH, 5, config.visual_pos_dim).abs()
    return {**found, "visual_feats": facts.floats(BATCH, 5, config.visual_feat_dim), "visual_pos": boxes}


@of("InstructBlipVideo.*", "XCLIPModel")
def _frames(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    frames = facts.find("num_frames", default=4)
    return {**found, "pixel_values": found["pixel_values"][:, None].repeat(1, frames, 1, 1, 1)}


@of("Idefics.*")
def _one_image(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    if "pixel_values" not in found or facts.model.config.model_type != "idefics":
        return found
    mask = facts.whole(1, BATCH, LENGTH, 1)
    return {**found, "pixel_values": found["pixel_values"][:, None], "image_attention_mask": mask}


@of("SegGptModel")
def _prompt_masks(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """It puts the prompt over the image."""
    pixels = facts.floats(BATCH, 3, 32, 32)
    return {"pixel_values": pixels, "prompt_pixel_values": pixels.flip(0), "prompt_masks": pixels.flip(1)}


@of("Kimi_K25VisionModel")
def _patches_as_images(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    size = facts.model.config.patch_size
    return {**found, "pixel_values": facts.floats(int(found["grid_thw"].prod()), 3, size, size)}


@of("MuseGlimmerVisionModel", "MuseSparkVisionModel")
def _patches_of_two_frames(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    patches, numbers = found["pixel_values"].shape
    return {**found, "pixel_values": facts.floats(patches, facts.model.config.patch_temporal * numbers)}


@of("Inkling2VisionModel")
def _patches_of_tokens(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config, grid = facts.model.config, torch.tensor([[1, 2, 2]])
    size = config.patch_size * config.spatial_merge_size
    return {"pixel_values": facts.floats(int(grid.prod()), size, size, 3), "image_grid_thw": grid}


@of("Gemma4VisionModel")
def _patches_at_places(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    side = 2 * config.pooling_kernel_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(BATCH, -1, -1)
    return {"pixel_values": facts.floats(BATCH, side**2, 3 * config.patch_size**2), "pixel_position_ids": places}


@of("Kosmos2.*")
def _places_of_the_image(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    if "image_embeds_position_mask" not in facts.parameters:
        return found
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    mask[:, 1 : 1 + facts.model.config.latent_query_num] = 1
    return {**found, "image_embeds_position_mask": mask}


@of("TvpModel")
def _frames_of_a_clip(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"input_ids": facts.tokens(1, LENGTH), "pixel_values": facts.floats(1, 4, 3, 64, 64)}


@of("DepthPro.*")
def _four_patches_wide(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    size = 4 * facts.model.config.patch_size
    return {"pixel_values": facts.floats(1, 3, size, size)}


@of("PPOCRV5MobileRec.*")
def _a_line_of_text(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {"pixel_values": facts.floats(BATCH, 3, 96, 160)}


@of("FlavaForPreTraining")
def _no_loss(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "return_loss": False, "input_ids_masked": found["input_ids"].flip(1)}


@of("Llama4ForConditionalGeneration")
def _as_tuple(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """Its output asks for images of the language model, which has none."""
    return {**found, "return_dict": False}


@of("Blip2ForImageTextRetrieval")
def _matched(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    mask = torch.ones_like(found["input_ids"])
    return {**found, "attention_mask": mask, "use_image_text_matching_head": True}


@of("PI0ForConditionalGeneration", "PI0Model")
def _a_robot(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    config = facts.model.config
    vision = config.vlm_config.vision_config
    images = (vision.image_size // vision.patch_size) ** 2
    tokens = facts.tokens(BATCH, images + LENGTH)
    tokens[:, :images] = config.vlm_config.image_token_id
    seen = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": facts.floats(BATCH, 1, 3, vision.image_size, vision.image_size),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
    }
    if type(facts.model).__name__ == "PI0Model":
        return {**seen, "action_embeds": facts.floats(BATCH, 1 + config.chunk_size, config.dit_config.hidden_size)}
    noise = facts.floats(BATCH, config.chunk_size, config.max_action_dim)
    return {**seen, "state": facts.floats(BATCH, config.max_state_dim), "noise": noise, "timestep": torch.rand(BATCH)}


@of("VideoLlama3VisionModel")
def _merge_sizes(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "merge_sizes": torch.tensor([2])}


@of("MiniCPM.*VisionModel")
def _target_sizes(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    """Patches of all images in a row."""
    size = facts.model.config.patch_size
    pixels = facts.floats(1, 3, size, BATCH * 16 * size)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[4, 4], [2, 8]])}


@of("OneFormerModel")
def _task(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "task_inputs": facts.tokens(BATCH, facts.model.config.task_seq_len, vocabulary=100)}


@of("Molmo2.*")
def _types(found: dict[str, Any], facts: Facts) -> dict[str, Any]:
    return {**found, "mm_token_type_ids": facts.whole(0, BATCH, LENGTH)} if "input_ids" in found else found
