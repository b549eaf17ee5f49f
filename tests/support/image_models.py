"""Tiny models that read images and texts, with their processors.

They have the shapes of SmolVLM, Qwen2-VL, LLaVA, Llama 3.2 Vision, Llama 4 and Gemma 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLProcessor

from support.commands import SPECIAL, WORDS

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == "
    "'image' %}:{% else %}: {% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

MLLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|image|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA4 = (
    "{{ bos_token }}{% for message in messages %}<|header_start|>{{ message['role'] }}<|header_end|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|image|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<start_of_image>{% elif 'text' in content %}{{ content['text'] | trim }}"
    "{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def tokenizer(special: list[str], **options: Any) -> Any:
    words = [*WORDS, "User", "Assistant", "USER", "ASSISTANT", "user", "assistant", "model", ":"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **({"additional_special_tokens": special} if special else {}), **names, **options
    )


def smolvlm(folder: Path) -> Any:
    """Save a SmolVLM whose images have 4 tokens, in up to 2 x 2 parts and the whole."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    parts = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    marks = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|im_start|>", *parts]
    images = Idefics3ImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
    processor = Idefics3Processor(images, tokenizer(marks), image_seq_len=4, chat_template=SMOLVLM)
    place = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(processor.tokenizer), "pad_token_id": 0},
        vision_config={**TEXT, "image_size": 8, "patch_size": 2},
        image_token_id=place,
        scale_factor=2,
        pad_token_id=0,
    )
    return _saved(folder, Idefics3ForConditionalGeneration, config, processor)


def qwen(folder: Path) -> Any:
    """Save a Qwen2-VL whose images have as many tokens as their size says."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>"]
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)
    text = tokenizer(marks)
    ids = {name: text.convert_tokens_to_ids(name) for name in marks}
    processor = _WithoutVideos(images, text, None, chat_template=QWEN)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(text),
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "pad_token_id": 0,
        },
        vision_config={**sizes, "hidden_size": 16},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return _saved(folder, Qwen2VLForConditionalGeneration, config, processor)


def llava(folder: Path) -> Any:
    """Save a LLaVA whose images have 4 tokens, and whose tokenizer begins every text."""
    from tokenizers import processors
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    text = tokenizer(["<image>"])
    text.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    how = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, text, chat_template=LLAVA, **how)
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(text), "pad_token_id": 0},
        vision_config={"model_type": "clip_vision_model", **TEXT, "image_size": 8, "patch_size": 4},
        image_token_id=text.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return _saved(folder, LlavaForConditionalGeneration, config, processor)


def mllama(folder: Path) -> Any:
    """Save a Llama 3.2 Vision with images in up to four tiles, which one of two layers reads by cross-attention."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    images = MllamaImageProcessorPil(size={"height": 8, "width": 8}, max_image_tiles=4)
    text = tokenizer(["<|image|>", "<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    processor = MllamaProcessor(images, text, chat_template=MLLAMA)
    config = MllamaConfig(
        text_config={
            **TEXT,
            "vocab_size": len(text),
            "num_key_value_heads": 1,
            "num_hidden_layers": 4,  # Llama 3.2's fourth layer is the first with cross-attention, too
            "cross_attention_layers": [3],
            "pad_token_id": 0,
        },
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 24, "attention_heads": 2, "image_size": 8, "patch_size": 4},
            **{"num_hidden_layers": 2, "num_global_layers": 1, "max_num_tiles": 4, "vision_output_dim": 32},
            "intermediate_layers_indices": [1],
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        image_token_index=text.convert_tokens_to_ids("<|image|>"),
    )
    return _saved(folder, MllamaForConditionalGeneration, config, processor)


def gemma(folder: Path) -> Any:
    """Save a Gemma 3 whose images have 4 tokens, with line ends around them that are tokens."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turns = {"begin_of_turn": "<start_of_turn>", "end_of_turn": "<end_of_turn>"}
    text = tokenizer([], extra_special_tokens={**marks, **turns})
    text.add_tokens(["\n", "\n\n", "\n\n\n"])
    images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    processor = Gemma3Processor(images, text, chat_template=GEMMA, image_seq_length=4)
    config = Gemma3Config(
        text_config={**TEXT, "vocab_size": len(text), "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0},
        vision_config={**TEXT, "image_size": 8, "patch_size": 2},
        mm_tokens_per_image=4,
        image_token_index=text.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=text.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=text.convert_tokens_to_ids("<end_of_image>"),
    )
    return _saved(folder, Gemma3ForConditionalGeneration, config, processor)


class _WithoutVideos(Qwen2VLProcessor):
    """Qwen2-VL's processor without one of videos, which would need torchvision."""

    def check_argument_for_proper_class(self, *_args: Any) -> None:
        """Accept that there is no processor of videos."""


def _tiles() -> Any:
    """Return a processor that divides images into tiles of 8 x 8 as Llama 4's does, which needs torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    class Tiles(CLIPImageProcessorPil):
        def preprocess(self, images: Any, **options: Any) -> Any:
            found, ratios = [], []
            for image in images if isinstance(images, list) else [images]:
                across, down = (min(2, -(-side // 8)) for side in image.size)
                tall = image.resize((8 * across, 8 * down))
                boxes = [(8 * x, 8 * y, 8 * x + 8, 8 * y + 8) for y in range(down) for x in range(across)]
                found += [tall.crop(box) for box in boxes] + ([image.resize((8, 8))] if len(boxes) > 1 else [])
                ratios.append([down, across])
            return super().preprocess(found, **options) | {"aspect_ratios": torch.tensor(ratios)}

    return Tiles(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8})


def _saved(folder: Path, kind: Any, config: Any, processor: Any) -> Any:
    """Save the model and, if it can be loaded again, its processor; return the processor."""
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    loads_again = type(processor).__name__ not in ("_WithoutVideos", "Processor")
    (processor if loads_again else processor.tokenizer).save_pretrained(folder)
    return processor


KINDS = {"smolvlm": smolvlm, "qwen": qwen, "llava": llava, "mllama": mllama, "gemma": gemma}
