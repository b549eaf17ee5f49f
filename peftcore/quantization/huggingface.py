"""4 bits for transformers: `from_pretrained(..., quantization_config=FourBitConfig())`, and `load`.

transformers reads a checkpoint tensor by tensor and passes each weight to the quantizer below, so memory holds the
quantized model and one dense weight at a time, or the weights of one expert if the checkpoint stores experts one by
one. Importing this module registers the quantizer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftcore.engine.adaptation import fast_path
from peftcore.errors import CheckpointError, PeftcoreError, warn
from peftcore.model.base_modules import base_modules
from peftcore.model.experts.conversion import expert_of, is_by_expert
from peftcore.plugin import ranks
from peftcore.plugin.checkpoints import CheckpointLayout
from peftcore.plugin.layers import shape_of
from peftcore.quantization.checkpoint_conversions import (
    Deserialize,
    FromBlocks,
    NameOfPacked,
    collected,
    experts_converters,
    layout_converter,
    noted,
    whole_names,
)
from peftcore.quantization.checkpoint_layouts import described, find_layout
from peftcore.quantization.config_sync import sync_config
from peftcore.quantization.convert import (
    convert_dense,
    give_back_freed,
    quantize,
    quantized_experts,
    quantized_layers,
    quicken_few_rows,
)
from peftcore.quantization.formats import PARTS, FourBitSettings, check_quant_type
from peftcore.quantization.four_bit_format import DTYPES, METHOD
from peftcore.quantization.mxfp4_format import BLOCKS, SCALES
from peftcore.quantization.packed_experts import is_turned, pack_parameter
from peftcore.quantization.parameters import joined_experts, refuse_non_finite
from peftcore.quantization.quant_types import check_rows, refuse_options, refuse_read_as_it_is
from peftcore.quantization.quantizable import expert_parameters, selected, selected_experts, warn_of_dense


@register_quantization_config(METHOD)
class FourBitConfig(QuantizationConfigMixin):
    """Config for quantizing a dense checkpoint in `from_pretrained`, with the arguments of `peftcore.quantize`.

    For a checkpoint quantized by bitsandbytes, transformers accepts only bitsandbytes' config and raises ValueError:
    load it with `peftcore.quantization.load`.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        double_quant: bool = True,
        skip: Sequence[str] | None = None,
        compute_dtype: torch.dtype | str | None = None,
        blocksize: int = 64,
        stored: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        check_quant_type(quant_type)
        settings = FourBitSettings(quant_type, double_quant, blocksize).resolved()
        compute_dtype = str(compute_dtype).removeprefix("torch.") if compute_dtype is not None else None
        if compute_dtype is not None and compute_dtype not in DTYPES:
            raise PeftcoreError(f"compute_dtype must be one of {', '.join(DTYPES)} or None, found {compute_dtype!r}")
        self.quant_method = METHOD
        self.quant_type = quant_type
        self.double_quant = settings.double_quant
        self.skip = list(skip) if skip is not None else None
        self.compute_dtype = compute_dtype
        self.blocksize = settings.blocksize
        self.stored = stored  # `quantization_config` of a checkpoint that another tool wrote (`find_layout`)

    @property
    def settings(self) -> FourBitSettings:
        """The settings, with `compute_dtype` as a dtype; the attributes are what a JSON file has."""
        dtype = None if self.compute_dtype is None else DTYPES[self.compute_dtype]
        return FourBitSettings(self.quant_type, self.double_quant, self.blocksize, dtype)


