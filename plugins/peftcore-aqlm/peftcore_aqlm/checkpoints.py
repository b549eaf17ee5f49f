"""AQLM checkpoints in transformers' `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from peftcore.plugin import CheckpointError, PeftcoreError, base_modules
from peftcore_aqlm.layer import AqlmLinear, has_codes

_METHOD = "aqlm"
_CODES = ".codes"
_DTYPES = {"I8": torch.int8, "I16": torch.int16}


def register() -> None:
    """Make transformers read and write AQLM checkpoints with `AqlmQuantizer`, even if the aqlm package is installed."""
    AUTO_QUANTIZER_MAPPING[_METHOD] = AqlmQuantizer


class AqlmQuantizer(HfQuantizer):
    """Quantizer that converts each linear layer with codes in the checkpoint to an `AqlmLinear`."""

    requires_calibration = True
    is_trainable = True
    is_qat_trainable = True  # otherwise Trainer refuses a quantized model that PEFT does not wrap

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layout = _Layout(self.quantization_config)
        shapes = _headers(kwargs.get("checkpoint_files") or ())
        prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
        names = {name.removeprefix(prefix): name for name, _ in model.named_modules()}
        layer_count = 0
        paths = {key.rpartition(".")[0]: None for key in shapes if key.endswith((_CODES, ".codebooks"))}
        for path in paths:
            name = names.get(path.removeprefix(prefix))
            if name is None and ".experts." not in path:
                continue  # not a part of this model, such as the head for another task
            layer: Any = None if name is None else model.get_submodule(name)
            if type(layer) is not nn.Linear:
                layer_type = "experts" if layer is None else type(layer).__name__
                raise PeftcoreError(
                    f"the checkpoint has AQLM codes for '{path}' ({layer_type}), but only codes of nn.Linear layers "
                    "can be read. Use the dense checkpoint"
                )
            layout.check(path, layer, shapes)
            _make_empty(layer, shapes, path)
            layer_count += 1
        if not layer_count:
            raise CheckpointError(
                "config.json has quant_method 'aqlm', but the checkpoint has no codes for any layer of the model. "
                "Download it again, or remove quantization_config from config.json if the weights are dense"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        limit = 1 << (_Layout(self.quantization_config).bits - 1)
        for path, layer in base_modules(model):
            if not isinstance(layer, AqlmLinear):
                continue
            codes: Any = layer.__dict__["_parameters"].pop("codes")
            uses_all_bits = limit == 1 << (8 * codes.element_size() - 1)
            if not codes.is_meta and not uses_all_bits:
                low, high = (int(code) for code in codes.aminmax())
                if low < -limit or high >= limit:
                    raise CheckpointError(
                        f"'{path}.codes' has values from {low} to {high}, but config.json implies values from "
                        f"{-limit} to {limit - 1}. Correct nbits_per_codebook in config.json, or download the "
                        "checkpoint again"
                    )
            for name in ("codebooks", "scales"):
                values = getattr(layer, name)
                if not values.is_meta and not bool(values.isfinite().all()):
                    raise CheckpointError(f"'{path}.{name}' contains NaN or Inf. Download the checkpoint again")
            layer.weight = codes
        update_config(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the state dict with the checkpoint's names, without codebooks and scales of layers that are dense."""
        state = dict(model.state_dict())
        for path, layer in model.named_modules():
            if isinstance(layer, AqlmLinear):
                if has_codes(layer):
                    state[f"{path}.codes"] = state.pop(f"{path}.weight")
                else:
                    del state[f"{path}.codebooks"], state[f"{path}.scales"]
        return state, {}


