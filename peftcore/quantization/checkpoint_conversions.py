"""Conversions from a checkpoint's 4-bit tensors to 4-bit parameters, called by transformers while loading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter, WeightRenaming

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.model.experts import experts_layout
from peftcore.model.experts.conversion import is_by_expert
from peftcore.model.targets import is_linear, sizes
from peftcore.ops import PackedWeight
from peftcore.plugin.checkpoints import CheckpointLayout
from peftcore.plugin.layers import shape_of
from peftcore.quantization.convert import convert
from peftcore.quantization.formats import from_tensors
from peftcore.quantization.linear import QuantizedLinear
from peftcore.quantization.mxfp4_format import BLOCKS, SCALES, from_blocks
from peftcore.quantization.packed_experts import pack_parameter
from peftcore.quantization.parameters import check_experts, check_shape

# Boundaries of a name in a pattern: `weight` must not match `inject_weight`, `weight.absmax` or `weight_scale`.
_START, _END = r"(?<!\w)", r"(?![\w.])"
# Collects the errors of conversions, which transformers only logs. None outside of `collecting_failures`.
_FAILURES: ContextVar[list[PeftcoreError] | None] = ContextVar("failures", default=None)


def exact_name_patterns(names: Iterable[str]) -> list[str]:
    """Return source patterns for a WeightConverter that match these names exactly."""
    return [f"{_START}{name}{_END}" for name in names]


class Quantizer(Protocol):
    """The attributes of `huggingface.FourBitQuantizer` that conversions use.

    Attributes:
        compute_dtype: dtype of products with the weights.
        weights: names of 4-bit parameters; conversions add to it.
        layout_names: names of parameters that the checkpoint stores in another tool's layout; conversions add to it.
    """

    weights: set[str]
    layout_names: set[str]

    @property
    def compute_dtype(self) -> torch.dtype | None: ...


class _PackingConversion(ConversionOps):
    """Conversion from a checkpoint's tensors to a 4-bit parameter. Subclasses build the packed weight."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def packed(self, by_pattern: dict[str, Any], name: str, model: PreTrainedModel) -> PackedWeight:
        """Build the packed weight of the parameter `name` from its tensors, which are keyed by source pattern.

        Raises:
            PeftcoreError: the tensors are not consistent, or the parameter cannot be packed.
        """
        raise NotImplementedError

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        path, _, attribute = full_layer_name.rpartition(".")
        module: Any = model.get_submodule(path)
        with recording_failure():
            packed = self.packed(input_dict, full_layer_name, model)
            is_weight = attribute == "weight" and is_linear(module)
            check_shape(packed, sizes(module)[::-1] if is_weight else shape_of(module, attribute), full_layer_name)
            check_experts(packed, full_layer_name)
        if not is_weight:
            pack_parameter(module, attribute, packed, self.hf_quantizer.compute_dtype)
        elif not isinstance(module, QuantizedLinear):
            module._parameters["weight"] = None
            convert(module, packed, self.hf_quantizer.compute_dtype)
        self.hf_quantizer.weights.add(full_layer_name)
        return {attribute: module.get_parameter(attribute)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Unchanged()


class Deserialize(_PackingConversion):
    """Conversion of weights in bitsandbytes' and peftcore's formats."""

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        if len(input_dict) > 1:
            return super().convert(input_dict, model, full_layer_name, **kwargs)
        # The file has no 4-bit state for this weight, so it is dense.
        path, _, attribute = full_layer_name.rpartition(".")
        like = getattr(model.get_submodule(path), attribute)
        tensors = _tensors_by_pattern(input_dict)
        return {name: t.to(like.dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def packed(self, by_pattern: dict[str, Any], name: str, model: PreTrainedModel) -> PackedWeight:
        tensors, attribute = _tensors_by_pattern(by_pattern), name.rpartition(".")[2]
        if attribute not in tensors:
            raise CheckpointError(
                f"the checkpoint has the 4-bit state of '{name}' but not its weight. Download the checkpoint again"
            )
        parts = {part.removeprefix(f"{attribute}."): t for part, t in tensors.items() if part != attribute}
        packed = from_tensors(tensors[attribute], parts, name)
        return packed._replace(codes=packed.codes.clone())


class FromBlocks(_PackingConversion):
    """Conversion of MXFP4 experts in gpt-oss's format."""

    def packed(self, by_pattern: dict[str, Any], name: str, model: PreTrainedModel) -> PackedWeight:
        tensors = {f"_{pattern.rpartition('_')[2]}": t for pattern, t in _tensors_by_pattern(by_pattern).items()}
        missing_parts = [part for part in (BLOCKS, SCALES) if part not in tensors]
        if missing_parts:
            raise CheckpointError(f"the checkpoint lacks '{name}{missing_parts[0]}'. Download the checkpoint again")
        blocks = tensors[BLOCKS]
        if (
            blocks.untyped_storage().filename is not None
        ):  # memory-mapped, perhaps read-only, but changed in place below
            blocks = blocks.clone()
        return from_blocks(blocks, tensors[SCALES], model.get_parameter(name).dtype, name)


class FromLayout(_PackingConversion):
    """Conversion of a linear layer's weight from another tool's 4-bit layout."""

    def __init__(self, hf_quantizer: Quantizer, layout: CheckpointLayout) -> None:
        super().__init__(hf_quantizer)
        self.layout = layout

    def packed(self, by_pattern: dict[str, Any], name: str, model: PreTrainedModel) -> PackedWeight:
        path = name.rpartition(".")[0]
        module: Any = model.get_submodule(path)
        if not is_linear(module):
            raise PeftcoreError(
                f"'{path}' ({type(module).__name__}) is stored as {self.layout.kind} by {self.layout.tool}, but only "
                f"linear layers and experts can be read in this format. Use a checkpoint in which '{path}' is dense"
            )
        if name in model.all_tied_weights_keys:
            raise PeftcoreError(
                f"'{path}' is stored as {self.layout.kind}, but the model ties its weight to "
                f"'{model.all_tied_weights_keys[name]}'. Set tie_word_embeddings=false in the model's config"
            )
        layout = self.layout
        return layout.pack(layout.read(_tensors_by_pattern(by_pattern), path), module.weight.dtype, path)


class FromLayoutOfExperts(_PackingConversion):
    """Conversion of 4-bit experts that the checkpoint stores one by one into one parameter.

    Args:
        layout: layout of each expert.
        sources: name pattern of each projection of an expert, without the last component. Projections are concatenated
            along their outputs in this order.
    """

    def __init__(self, hf_quantizer: Quantizer, layout: CheckpointLayout, sources: Sequence[str]) -> None:
        super().__init__(hf_quantizer)
        self.layout = layout
        self.sources = sources

    def packed(self, by_pattern: dict[str, Any], name: str, model: PreTrainedModel) -> PackedWeight:
        path, _, attribute = name.rpartition(".")
        count, dtype = shape_of(model.get_submodule(path), attribute)[0], model.get_parameter(name).dtype
        for pattern, tensors in by_pattern.items():
            name_pattern = pattern.removesuffix(_END)
            if len(tensors) != count and not name_pattern.endswith(self.layout.ignored):
                raise CheckpointError(
                    f"'{name}' has {count} experts, but the checkpoint stores '{name_pattern}' of only "
                    f"{len(tensors)} experts as {self.layout.kind}. Use a checkpoint that stores all experts as "
                    f"{self.layout.kind}, or the dense checkpoint"
                )
        parts = []
        for i in range(count):
            for source in self.sources:
                patterns = {part: f"{source}{part}{_END}" for part in self.layout.parts}
                tensors = {part: by_pattern[pattern] for part, pattern in patterns.items() if pattern in by_pattern}
                expert = source.strip(".").replace("*", str(i))
                # Pop each tensor from its list, so that it is freed once it is packed.
                tensors_of_expert = self.layout.read({part: t.pop(0) for part, t in tensors.items()}, expert)
                parts.append(self.layout.pack(tensors_of_expert, dtype, expert))
        return self.layout.join(parts, count, name)


def layout_converter(layout: CheckpointLayout, hf_quantizer: Quantizer) -> WeightConverter:
    """Return the converter of linear layers' weights.

    The converter adds the weights' names to `hf_quantizer.layout_names`.
    """
    names = hf_quantizer.layout_names

    class Converter(WeightConverter):
        __slots__ = ()

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            name, pattern = super().rename_source_key(source_key)
            if pattern is not None:
                names.add(name)
            return name, pattern

    return Converter(
        exact_name_patterns([*layout.parts, *layout.ignored]), "weight", [FromLayout(hf_quantizer, layout)]
    )


class RenamePackedWeight(WeightRenaming):
    """Renaming of packed weights whose names in the checkpoint are the names of dense weights (ModelOpt)."""

    __slots__ = ("codes", "packed")

    def __init__(self, packed: set[str], codes: str) -> None:
        super().__init__("weight", codes)
        self.packed, self.codes = packed, codes

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key not in self.packed:
            return source_key, None
        return f"{source_key.removesuffix('weight')}{self.codes}", "weight"


def layout_experts_converter(
    converter: WeightConverter, layout: CheckpointLayout, hf_quantizer: Quantizer
) -> WeightConverter | None:
    """Return the 4-bit counterpart of a dense experts' converter; None if its operations have no counterpart."""
    operations, sources = list(converter.operations), list(converter.source_patterns)
    joins = [operation for operation in operations if isinstance(operation, Concatenate)]
    is_known = all(isinstance(operation, (MergeModulelist, Concatenate)) for operation in operations)
    if not is_known or not is_by_expert(converter) or any(join.dim not in (1, -2) for join in joins):
        return None
    if (len(sources) > 1) != bool(joins) or not all(source.endswith(".weight") for source in sources):
        return None
    stems = [source.removesuffix("weight") for source in sources]
    patterns = ["".join(names) for names in product(stems, (*layout.parts, *layout.ignored), [_END])]
    operation = FromLayoutOfExperts(hf_quantizer, layout, stems)
    packed_converter = WeightConverter(patterns, list(converter.target_patterns), [operation])
    packed_converter.scope_prefix, packed_converter.base_model_prefix = (
        converter.scope_prefix,
        converter.base_model_prefix,
    )
    return packed_converter


def experts_converters(
    dense: Iterable[WeightConverter], model: nn.Module, layout: CheckpointLayout, hf_quantizer: Quantizer
) -> list[WeightConverter]:
    """Return the converters of 4-bit experts that a checkpoint stores one by one.

    Dense checkpoints of some families (Gemma 4, Qwen3.5) store all experts in one tensor, so transformers has no
    converter for single experts. Quantization tools store each expert's layers under the names of a dense MLP.

    Args:
        dense: transformers' converters for the model's dense checkpoints.
        model: the model.
        layout: the layout of each expert.
        hf_quantizer: the quantizer that loads the model.
    """
    converters = [layout_experts_converter(converter, layout, hf_quantizer) for converter in dense]
    names: set[str] = set()  # parameters for which transformers has a converter of single experts
    for converter in filter(None, converters):
        names.update(pattern.rpartition(".")[2] for pattern in converter.target_patterns)
    layer_converters: dict[str, WeightConverter] = {}
    for path, module in model.named_modules():
        experts = experts_layout(module)
        if experts is None or experts.transposed or experts.interleaved or not names.isdisjoint(experts.names):
            continue
        stem = path.rpartition(".")[2]
        up_projections = ["gate_proj", "up_proj"] if experts.up == "gate_up_proj" else [experts.up]
        layer_converters[f"{stem}.{experts.up}"] = _converter_of_layers(stem, experts.up, up_projections)
        layer_converters[f"{stem}.{experts.down}"] = _converter_of_layers(stem, experts.down, [experts.down])
    converters += [layout_experts_converter(converter, layout, hf_quantizer) for converter in layer_converters.values()]
    return [converter for converter in converters if converter is not None]


def _converter_of_layers(stem: str, name: str, layers: Sequence[str]) -> WeightConverter:
    """Return a converter that concatenates the dense layers of single experts along their outputs."""
    operations: list[ConversionOps] = [MergeModulelist(dim=0)]
    if len(layers) > 1:
        operations.append(Concatenate(dim=1))
    return WeightConverter([f"{stem}.*.{layer}.weight" for layer in layers], f"{stem}.{name}", operations)


def _tensors_by_pattern(by_pattern: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of one parameter by name: the pattern without its boundaries."""
    tensors = {}
    for pattern, tensor in by_pattern.items():
        name = pattern.removeprefix(_START).removesuffix(_END)
        tensors[name] = tensor[0] if isinstance(tensor, list) else tensor
    return tensors


class _Unchanged(ConversionOps):
    """Identity conversion for saving, because the state dict already has the format's keys."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


@contextlib.contextmanager
def collecting_failures(failures: list[PeftcoreError]) -> Iterator[None]:
    """Append the errors of conversions within the block to `failures`."""
    token = _FAILURES.set(failures)
    try:
        yield
    finally:
        _FAILURES.reset(token)


@contextlib.contextmanager
def recording_failure() -> Iterator[None]:
    """Pass a PeftcoreError from the block to the enclosing `collecting_failures`, and raise it."""
    try:
        yield
    except PeftcoreError as error:
        failures = _FAILURES.get()
        if failures is not None:
            failures.append(error)
        raise
