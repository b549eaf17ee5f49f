"""Create small valid inputs for any model, from the signature of its forward and the sizes in its config.

A builder creates the value of one argument. Builders are selected by the argument's name, never by the model's class,
and read sizes from the config. To support another argument, add a function decorated with `@argument("its_name")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.model.base_modules import original_forward
from peftcore.plugin.architecture import config_fields, text_config

BATCH, LENGTH = 2, 7
_SIDE = 32  # height and width of images for models without a config

BUILDERS: dict[str, Callable[[Facts], Any]] = {}  # {name of an argument: its builder}
# Arguments that a model requires together with the key.
_COMPANIONS = {
    "pixel_values_videos": ("video_grid_thw",),
    "past_values": ("past_time_features", "past_observed_mask", "future_time_features", "future_values"),
    "states": ("actions", "rewards", "returns_to_go", "timesteps"),
    "bbox": ("bbox",),
}
_MODALITIES = {
    "image": ("pixel_values", "pixel_values_images", "image"),
    "audio": ("input_features", "input_values"),
    "video": ("pixel_values_videos",),
}


def example_inputs(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    batch: int = BATCH,
    length: int = LENGTH,
    decoder_length: int | None = None,
) -> dict[str, Any]:
    """Return keyword arguments for a small forward pass of `model`.

    A multimodal model whose config has a placeholder token (`image_token_id`) gets only text, since it can run without
    other modalities. Other multimodal models, such as CLIP, get inputs for all modalities.

    Args:
        device: device of the tensors; by default the model's device.
        batch: number of samples.
        length: number of tokens per sample.
        decoder_length: number of decoder tokens per sample for an encoder-decoder; by default `length`.

    Returns:
        {name: value}. Token ids exclude the special tokens in the config; floats have the model's dtype. Every call
        returns equal values. Arguments without a builder are omitted, except the first argument, which gets an input
        for the model's first layer.
    """
    device = torch.device(device) if device is not None else _device(model)
    facts = Facts(model, device, batch, length, length if decoder_length is None else decoder_length)
    names, first_argument = _arguments_to_fill(facts), next(iter(facts.parameters), None)
    built = {name: BUILDERS[name](facts) for name in names if name in BUILDERS}
    if first_argument in names and first_argument not in BUILDERS:  # for example nanoGPT's `idx`
        built[first_argument] = _input(facts)
    return {name: value for name, value in built.items() if value is not None}


def argument(*names: str) -> Callable[[Callable[[Facts], Any]], Callable[[Facts], Any]]:
    """Register a builder for the arguments `names`. A builder returns None if it cannot create a value."""

    def register(build: Callable[[Facts], Any]) -> Callable[[Facts], Any]:
        BUILDERS.update(dict.fromkeys(names, build))
        return build

    return register


@dataclass
class Facts:
    """Facts that builders use: the arguments of the model's forward, the fields of its configs, and sizes."""

    model: nn.Module
    device: torch.device
    batch: int = BATCH
    length: int = LENGTH
    decoder_length: int = LENGTH
    parameters: dict[str, inspect.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        signature = inspect.signature(original_forward(self.model))
        self.parameters = dict(list(signature.parameters.items())[1:])

    @property
    def configs(self) -> Iterator[Any]:
        """Yield the model's config, its text config, and then all nested configs."""
        config = getattr(self.model, "config", None)
        if config is None:
            return
        visited_configs: list[Any] = []
        queue = [config, text_config(config)]
        while queue:
            config = queue.pop(0)
            if not any(config is visited_config for visited_config in visited_configs):
                visited_configs.append(config)
                yield config
                queue += [value for value in config_fields(config).values() if hasattr(value, "to_dict")]

    def find(self, *names: str, default: Any = None, inside: str | None = None) -> Any:
        """Return the value of the first field in `names` that a config has.

        Args:
            default: value if no config has one of the fields.
            inside: look first in nested configs whose class name contains this word.
        """
        configs = list(self.configs)
        if inside is not None:
            configs.sort(key=lambda config: inside not in type(config).__name__.lower())
        for config in configs:
            for name in names:
                value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def has(self, name: str) -> bool:
        """Return whether the forward takes this argument."""
        return name in self.parameters

    def tokens(self, *shape: int, vocabulary: int | None = None) -> Tensor:
        """Return int64 token ids below `vocabulary`, without special tokens."""
        size = vocabulary or self.find("vocab_size", "src_vocab_size", "text_vocab_size", default=32)
        size = min(size) if isinstance(size, (list, tuple)) else size
        special: set[int] = set()
        for config in self.configs:
            for name, value in config_fields(config).items():
                if name.endswith(("token_id", "token_index", "token_ids", "tok_index")):
                    special.update(
                        v for v in (value if isinstance(value, (list, tuple)) else [value]) if _is_integer(v)
                    )
        ids_allowed = [i for i in range(min(size, 256)) if i not in special] or [0]
        ids = [ids_allowed[(3 + 5 * i) % len(ids_allowed)] for i in range(prod(shape))]
        return torch.tensor(ids, dtype=torch.long, device=self.device).view(shape)

    def floats(self, *shape: int) -> Tensor:
        """Return values between -1 and 1, in the model's dtype."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        dtype = dtype if dtype.itemsize >= 2 else torch.float32
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        count = prod(shape)
        values = torch.sin(torch.arange(count, dtype=torch.float32, device=self.device) * 1.7)
        return values.view(shape).to(dtype)

    def integers(self, value: int, *shape: int) -> Tensor:
        """Return an int64 tensor filled with `value`."""
        return torch.full(shape, value, dtype=torch.long, device=self.device)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _arguments_to_fill(facts: Facts) -> list[str]:
    """Return the arguments to fill: required arguments, the main ones, and the arguments that these depend on."""
    required = _required_arguments(facts)
    names = required + _main_arguments(facts)
    if not any(facts.has(name) for name in names):
        names += list(facts.parameters)[:1]
    if not _has_placeholders(facts):
        names += _modality_arguments(facts)
    if facts.find("is_encoder_decoder") or "decoder_input_ids" in required:
        names.append("decoder_input_ids")
    if facts.find("add_cross_attention"):
        names.append("encoder_hidden_states")
    for name in list(names):
        names += _COMPANIONS.get(name, ())
    return [name for name in dict.fromkeys(names) if facts.has(name)]


def _required_arguments(facts: Facts) -> list[str]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, parameter in facts.parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in variadic
    ]


def _main_arguments(facts: Facts) -> list[str]:
    """Return the model's `main_input_name` (one or several names), or its first argument."""
    main = getattr(facts.model, "main_input_name", None) or list(facts.parameters)[:1]
    return [main] if isinstance(main, str) else list(main)


def _modality_arguments(facts: Facts) -> list[str]:
    """Return one argument for each of the model's modalities, such as `pixel_values` for images."""
    modalities: str | Sequence[str] = getattr(facts.model, "input_modalities", None) or ()
    names: list[str] = []
    for modality in [modalities] if isinstance(modalities, str) else modalities:
        names += [name for name in _MODALITIES.get(modality, ()) if facts.has(name)][:1]
    if "text" in modalities and not isinstance(modalities, str):
        names.append("input_ids")
    return names


def _has_placeholders(facts: Facts) -> bool:
    """Return whether the vocabulary has placeholder tokens for images, audio or video."""
    return facts.has("input_ids") and any(
        facts.find(*(f"{kind}_token{end}" for end in ("_id", "_index"))) is not None
        for kind in ("image", "audio", "video")
    )


# Text


@argument("input_ids", "qformer_input_ids", "tasks_input_ids", "classes_input_ids")
def _input_ids(facts: Facts) -> Tensor:
    return facts.tokens(facts.batch, facts.length)


@argument("decoder_input_ids")
def _decoder_input_ids(facts: Facts) -> Tensor:
    return facts.tokens(facts.batch, facts.decoder_length)


@argument("attention_mask", "classes_attention_mask", "tasks_attention_mask")
def _attention_mask(facts: Facts) -> Tensor:
    return facts.integers(1, facts.batch, facts.length)


@argument("decoder_attention_mask")
def _decoder_attention_mask(facts: Facts) -> Tensor:
    return facts.integers(1, facts.batch, facts.decoder_length)


@argument(
    "inputs_embeds", "hidden_states", "encoder_hidden_states", "query_embeds", "context_hidden_states", "noise_embeds"
)
def _embeddings(facts: Facts) -> Tensor:
    if facts.has("grid_thw"):
        return _patches(facts)
    return facts.floats(facts.batch, facts.length, facts.find("hidden_size", "d_model", "n_embd", "dim", default=32))


# Fallback for other models: the only argument goes to the first layer


@argument("input", "x", "src")
def _input(facts: Facts) -> Tensor | None:
    for layer in facts.model.modules():
        if isinstance(layer, nn.Embedding):
            return facts.tokens(facts.batch, facts.length, vocabulary=layer.num_embeddings)
        if isinstance(layer, nn.Linear):
            return facts.floats(facts.batch, layer.in_features)
        if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)):
            sizes = (facts.batch, facts.length) if layer.batch_first else (facts.length, facts.batch)
            return facts.floats(
                *sizes, layer.embed_dim if isinstance(layer, nn.MultiheadAttention) else layer.input_size
            )
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return facts.floats(facts.batch, layer.in_channels, *[_SIDE] * len(layer.kernel_size))
    return facts.tokens(facts.batch, facts.length)


