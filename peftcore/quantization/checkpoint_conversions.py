"""Conversions of a checkpoint's 4-bit tensors to 4-bit parameters, which transformers calls while it loads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.layers import shape_of
from peftcore.quantization.convert import convert
from peftcore.quantization.format import from_tensors
from peftcore.quantization.int4_layouts import Int4Layout, to_affine4
from peftcore.quantization.linear import QuantizedLinear
from peftcore.quantization.mxfp4_format import BLOCKS, SCALES, from_blocks
from peftcore.quantization.packed_experts import pack_parameter
from peftcore.quantization.parameters import check_experts, check_shape
from peftcore.targets import is_linear, sizes

WHOLE = r"(?<!\w)"  # prefix of a pattern: matches the last `weight` of `inject_weight.weight.absmax` only
failures: list[PeftcoreError] = []  # errors that transformers only logs while it loads


class Deserialize(ConversionOps):
    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        tensors = {name.removeprefix(WHOLE): t[0] if isinstance(t, list) else t for name, t in input_dict.items()}
        path, _, attribute = full_layer_name.rpartition(".")
        module: Any = model.get_submodule(path)
        if len(tensors) == 1:  # a dense weight, as the file has it
            like = getattr(module, attribute)
            return {name: t.to(like.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        parts = {name.removeprefix(f"{attribute}."): value for name, value in tensors.items() if name != attribute}
        with noted():
            if attribute not in tensors:
                raise CheckpointError(
                    f"the checkpoint has the 4-bit state of '{full_layer_name}' but not its weight. Download it again"
                )
            packed = from_tensors(tensors[attribute], parts, full_layer_name)
            is_weight = attribute == "weight" and is_linear(module)
            check_shape(packed, sizes(module)[::-1] if is_weight else shape_of(module, attribute), full_layer_name)
            check_experts(packed, full_layer_name)
        packed = packed._replace(codes=packed.codes.clone())
        if not is_weight:
            pack_parameter(module, attribute, packed, self.hf_quantizer.compute_dtype)
        elif not isinstance(module, QuantizedLinear):
            module._parameters["weight"] = None
            convert(module, packed, self.hf_quantizer.compute_dtype)
        self.hf_quantizer.weights.add(full_layer_name)
        return {attribute: module.get_parameter(attribute)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsItIs()


class FromBlocks(ConversionOps):
    """Conversion of experts in MXFP4 as gpt-oss stores them."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = [t[0] if isinstance(t, list) else t for t in input_dict.values()]
        path, _, attribute = full_layer_name.rpartition(".")
        module: Any = model.get_submodule(path)
        with noted():
            by_part = {name.rpartition("_")[2]: t for name, t in zip(input_dict, tensors, strict=True)}
            missing = [name for name in (BLOCKS, SCALES) if name[1:] not in by_part]
            if missing:
                raise CheckpointError(f"the checkpoint lacks '{full_layer_name}{missing[0]}'. Download it again")
            blocks, scales = by_part[BLOCKS[1:]], by_part[SCALES[1:]]
            if blocks.untyped_storage().filename is not None:  # memory-mapped, which may be read-only
                blocks = blocks.clone()
            packed = from_blocks(blocks, scales, getattr(module, attribute).dtype, full_layer_name)
            check_shape(packed, shape_of(module, attribute), full_layer_name)
        pack_parameter(module, attribute, packed, self.hf_quantizer.compute_dtype)
        self.hf_quantizer.weights.add(full_layer_name)
        return {attribute: module.get_parameter(attribute)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsItIs()


class FromInt4(ConversionOps):
    """Conversion of an int4 weight of GPTQ, AWQ or compressed-tensors."""

    def __init__(self, hf_quantizer: Any, layout: Int4Layout) -> None:
        self.hf_quantizer = hf_quantizer
        self.layout = layout

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = {name.removeprefix(WHOLE): t[0] if isinstance(t, list) else t for name, t in input_dict.items()}
        path, _, attribute = full_layer_name.rpartition(".")
        module: Any = model.get_submodule(path)
        with noted():
            if not is_linear(module):
                raise PeftcoreError(
                    f"'{path}' is {type(module).__name__} with an int4 weight of {self.layout.tool}, and only linear "
                    "layers are read. Use a checkpoint where it is dense"
                )
            if full_layer_name in model.all_tied_weights_keys:
                raise PeftcoreError(
                    f"'{path}' has an int4 weight, but the model shares its weight with "
                    f"'{model.all_tied_weights_keys[full_layer_name]}'. Set tie_word_embeddings=false in its config"
                )
            packed = to_affine4(self.layout.read(tensors, path), module.weight.dtype, path)
            check_shape(packed, sizes(module)[::-1], full_layer_name)
        module._parameters["weight"] = None
        convert(module, packed, self.hf_quantizer.compute_dtype)
        self.hf_quantizer.weights.add(full_layer_name)
        return {attribute: module.get_parameter(attribute)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsItIs()


def int4_converter(layout: Int4Layout, hf_quantizer: Any) -> WeightConverter:
    """Return the converter of int4 weights. `hf_quantizer.int4_names` gets the names that it finds."""
    names = hf_quantizer.int4_names

    class Converter(WeightConverter):
        __slots__ = ()

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            renamed, pattern = super().rename_source_key(source_key)
            if pattern is not None:
                names.add(renamed)
            return renamed, pattern

    return Converter([WHOLE + part for part in layout.parts], "weight", [FromInt4(hf_quantizer, layout)])


class _AsItIs(ConversionOps):
    """Conversion for saving that changes nothing: the state dict already has the format's keys."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


@contextlib.contextmanager
def noted() -> Iterator[None]:
    try:
        yield
    except PeftcoreError as error:
        failures.append(error)
        raise