@register_quantizer(METHOD)
class FourBitQuantizer(HfQuantizer):
    """Quantizer that quantizes dense checkpoints while loading, and loads those in bitsandbytes' 4-bit format."""

    quantization_config: FourBitConfig
    # Without this, Trainer refuses a quantized model that is not wrapped by PEFT.
    is_qat_trainable = True
    is_trainable = True
    quantized_element_size = 0.5
    serialized_names: ClassVar = {"weight": whole_names(["weight", *(f"weight.{part}" for part in PARTS)])}

    def __init__(self, quantization_config: FourBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.weights: set[str] = set()
        self.divided = False  # by a plan, over ranks
        self.blocksizes: dict[str, int] = {}  # of experts, by parameter name
        self.layout_names: set[str] = set()  # parameters of which the checkpoint has tensors in another tool's layout
        self.files: Sequence[str] = ()
        self.model: nn.Module | None = None  # while it is loaded

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.quantization_config.settings.compute_dtype

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.weights

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.files = kwargs.get("checkpoint_files") or ()
        self.model = model
        self.divided = ranks.count() > 1 and getattr(model.config, "distributed_config", None) is not None
        if self.divided and self.pre_quantized:
            raise PeftcoreError(
                "a checkpoint in 4 bits cannot be divided over the ranks while it is loaded (tp_plan, tp_size, "
                "distributed_config). Load the dense checkpoint that way and call peftcore.quantize(model), or load "
                "this one whole, call parallelize_module, and peftcore.quantize(model) again"
            )
        if not self.pre_quantized and not self.divided:
            config, tied = self.quantization_config, model.all_tied_weights_keys
            chosen = selected(model, config.skip)
            warn_of_dense(model, config.skip)
            experts = selected_experts(model, config.skip, config.blocksize)
            chosen = {path: chosen[path] for path in chosen if f"{path}.weight" not in {*tied, *tied.values()}}
            check_rows(model, config.settings, chosen, experts, config.skip)
            for path, blocksizes in experts.items():
                self.blocksizes |= {f"{path}.{name}": size for name, size in blocksizes.items()}
            self.weights = {*(f"{path}.weight" for path in chosen), *self.blocksizes} - {*tied, *tied.values()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.model = None
        if self.divided:  # each rank has read its dense parts
            config = self.quantization_config
            return quantize(
                model,
                config.quant_type,
                double_quant=config.double_quant,
                skip=config.skip,
                compute_dtype=self.compute_dtype,
                blocksize=config.blocksize,
            )
        fast_path.guard(model)
        quicken_few_rows(model)
        sync_config(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Return converters that fill the model's 4-bit weights; transformers before 5.21 passes no model."""
        model = model or self.model
        assert model is not None
        if not self.pre_quantized:
            return [
                _by_expert(conversion) if isinstance(conversion, WeightConverter) else conversion
                for conversion in weight_conversions
            ]
        # `super()` is not called: in older transformers it adds nothing, and in newer ones it adds only the converter
        # below, for a format like ours.
        conversions = [
            *weight_conversions,
            WeightConverter(self.serialized_names["weight"], "weight", [Deserialize(self)]),
        ]
        stored = self.quantization_config.stored
        layout = None if stored is None else find_layout(stored, "")
        if layout is not None:  # first: older transformers match `w1.weight` with `w1.weight_packed`, too
            dense = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
            conversions = [*experts_converters(dense, model, layout, self), *conversions]
            conversions.append(layout_converter(layout, self))
            if layout.packed_names is not None:
                with noted():
                    conversions.insert(0, NameOfPacked(layout.packed_names(self.files), layout.parts[0]))
        names: dict[str, None] = {}
        for path, module in base_modules(model):
            names.update(dict.fromkeys(expert_parameters(model, path, module)))
        names.pop("weight", None)
        for name in names:
            parts = whole_names([name, *(f"{name}.{part}" for part in PARTS)])
            conversions.append(WeightConverter(parts, name, [Deserialize(self)]))
            blocks = whole_names([f"{name}{part}" for part in (BLOCKS, SCALES)])
            conversions.append(WeightConverter(blocks, name, [FromBlocks(self)]))
        return conversions

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": Deserialize}


class _Quantize(ConversionOps):
    def __init__(self, hf_quantizer: FourBitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, nn.Parameter]:
        config = self.hf_quantizer.quantization_config
        quantized_parameters: dict[str, nn.Parameter] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            value = value[0] if isinstance(value, list) else value
            with noted():
                refuse_non_finite(value, name)
            if name in self.hf_quantizer.blocksizes:
                quantized_parameters |= self.experts(model, name, value)
                continue
            module = model.get_submodule(name.rpartition(".")[0])
            module.weight = nn.Parameter(value, requires_grad=False)
            convert_dense(module, config.settings)
            quantized_parameters[name] = module.weight
        return quantized_parameters

    def experts(self, model: nn.Module, name: str, experts: Iterable[Tensor]) -> dict[str, nn.Parameter]:
        """Quantize the parameter `name` expert by expert as they arrive."""
        config, blocksize = self.hf_quantizer.quantization_config, self.hf_quantizer.blocksizes[name]
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        shape = shape_of(module, attribute)

        def checked() -> Iterator[Tensor]:
            count = 0
            for count, expert in enumerate(experts, 1):
                if tuple(expert.shape) != shape[1:] or count > shape[0]:
                    raise CheckpointError(
                        f"'{name}' has shape {list(expert.shape)} at expert {count - 1}, but the model needs "
                        f"{list(shape)}"
                    )
                yield expert
            if count != shape[0]:
                raise CheckpointError(f"'{name}' has {count} experts, but the model needs {list(shape)}")

        with noted():
            settings = replace(config.settings, blocksize=blocksize)
            packed = joined_experts(checked(), shape, settings, is_turned(module, config.quant_type))
        pack_parameter(module, attribute, packed, self.hf_quantizer.compute_dtype)
        return {name: module.get_parameter(attribute)}


class _ByExpert(WeightConverter):
    """Conversion that makes a parameter from experts' tensors, one expert at a time, if it is quantized."""

    __slots__ = ()

    def convert(self, layer_name: str, model: Any = None, config: Any = None, **kwargs: Any) -> dict[str, Any]:
        quantize, lists = self.quantization_operation, self.collected_tensors
        counts = {len(tensors) for tensors in lists.values()}
        is_by_expert = isinstance(quantize, _Quantize) and layer_name in quantize.hf_quantizer.blocksizes
        are_jobs = all(map(callable, chain.from_iterable(lists.values())))
        if not is_by_expert or len(counts) != 1 or not are_jobs:
            return super().convert(layer_name, model=model, config=config, **kwargs)
        taken = {pattern: lists.pop(pattern) for pattern in list(lists)}

        def experts() -> Iterator[Tensor]:
            for i in range(*counts):
                value = expert_of(self, {pattern: jobs[i]() for pattern, jobs in taken.items()}, layer_name, model)
                with noted():
                    refuse_non_finite(value, f"{layer_name}[{i}]")
                yield value

        return quantize.experts(model, layer_name, experts())


def _by_expert(converter: WeightConverter) -> WeightConverter:
    """Return the converter, changed to convert one expert at a time if it treats each expert separately."""
    if not is_by_expert(converter):
        return converter
    by_expert = copy.copy(converter)
    by_expert.__class__ = _ByExpert
    return by_expert


def load(
    path: str | os.PathLike[str],
    quant_type: str = "nf4",
    *,
    double_quant: bool = True,
    skip: Sequence[str] | None = None,
    compute_dtype: torch.dtype | str | None = None,
    blocksize: int = 64,
    dtype: torch.dtype | str = "auto",
    model_class: type[PreTrainedModel] | None = None,
    **options: Any,
) -> nn.Module:
    """Implement `peftcore.quantization.load`."""
    where = os.fspath(path)
    quantization_config = FourBitConfig(quant_type, double_quant, skip, compute_dtype, blocksize)
    config, options = _config_and_options(where, options)
    stored, layout = described(config), None
    if stored is None:
        options["quantization_config"] = quantization_config
    else:
        layout = _read_as_ours(config, stored, quantization_config, where)
    model_class = model_class or _class_named_in(config)
    reading = contextlib.nullcontext() if stored is None else read_when_needed()
    with _errors_of_reading(where), not_mapped(), reading:
        model, info = model_class.from_pretrained(
            where, config=config, dtype=dtype, output_loading_info=True, **options
        )
    for parameter in model.parameters():
        if parameter.untyped_storage().filename is not None:  # mapped anyway, which would hold the whole file
            parameter.data = parameter.data.clone()
    give_back_freed()
    if layout is not None:
        _check_layout(model, layout, info["unexpected_keys"], where)
    elif stored is not None and stored.get("quant_method") == "mxfp4":
        _check_blocks(model, where)
    elif stored is not None:
        _warn_of_dense_experts(model, where, stored.get("llm_int8_skip_modules") or ())
    _refuse_missing(model, info["missing_keys"], where)
    return model


def _read_as_ours(
    config: PretrainedConfig, stored: Mapping[str, Any], quantization_config: FourBitConfig, where: str
) -> CheckpointLayout | None:
    """Make transformers read a checkpoint in 4 bits by the quantizer above. Return its layout, if another tool's.

    Raises:
        PeftcoreError: the checkpoint is quantized in another format.
    """
    quant_method = stored.get("quant_method")
    if quant_method in (METHOD, "mxfp4") or (quant_method == "bitsandbytes" and stored.get("load_in_4bit")):
        config.quantization_config = quantization_config.to_dict()
        return None
    layout = find_layout(stored, where)
    if layout is None:
        refuse_read_as_it_is(stored, where)
        raise PeftcoreError(
            f"'{where}' is quantized with {quant_method!r}, which is not supported. Use a dense "
            "checkpoint, or one in bitsandbytes' 4-bit format, MXFP4, GPTQ, AWQ, NVFP4 or compressed-tensors' W4A16"
        )
    if layout.warning:
        warn(layout.warning)
    if stored.get("kv_cache_scheme"):
        warn(f"'{where}' asks for a quantized cache of keys and values, which is left in the model's dtype")
    of_layout = FourBitConfig(
        layout.quant_type, skip=quantization_config.skip, compute_dtype=quantization_config.compute_dtype, stored=stored
    )
    config.quantization_config = of_layout.to_dict()
    return layout


@contextlib.contextmanager
def _errors_of_reading(where: str) -> Iterator[None]:
    """Raise the errors of conversions, which transformers only logs, and name a checkpoint that cannot be read."""
    failures: list[PeftcoreError] = []
    try:
        with collected(failures):
            yield
    except SafetensorError as error:
        raise CheckpointError(f"the weights in '{where}' cannot be read: {error}. The checkpoint is damaged") from error
    except RuntimeError as error:
        if failures:
            raise failures[0] from error
        raise


def load_then_quantize(
    path: str | os.PathLike[str],
    quant_type: str,
    *,
    skip: Sequence[str] | None = None,
    dtype: torch.dtype | str = "auto",
    model_class: type[PreTrainedModel] | None = None,
    double_quant: bool = True,
    blocksize: int = 64,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Load a dense model and quantize it in a plugin's format."""
    refuse_options(FourBitSettings(quant_type, double_quant, blocksize, compute_dtype))
    where = os.fspath(path)
    config, options = _config_and_options(where, options)
    model_class = model_class or _class_named_in(config)
    model, info = model_class.from_pretrained(where, config=config, dtype=dtype, output_loading_info=True, **options)
    _refuse_missing(model, info["missing_keys"], where)
    return quantize(model, quant_type, skip=skip)


def _config_and_options(where: str, options: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Return a checkpoint's config, with those of the options that it has, and the others."""
    config, _ = AutoConfig.from_pretrained(where, return_unused_kwargs=True, **options)
    return config, {name: value for name, value in options.items() if not hasattr(config, name)}


def _class_named_in(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class of models that a checkpoint names, or else that of language models."""
    name = (config.architectures or [""])[0]
    return getattr(transformers, name, None) or transformers.AutoModelForCausalLM


def _refuse_missing(model: PreTrainedModel, missing: Iterable[str], where: str) -> None:
    """Raise a CheckpointError if the checkpoint lacks weights, which transformers has initialised at random.

    Args:
        model: the loaded model.
        missing: names of these weights. A new task's head, outside of the backbone, may be among them.
        where: the checkpoint.
    """
    if model.get_output_embeddings() is not None:  # a language model, whose head is its own
        names = sorted(missing)
    elif hasattr(model, model.base_model_prefix):
        names = sorted(name for name in missing if name.startswith(f"{model.base_model_prefix}."))
    else:  # a backbone, which may lack the pooler that no task of its checkpoint has trained
        names = sorted(name for name in missing if not name.startswith("pooler."))
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"'{where}' lacks {', '.join(names[:3])}{more}, which would be random. The checkpoint is incomplete or "
            "another model's: download it again, or pass its model_class"
        )


def _dense_experts(model: nn.Module, skipped: Sequence[str] = ()) -> list[str]:
    """Return the names of weights of experts that are dense."""
    names: list[str] = []
    for path, module in base_modules(model):
        if path not in skipped:
            experts = expert_parameters(model, path, module)
            names += [f"{path}.{name}" for name in experts if module.get_parameter(name).is_floating_point()]
    return names


def _check_blocks(model: nn.Module, where: str) -> None:
    """Raise a CheckpointError unless all experts of a model in MXFP4 were read from blocks."""
    dense = _dense_experts(model)
    if dense or next(quantized_experts(model), None) is None:
        problem = f"no blocks of '{dense[0]}'" if dense else "no experts in blocks"
        raise CheckpointError(
            f"'{where}' is quantized with 'mxfp4', but has {problem}. Only experts stored as gpt-oss's are read: "
            "use a dense checkpoint"
        )


def _check_layout(model: PreTrainedModel, layout: CheckpointLayout, unexpected: Iterable[str], where: str) -> None:
    """Raise a PeftcoreError unless each weight of the checkpoint in the layout has been read."""
    unread = sorted(model.hf_quantizer.layout_names.intersection(unexpected))
    if unread:
        raise PeftcoreError(
            f"'{where}' has {len(unread)} {layout.kind} weights of {layout.tool} that are neither those of linear "
            f"layers nor of experts that transformers joins expert by expert ('{unread[0]}'). Use the dense checkpoint"
        )
    if next(quantized_layers(model), None) is None and next(quantized_experts(model), None) is None:
        raise CheckpointError(
            f"'{where}' is quantized with {layout.tool} by its config, but has no "
            f"'{layout.known_by or layout.parts[0]}'. The checkpoint is damaged or has another format"
        )


def _warn_of_dense_experts(model: nn.Module, where: str, skipped: Sequence[str]) -> None:
    """Warn of experts that are dense because bitsandbytes in transformers does not quantize them."""
    dense = _dense_experts(model, skipped)
    if dense:
        warn(
            f"{len(dense)} weights of experts ('{dense[0]}') are dense in '{where}'. peftcore.quantize(model) "
            "quantizes them too",
        )


_Change = Callable[[], contextlib.AbstractContextManager[None]]


def _while_any(change: _Change) -> _Change:
    """Make a change of the process last from the first thread that enters its block to the last one that leaves.

    If each thread made the change, one that overlaps would save what another has changed, and restore that.
    """
    lock, inside, undo = threading.Lock(), set[object](), contextlib.ExitStack()

    @contextlib.contextmanager
    @functools.wraps(change)
    def changed() -> Iterator[None]:
        token = object()
        try:
            with lock:
                if not inside:
                    undo.enter_context(change())
                inside.add(token)
            yield
        finally:
            with lock:
                inside.discard(token)
                if not inside:
                    undo.close()

    return changed


@_while_any
@contextlib.contextmanager
def read_when_needed() -> Iterator[None]:
    """Make transformers read a quantized tensor when it is converted within the block, not ahead by threads.

    The memory of what threads have read is not reused for converted weights: a checkpoint would take twice its size.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@_while_any
@contextlib.contextmanager
def not_mapped() -> Iterator[None]:
    """Make transformers read weights instead of memory-mapping files within the block.

    Pages read from a mapped file stay in memory until it is closed, so at the end of loading the whole dense checkpoint
    would be resident in addition to the quantized model. Other threads that load at the same time get the same values.
    """
    import transformers.modeling_utils as reader

    opened = reader.safe_open

    def opened_to_read(*args: Any, **kwargs: Any) -> Any:
        return opened(*args, **({**kwargs, "backend": "pread"} if kwargs.get("backend") == "mmap" else kwargs))

    reader.safe_open = opened_to_read
    try:
        yield
    finally:
        reader.safe_open = opened