# Images


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        value = (value.get("height", 32), value.get("width", 32))
    return tuple(value)[-2:] if isinstance(value, (list, tuple)) else (value, value)


def _image_size(facts: Facts) -> tuple[int, int]:
    size = _pair(facts.find("image_size", "input_size", "img_size", inside="vision", default=64))
    patch = _pair(facts.find("patch_size", inside="vision", default=16))
    return max(size[0], patch[0]), max(size[1], patch[1])


def _channels(facts: Facts) -> int:
    return facts.find("num_channels", "in_channels", "in_chans", inside="vision", default=3)


@argument("pixel_values", "image", "pixel_values_images", "prompt_pixel_values")
def _pixel_values(facts: Facts) -> Tensor:
    if facts.has("grid_thw"):
        return _patches(facts)
    frames = facts.find("num_frames") if not facts.has("input_ids") else None
    clip = [frames] if frames and facts.find("tubelet_size", "drop_path_type", "num_frames") else []
    return facts.floats(facts.batch, *clip, _channels(facts), *_image_size(facts))


@argument("pixel_values_videos")
def _pixel_values_videos(facts: Facts) -> Tensor:
    frames = facts.find("frames_per_clip", "num_frames", inside="vi", default=4)
    return facts.floats(facts.batch, frames, _channels(facts), *_image_size(facts))