class _Layout:
    """Sizes of blocks, codebooks and codes in a `quantization_config`."""

    def __init__(self, config: Any) -> None:
        self.in_group, self.out_group = int(config.in_group_size), int(config.out_group_size)
        self.books, self.bits = int(config.num_codebooks), int(config.nbits_per_codebook)
        if min(self.in_group, self.out_group, self.books, self.bits) < 1 or self.bits > 16:
            raise CheckpointError(
                "AQLM's quantization_config needs in_group_size, out_group_size and num_codebooks of at least 1, and "
                f"nbits_per_codebook from 1 to 16, found {self.in_group}, {self.out_group}, {self.books} and "
                f"{self.bits}. Download config.json again"
            )

    def check(self, path: str, layer: nn.Linear, shapes: Mapping[str, tuple[list[int], str]]) -> None:
        """Check the tensors of a layer in the checkpoint against the model and the config.

        Raises:
            CheckpointError: a tensor is missing, or has another shape or dtype.
        """
        out, inputs = layer.out_features, layer.in_features
        if out % self.out_group or inputs % self.in_group:
            raise CheckpointError(
                f"'{path}' has {out} outputs and {inputs} inputs, which are not whole blocks of {self.out_group} x "
                f"{self.in_group}. Correct out_group_size and in_group_size in config.json, or download it again"
            )
        rows = out // self.out_group
        expected_shapes = {
            "codes": [rows, inputs // self.in_group, self.books],
            "codebooks": [self.books, 1 << self.bits, self.out_group, self.in_group],
            "scales": [rows, 1, 1, 1],
        }
        for part, shape in expected_shapes.items():
            found_shape, dtype = shapes.get(f"{path}.{part}", (None, ""))
            dtypes = ["F16", "BF16", "F32"]
            if part == "codes":
                dtypes = ["I8"] if self.bits <= 8 else ["I16"]
            if found_shape != shape or dtype not in dtypes:
                problem = f"has shape {found_shape} and dtype {dtype}"
                if found_shape is None:
                    problem = "is not in the checkpoint"
                raise CheckpointError(
                    f"'{path}.{part}' {problem}, but the model and its quantization_config need {shape} and "
                    f"{' or '.join(dtypes)}. Download the checkpoint again"
                )


def _headers(files: Sequence[str]) -> dict[str, tuple[list[int], str]]:
    """Return (shape, dtype) of each tensor in the files, from their headers."""
    headers: dict[str, tuple[list[int], str]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise PeftcoreError(
                f"'{file}' is not a safetensors file, the only format in which AQLM checkpoints can be read. Convert "
                "the file to safetensors"
            )
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    tensor_slice = tensors.get_slice(key)
                    headers[key] = tensor_slice.get_shape(), tensor_slice.get_dtype()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"'{file}' cannot be read: {error}. Download the file again") from error
    return headers


def _make_empty(layer: Any, shapes: Mapping[str, tuple[list[int], str]], path: str) -> None:
    """Convert a dense layer to an `AqlmLinear` on the meta device, with the tensors' names in the checkpoint.

    The parameter is called `codes` until transformers has loaded it, and `weight` afterwards.
    """
    dtype = layer.weight.dtype
    layer.__class__ = AqlmLinear
    del layer._parameters["weight"]
    shape, codes_dtype = shapes[path + _CODES]
    codes = torch.empty(shape, dtype=_DTYPES[codes_dtype], device="meta")
    layer.register_parameter("codes", nn.Parameter(codes, requires_grad=False))
    for name in ("codebooks", "scales"):
        layer.register_buffer(name, torch.empty(shapes[f"{path}.{name}"][0], dtype=dtype, device="meta"))
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    layer._is_hf_initialized = True  # transformers must not initialise it


def update_config(model: Any) -> None:
    """Record in a transformers model's config which linear layers are dense."""
    config = getattr(model, "config", None)
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, AqlmQuantizer) or config is None:
        return
    layers = [(path, layer) for path, layer in base_modules(model) if isinstance(layer, nn.Linear)]
    dense = [f"{path}.weight" for path, layer in layers if not has_codes(layer)]
    if len(dense) < len(layers):
        quantizer.quantization_config.linear_weights_not_to_quantize = dense
        config.quantization_config = quantizer.quantization_config
        return
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # While an undoable merge is active the layers are still AqlmLinear, and the model stays quantized.
    if not any(isinstance(layer, AqlmLinear) for _, layer in layers):
        del model.hf_quantizer
        model.is_quantized = False
