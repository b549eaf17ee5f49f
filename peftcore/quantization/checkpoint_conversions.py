"""Conversions of a checkpoint's 4-bit tensors to 4-bit parameters, which transformers calls while it loads."""

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

# Around a name in a pattern, so that `weight` matches neither `inject_weight` nor `weight.absmax` nor `weight_scale`.
_START, _END = r"(?<!\w)", r"(?![\w.])"
# Where the errors of conversions go, which transformers only logs while it loads; None: nowhere.
_FAILURES: ContextVar[list[PeftcoreError] | None] = ContextVar("failures", default=None)


def whole_names(names: Iterable[str]) -> list[str]:
    """Return patterns, for a converter's sources, that match these names and no longer ones."""
    return [f"{_START}{name}{_END}" for name in names]


class Quantizer(Protocol):
    """What conversions use of the quantizer with which transformers loads a model.

    Attributes:
        compute_dtype: dtype of products with the weights.
        weights: gets the names of parameters in 4 bits.
        layout_names: gets the names of parameters of which the checkpoint has tensors in another tool's layout.
    """

    weights: set[str]
    layout_names: set[str]

    @property
    def compute_dtype(self) -> torch.dtype | None: ...


class _ToPacked(ConversionOps):
    """Conversion of a checkpoint's tensors to a 4-bit parameter. Subclasses build the packed weight."""

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def packed(self, by_pattern: dict[str, Any], name: str, model: PreTrainedModel) -> PackedWeight:
        """Return the packed weight of the parameter `name` from its tensors by the pattern of their names.

        Raises:
            PeftcoreError: the tensors do not fit, or the parameter is not one that is read.
        """
        raise NotImplementedError

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        path, _, attribute = full_layer_name.rpartition(".")
        module: Any = model.get_submodule(path)
        with noted():
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
        return _AsItIs()