# Sound


@argument("input_values", "audio_values")
def _input_values(facts: Facts) -> Tensor:
    kernels, strides = facts.find("conv_kernel"), facts.find("conv_stride")
    if kernels and strides:  # convolutions over the waveform: enough samples for 16 frames
        length = 16
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=False):
            length = (length - 1) * stride + kernel
        return facts.floats(facts.batch, length)
    if (mels := facts.find("num_mel_bins", "max_length")) and facts.find("max_length"):
        return facts.floats(facts.batch, facts.find("max_length"), mels)  # a spectrogram in the layout of an image
    return facts.floats(facts.batch, facts.find("audio_channels", "num_channels", default=1), 2048)


@argument("input_features")
def _input_features(facts: Facts) -> Tensor:
    bins = facts.find(
        "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "n_mels", "mel_bins", "input_dim",
        inside="audio", default=80,
    )  # fmt: skip
    frames = facts.find("max_source_positions", inside="audio")
    if frames and facts.find("num_mel_bins") and not facts.find("input_feat_per_channel"):
        return facts.floats(
            facts.batch, bins, 2 * frames
        )  # Whisper's layout; its convolution halves the number of frames
    return facts.floats(facts.batch, 64, bins)


@argument("input_features_mask", "audio_mel_mask")
def _features_mask(facts: Facts) -> Tensor:
    return facts.integers(1, facts.batch, 64).bool()


# Series


def _history(facts: Facts) -> int:
    context = facts.find("context_length", "seq_length", "prediction_length", default=16)
    lags = facts.find("lags_sequence", default=[0])
    return context + max(lags)


@argument("past_values")
def _past_values(facts: Facts) -> Tensor:
    channels = facts.find("num_input_channels", "input_size", default=1)
    series = [channels] if channels > 1 or not facts.has("past_time_features") else []
    return facts.floats(facts.batch, _history(facts), *series)


@argument("past_observed_mask")
def _past_observed_mask(facts: Facts) -> Tensor | None:
    return torch.ones_like(_past_values(facts)) if facts.has("past_time_features") else None


@argument("past_time_features")
def _past_time_features(facts: Facts) -> Tensor:
    return facts.floats(facts.batch, _history(facts), facts.find("num_time_features", default=0))


@argument("future_time_features")
def _future_time_features(facts: Facts) -> Tensor | None:
    return facts.floats(
        facts.batch, facts.find("prediction_length", default=1), facts.find("num_time_features", default=0)
    )


@argument("future_values")
def _future_values(facts: Facts) -> Tensor:
    return facts.floats(facts.batch, facts.find("prediction_length", default=1))


# Grids of patches


@argument("grid_thw", "image_grid_thw", "video_grid_thw")
def _grid(facts: Facts) -> Tensor:
    merge = facts.find("spatial_merge_size", inside="vision", default=2)
    return torch.tensor([[1, 2 * merge, 2 * merge]], device=facts.device)


def _patches(facts: Facts) -> Tensor:
    """Return flattened image patches for `_grid`, `[patches, channels · frames · height · width]`."""
    height, width = _pair(facts.find("patch_size", inside="vision", default=16))
    frames = facts.find("temporal_patch_size", inside="vision", default=1)
    return facts.floats(int(_grid(facts).prod(-1).sum()), _channels(facts) * frames * height * width)