class Deserialize(_ToPacked):
    """Conversion of weights in the formats of bitsandbytes and peftcore."""

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        if len(input_dict) > 1:
            return super().convert(input_dict, model, full_layer_name, **kwargs)
        path, _, attribute = full_layer_name.rpartition(".")  # a dense weight, as the file has it
        like = getattr(model.get_submodule(path), attribute)
        tensors = _by_part(input_dict)
        return {name: t.to(like.dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def packed(self, by_pattern: dict[str, Any], name: str, model: PreTrainedModel) -> PackedWeight:
        tensors, attribute = _by_part(by_pattern), name.rpartition(".")[2]
        if attribute not in tensors:
            raise CheckpointError(
                f"the checkpoint has the 4-bit state of '{name}' but not its weight. Download it again"
            )
        parts = {part.removeprefix(f"{attribute}."): t for part, t in tensors.items() if part != attribute}
        packed = from_tensors(tensors[attribute], parts, name)
        return packed._replace(codes=packed.codes.clone())


class FromBlocks(_ToPacked):
    """Conversion of experts in MXFP4 as gpt-oss stores them."""

    def packed(self, by_pattern: dict[str, Any], name: str, model: PreTrainedModel) -> PackedWeight:
        tensors = {f"_{pattern.rpartition('_')[2]}": t for pattern, t in _by_part(by_pattern).items()}
        missing = [part for part in (BLOCKS, SCALES) if part not in tensors]
        if missing:
            raise CheckpointError(f"the checkpoint lacks '{name}{missing[0]}'. Download it again")
        blocks = tensors[BLOCKS]
        if blocks.untyped_storage().filename is not None:  # memory-mapped, which may be read-only
            blocks = blocks.clone()
        return from_blocks(blocks, tensors[SCALES], model.get_parameter(name).dtype, name)


class FromLayout(_ToPacked):
    """Conversion of a layer's weight in 4 bits that another tool wrote."""

    def __init__(self, hf_quantizer: Quantizer, layout: CheckpointLayout) -> None:
        super().__init__(hf_quantizer)
        self.layout = layout

    def packed(self, by_pattern: dict[str, Any], name: str, model: PreTrainedModel) -> PackedWeight:
        path = name.rpartition(".")[0]
        module: Any = model.get_submodule(path)
        if not is_linear(module):
            raise PeftcoreError(
                f"'{path}' is {type(module).__name__} with a weight of {self.layout.tool} in {self.layout.kind}, and "
                "only linear layers and experts are read. Use a checkpoint where it is dense"
            )
        if name in model.all_tied_weights_keys:
            raise PeftcoreError(
                f"'{path}' has a weight in {self.layout.kind}, but the model shares its weight with "
                f"'{model.all_tied_weights_keys[name]}'. Set tie_word_embeddings=false in its config"
            )
        layout = self.layout
        return layout.pack(layout.read(_by_part(by_pattern), path), module.weight.dtype, path)


class FromLayoutOfExperts(_ToPacked):
    """Conversion of experts in 4 bits that the checkpoint stores one by one to one parameter.

    Args:
        layout: the layout of each.
        sources: name of each projection of an expert up to its last part, as a pattern; projections are joined along
            their outputs in this order.
    """

    def __init__(self, hf_quantizer: Quantizer, layout: CheckpointLayout, sources: Sequence[str]) -> None:
        super().__init__(hf_quantizer)
        self.layout = layout
        self.sources = sources

    def packed(self, by_pattern: dict[str, Any], name: str, model: PreTrainedModel) -> PackedWeight:
        path, _, attribute = name.rpartition(".")
        count, dtype = shape_of(model.get_submodule(path), attribute)[0], model.get_parameter(name).dtype
        for pattern, tensors in by_pattern.items():
            wanted = pattern.removesuffix(_END)
            if len(tensors) != count and not wanted.endswith(self.layout.ignored):
                raise CheckpointError(
                    f"the checkpoint has {len(tensors)} tensors '{wanted}' for '{name}', but the model has {count} "
                    f"experts. Use a checkpoint where all experts are in {self.layout.kind}, or the dense one"
                )
        parts = []
        for i in range(count):
            for source in self.sources:
                patterns = {part: f"{source}{part}{_END}" for part in self.layout.parts}
                tensors = {part: by_pattern[pattern] for part, pattern in patterns.items() if pattern in by_pattern}
                expert = source.strip(".").replace("*", str(i))
                # taken out of the lists, so that each is freed once it is packed
                one = self.layout.read({part: t.pop(0) for part, t in tensors.items()}, expert)
                parts.append(self.layout.pack(one, dtype, expert))
        return self.layout.join(parts, count, name)


def layout_converter(layout: CheckpointLayout, hf_quantizer: Quantizer) -> WeightConverter:
    """Return the converter of layers' weights. `hf_quantizer.layout_names` gets the names that it finds."""
    names = hf_quantizer.layout_names

    class Converter(WeightConverter):
        __slots__ = ()

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            renamed, pattern = super().rename_source_key(source_key)
            if pattern is not None:
                names.add(renamed)
            return renamed, pattern

    return Converter(whole_names([*layout.parts, *layout.ignored]), "weight", [FromLayout(hf_quantizer, layout)])


class NameOfPacked(WeightRenaming):
    """Renaming of packed weights that a tool (ModelOpt) gives the name of dense ones."""

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
    """Return the converter of experts in 4 bits to the parameter of a dense experts' converter; None if it has none."""
    operations, sources = list(converter.operations), list(converter.source_patterns)
    joins = [each for each in operations if isinstance(each, Concatenate)]
    is_known = all(isinstance(each, (MergeModulelist, Concatenate)) for each in operations)
    if not is_known or not is_by_expert(converter) or any(each.dim not in (1, -2) for each in joins):
        return None
    if (len(sources) > 1) != bool(joins) or not all(source.endswith(".weight") for source in sources):
        return None
    stems = [source.removesuffix("weight") for source in sources]
    patterns = ["".join(names) for names in product(stems, (*layout.parts, *layout.ignored), [_END])]
    operation = FromLayoutOfExperts(hf_quantizer, layout, stems)
    of_experts = WeightConverter(patterns, list(converter.target_patterns), [operation])
    of_experts.scope_prefix, of_experts.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
    return of_experts


def experts_converters(
    dense: Iterable[WeightConverter], model: nn.Module, layout: CheckpointLayout, hf_quantizer: Quantizer
) -> list[WeightConverter]:
    """Return the converters of experts in 4 bits that a checkpoint stores one by one.

    Dense checkpoints of some families (Gemma 4, Qwen3.5) have one tensor of all experts, so that transformers has no
    converter for single ones. Tools that quantize layers name them as the layers of a dense MLP.

    Args:
        dense: transformers' converters of the model's dense checkpoints.
        model: the model.
        layout: the layout of each expert.
        hf_quantizer: the quantizer that loads the model.
    """
    converters = [layout_experts_converter(converter, layout, hf_quantizer) for converter in dense]
    names: set[str] = set()  # of parameters for which transformers has a converter of single experts
    for converter in filter(None, converters):
        names.update(pattern.rpartition(".")[2] for pattern in converter.target_patterns)
    of_layers: dict[str, WeightConverter] = {}
    for path, module in model.named_modules():
        experts = experts_layout(module)
        if experts is None or experts.transposed or experts.interleaved or not names.isdisjoint(experts.names):
            continue
        stem = path.rpartition(".")[2]
        ups = ["gate_proj", "up_proj"] if experts.up == "gate_up_proj" else [experts.up]
        of_layers[f"{stem}.{experts.up}"] = _converter_of_layers(stem, experts.up, ups)
        of_layers[f"{stem}.{experts.down}"] = _converter_of_layers(stem, experts.down, [experts.down])
    converters += [layout_experts_converter(converter, layout, hf_quantizer) for converter in of_layers.values()]
    return [converter for converter in converters if converter is not None]


def _converter_of_layers(stem: str, name: str, layers: Sequence[str]) -> WeightConverter:
    """Return the converter of dense layers of single experts, joined along their outputs, to one parameter."""
    operations: list[ConversionOps] = [MergeModulelist(dim=0)]
    if len(layers) > 1:
        operations.append(Concatenate(dim=1))
    return WeightConverter([f"{stem}.*.{layer}.weight" for layer in layers], f"{stem}.{name}", operations)


def _by_part(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of one parameter, by the names that the patterns mean."""
    tensors = {}
    for pattern, tensor in found.items():
        name = pattern.removeprefix(_START).removesuffix(_END)
        tensors[name] = tensor[0] if isinstance(tensor, list) else tensor
    return tensors


class _AsItIs(ConversionOps):
    """Conversion for saving that changes nothing: the state dict already has the format's keys."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


@contextlib.contextmanager
def collected(failures: list[PeftcoreError]) -> Iterator[None]:
    """Add the errors of conversions within the block to `failures`."""
    token = _FAILURES.set(failures)
    try:
        yield
    finally:
        _FAILURES.reset(token)


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Pass a PeftcoreError that the block raises to `collected`."""
    try:
        yield
    except PeftcoreError as error:
        failures = _FAILURES.get()
        if failures is not None:
            failures.append(error)
        raise
