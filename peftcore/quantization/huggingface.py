"""4-bit loading for transformers: `from_pretrained(..., quantization_config=FourBitConfig())`, and `load`.

transformers reads a checkpoint tensor by tensor and passes each weight to the quantizer below. Memory therefore holds
the quantized part of the model and one dense weight, or the weights of one expert if the checkpoint stores experts one
by one. Importing this module registers the quantizer.
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
    RenamePackedWeight,
    collecting_failures,
    exact_name_patterns,
    experts_converters,
    layout_converter,
    recording_failure,
)
from peftcore.quantization.checkpoint_layouts import find_layout, find_quantization_config
from peftcore.quantization.config_sync import sync_config
from peftcore.quantization.convert import (
    convert_dense,
    quantize,
    quantized_experts,
    quantized_layers,
    release_free_memory,
    speed_up_decoding,
)
from peftcore.quantization.formats import PARTS, FourBitSettings, check_quant_type
from peftcore.quantization.four_bit_format import DTYPES, METHOD
from peftcore.quantization.mxfp4_format import BLOCKS, SCALES
from peftcore.quantization.packed_experts import pack_parameter, packs_transpose
from peftcore.quantization.parameters import quantize_experts, refuse_non_finite
from peftcore.quantization.quant_types import check_rows, refuse_options, refuse_plugin_checkpoint
from peftcore.quantization.quantizable import expert_parameters, select_experts, select_layers, warn_of_dense


@register_quantization_config(METHOD)
class FourBitConfig(QuantizationConfigMixin):
    """Config for quantizing a dense checkpoint in `from_pretrained`, with the arguments of `peftcore.quantize`.

    For checkpoints quantized by bitsandbytes, use `peftcore.quantization.load`: `from_pretrained` only accepts
    bitsandbytes' config for them and raises a ValueError otherwise.
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
            raise PeftcoreError(f"compute_dtype must be {', '.join(DTYPES)} or None, found {compute_dtype!r}")
        self.quant_method = METHOD
        self.quant_type = quant_type
        self.double_quant = settings.double_quant
        self.skip = list(skip) if skip is not None else None
        self.compute_dtype = compute_dtype
        self.blocksize = settings.blocksize
        self.stored = stored  # `quantization_config` of a checkpoint that another tool wrote (`find_layout`)

    @property
    def settings(self) -> FourBitSettings:
        """The settings, with `compute_dtype` as a dtype. The attributes are values that JSON can store."""
        dtype = None if self.compute_dtype is None else DTYPES[self.compute_dtype]
        return FourBitSettings(self.quant_type, self.double_quant, self.blocksize, dtype)


@register_quantizer(METHOD)
class FourBitQuantizer(HfQuantizer):
    """transformers' quantizer for `FourBitConfig`: quantizes dense checkpoints and reads 4-bit ones while loading."""

    quantization_config: FourBitConfig
    # Without this attribute, Trainer refuses a quantized model that is not wrapped by PEFT.
    is_qat_trainable = True
    is_trainable = True
    quantized_element_size = 0.5
    serialized_names: ClassVar = {"weight": exact_name_patterns(["weight", *(f"weight.{part}" for part in PARTS)])}

    def __init__(self, quantization_config: FourBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.weights: set[str] = set()
        self.is_tensor_parallel = False
        self.blocksizes: dict[str, int] = {}  # block sizes of experts by parameter name
        self.layout_names: set[str] = set()  # parameters that the checkpoint stores in another tool's layout
        self.files: Sequence[str] = ()
        self.model: nn.Module | None = None  # the model, while it is being loaded

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
        self.is_tensor_parallel = ranks.count() > 1 and getattr(model.config, "distributed_config", None) is not None
        if self.is_tensor_parallel and self.pre_quantized:
            raise PeftcoreError(
                "cannot load a 4-bit checkpoint into a tensor-parallel model (tp_plan, tp_size, distributed_config). "
                "Load the dense checkpoint that way and call peftcore.quantize(model), or load this checkpoint without "
                "tensor parallelism, call parallelize_module, and then peftcore.quantize(model) again"
            )
        if not self.pre_quantized and not self.is_tensor_parallel:
            config, tied = self.quantization_config, model.all_tied_weights_keys
            layers = select_layers(model, config.skip)
            warn_of_dense(model, config.skip)
            experts = select_experts(model, config.skip, config.blocksize)
            layers = {path: layers[path] for path in layers if f"{path}.weight" not in {*tied, *tied.values()}}
            check_rows(model, config.settings, layers, experts, config.skip)
            for path, blocksizes in experts.items():
                self.blocksizes |= {f"{path}.{name}": size for name, size in blocksizes.items()}
            self.weights = {*(f"{path}.weight" for path in layers), *self.blocksizes} - {*tied, *tied.values()}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.model = None
        if self.is_tensor_parallel:  # each rank has loaded its dense shards
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
        speed_up_decoding(model)
        sync_config(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Return converters that fill the model's 4-bit weights. transformers before 5.21 passes no model."""
        model = model or self.model
        assert model is not None
        if not self.pre_quantized:
            return [
                _convert_by_expert(conversion) if isinstance(conversion, WeightConverter) else conversion
                for conversion in weight_conversions
            ]
        # Do not call `super()`: in older transformers it adds nothing, and in newer ones only the converter below.
        conversions = [
            *weight_conversions,
            WeightConverter(self.serialized_names["weight"], "weight", [Deserialize(self)]),
        ]
        stored_config = self.quantization_config.stored
        layout = None if stored_config is None else find_layout(stored_config, "")
        # The converters of experts come first, because older transformers also match `w1.weight_packed` by `w1.weight`.
        if layout is not None:
            dense = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
            conversions = [*experts_converters(dense, model, layout, self), *conversions]
            conversions.append(layout_converter(layout, self))
            if layout.packed_names is not None:
                with recording_failure():
                    conversions.insert(0, RenamePackedWeight(layout.packed_names(self.files), layout.parts[0]))
        names: dict[str, None] = {}
        for path, module in base_modules(model):
            names.update(dict.fromkeys(expert_parameters(model, path, module)))
        names.pop("weight", None)
        for name in names:
            parts = exact_name_patterns([name, *(f"{name}.{part}" for part in PARTS)])
            conversions.append(WeightConverter(parts, name, [Deserialize(self)]))
            blocks = exact_name_patterns([f"{name}{part}" for part in (BLOCKS, SCALES)])
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
            with recording_failure():
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
        """Quantize the experts' parameter `name`, one expert at a time as they are read."""
        config, blocksize = self.hf_quantizer.quantization_config, self.hf_quantizer.blocksizes[name]
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        shape = shape_of(module, attribute)

        def checked_experts() -> Iterator[Tensor]:
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

        with recording_failure():
            settings = replace(config.settings, blocksize=blocksize)
            packed = quantize_experts(checked_experts(), shape, settings, packs_transpose(module, config.quant_type))
        pack_parameter(module, attribute, packed, self.hf_quantizer.compute_dtype)
        return {name: module.get_parameter(attribute)}


class _ByExpert(WeightConverter):
    """Converter that builds a quantized experts' parameter expert by expert."""

    __slots__ = ()

    def convert(self, layer_name: str, model: Any = None, config: Any = None, **kwargs: Any) -> dict[str, Any]:
        quantize, lists = self.quantization_operation, self.collected_tensors
        counts = {len(tensors) for tensors in lists.values()}
        is_by_expert = isinstance(quantize, _Quantize) and layer_name in quantize.hf_quantizer.blocksizes
        are_jobs = all(map(callable, chain.from_iterable(lists.values())))
        if not is_by_expert or len(counts) != 1 or not are_jobs:
            return super().convert(layer_name, model=model, config=config, **kwargs)
        jobs_by_pattern = {pattern: lists.pop(pattern) for pattern in list(lists)}

        def experts() -> Iterator[Tensor]:
            for i in range(*counts):
                value = expert_of(
                    self, {pattern: jobs[i]() for pattern, jobs in jobs_by_pattern.items()}, layer_name, model
                )
                with recording_failure():
                    refuse_non_finite(value, f"{layer_name}[{i}]")
                yield value

        return quantize.experts(model, layer_name, experts())


def _convert_by_expert(converter: WeightConverter) -> WeightConverter:
    """Return a `_ByExpert` copy of a converter that handles experts separately, or the converter itself."""
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
    checkpoint = os.fspath(path)
    quantization_config = FourBitConfig(quant_type, double_quant, skip, compute_dtype, blocksize)
    config, options = _config_and_options(checkpoint, options)
    stored_config, layout = find_quantization_config(config), None
    if stored_config is None:
        options["quantization_config"] = quantization_config
    else:
        layout = _read_as_ours(config, stored_config, quantization_config, checkpoint)
    model_class = model_class or _model_class_of(config)
    reading = contextlib.nullcontext() if stored_config is None else reading_synchronously()
    with _raising_read_errors(checkpoint), reading_without_mmap(), reading:
        model, info = model_class.from_pretrained(
            checkpoint, config=config, dtype=dtype, output_loading_info=True, **options
        )
    for parameter in model.parameters():
        # A parameter that is memory-mapped nevertheless would keep the whole file resident.
        if parameter.untyped_storage().filename is not None:
            parameter.data = parameter.data.clone()
    release_free_memory()
    if layout is not None:
        _check_layout(model, layout, info["unexpected_keys"], checkpoint)
    elif stored_config is not None and stored_config.get("quant_method") == "mxfp4":
        _check_blocks(model, checkpoint)
    elif stored_config is not None:
        _warn_of_dense_experts(model, checkpoint, stored_config.get("llm_int8_skip_modules") or ())
    _refuse_missing(model, info["missing_keys"], checkpoint)
    return model


def _read_as_ours(
    config: PretrainedConfig, stored_config: Mapping[str, Any], quantization_config: FourBitConfig, checkpoint: str
) -> CheckpointLayout | None:
    """Make transformers read a 4-bit checkpoint with the quantizer above.

    Returns:
        The checkpoint's layout if another tool wrote it, else None.

    Raises:
        PeftcoreError: the checkpoint is quantized in an unsupported format.
    """
    quant_method = stored_config.get("quant_method")
    if quant_method in (METHOD, "mxfp4") or (quant_method == "bitsandbytes" and stored_config.get("load_in_4bit")):
        config.quantization_config = quantization_config.to_dict()
        return None
    layout = find_layout(stored_config, checkpoint)
    if layout is None:
        refuse_plugin_checkpoint(stored_config, checkpoint)
        raise PeftcoreError(
            f"'{checkpoint}' is quantized with {quant_method!r}, which is not supported. Use a dense checkpoint, or "
            "a checkpoint in bitsandbytes' 4-bit format, MXFP4, GPTQ, AWQ, NVFP4 or compressed-tensors' W4A16"
        )
    if layout.warning:
        warn(layout.warning)
    if stored_config.get("kv_cache_scheme"):
        warn(
            f"'{checkpoint}' specifies a quantized KV cache, which is not supported. The cache stays in the model's "
            "dtype"
        )
    layout_config = FourBitConfig(
        layout.quant_type,
        skip=quantization_config.skip,
        compute_dtype=quantization_config.compute_dtype,
        stored=stored_config,
    )
    config.quantization_config = layout_config.to_dict()
    return layout


@contextlib.contextmanager
def _raising_read_errors(checkpoint: str) -> Iterator[None]:
    """Raise the conversion errors that transformers only logs, and name the checkpoint in read errors."""
    failures: list[PeftcoreError] = []
    try:
        with collecting_failures(failures):
            yield
    except SafetensorError as error:
        raise CheckpointError(
            f"the weights in '{checkpoint}' cannot be read: {error}. The checkpoint is damaged"
        ) from error
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
    checkpoint = os.fspath(path)
    config, options = _config_and_options(checkpoint, options)
    model_class = model_class or _model_class_of(config)
    model, info = model_class.from_pretrained(
        checkpoint, config=config, dtype=dtype, output_loading_info=True, **options
    )
    _refuse_missing(model, info["missing_keys"], checkpoint)
    return quantize(model, quant_type, skip=skip)


def _config_and_options(checkpoint: str, options: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Return a checkpoint's config, updated by the options that are its fields, and the remaining options."""
    config, _ = AutoConfig.from_pretrained(checkpoint, return_unused_kwargs=True, **options)
    return config, {name: value for name, value in options.items() if not hasattr(config, name)}


def _model_class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the model class that a checkpoint's config names, by default `AutoModelForCausalLM`."""
    name = (config.architectures or [""])[0]
    return getattr(transformers, name, None) or transformers.AutoModelForCausalLM


def _refuse_missing(model: PreTrainedModel, missing_names: Iterable[str], checkpoint: str) -> None:
    """Raise a CheckpointError if the checkpoint lacks weights, which transformers has initialized at random.

    Args:
        model: the loaded model.
        missing_names: names of the weights that the checkpoint lacks. Weights of a new task head may be missing.
        checkpoint: folder or hub id, for the message.
    """
    if model.get_output_embeddings() is not None:  # the head of a language model must be in the checkpoint
        names = sorted(missing_names)
    elif hasattr(model, model.base_model_prefix):
        names = sorted(name for name in missing_names if name.startswith(f"{model.base_model_prefix}."))
    else:  # a backbone; masked language modeling does not train its pooler
        names = sorted(name for name in missing_names if not name.startswith("pooler."))
    if names:
        suffix = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"'{checkpoint}' lacks {', '.join(names[:3])}{suffix}, which would be initialized at random. The "
            "checkpoint is incomplete or belongs to another model class: download it again, or pass model_class"
        )


def _dense_experts(model: nn.Module, skipped_paths: Sequence[str] = ()) -> list[str]:
    """Return the full names of experts' weights that are dense."""
    names: list[str] = []
    for path, module in base_modules(model):
        if path not in skipped_paths:
            experts = expert_parameters(model, path, module)
            names += [f"{path}.{name}" for name in experts if module.get_parameter(name).is_floating_point()]
    return names


def _check_blocks(model: nn.Module, checkpoint: str) -> None:
    """Raise a CheckpointError unless all experts of an MXFP4 model were read from blocks."""
    dense = _dense_experts(model)
    if dense or next(quantized_experts(model), None) is None:
        problem = f"no blocks of '{dense[0]}'" if dense else "no experts in blocks"
        raise CheckpointError(
            f"'{checkpoint}' is quantized with 'mxfp4', but has {problem}. Only experts in gpt-oss's format can be "
            "read. Use a dense checkpoint"
        )


def _check_layout(
    model: PreTrainedModel, layout: CheckpointLayout, unexpected_keys: Iterable[str], checkpoint: str
) -> None:
    """Raise a PeftcoreError unless all of the checkpoint's weights in the layout have been read."""
    unread_names = sorted(model.hf_quantizer.layout_names.intersection(unexpected_keys))
    if unread_names:
        raise PeftcoreError(
            f"'{checkpoint}' has {len(unread_names)} {layout.kind} weights of {layout.tool} ('{unread_names[0]}') that "
            "belong neither to linear layers nor to experts stored one by one. Use the dense checkpoint"
        )
    if next(quantized_layers(model), None) is None and next(quantized_experts(model), None) is None:
        raise CheckpointError(
            f"according to its config, '{checkpoint}' was quantized by {layout.tool}, but it has no "
            f"'{layout.known_by or layout.parts[0]}'. The checkpoint is damaged or has another format"
        )


def _warn_of_dense_experts(model: nn.Module, checkpoint: str, skipped_paths: Sequence[str]) -> None:
    """Warn about dense experts, which transformers' bitsandbytes integration does not quantize."""
    dense = _dense_experts(model, skipped_paths)
    if dense:
        warn(
            f"{len(dense)} weights of experts ('{dense[0]}') are dense in '{checkpoint}'. To quantize them as well, "
            "call peftcore.quantize(model)",
        )


_Change = Callable[[], contextlib.AbstractContextManager[None]]


def _shared_by_threads(change: _Change) -> _Change:
    """Apply a process-wide change when the first thread enters its block, and undo it when the last one leaves.

    If each thread applied the change itself, overlapping threads would save and restore each other's changed value.
    """
    lock, active_blocks, undo = threading.Lock(), set[object](), contextlib.ExitStack()

    @contextlib.contextmanager
    @functools.wraps(change)
    def shared_change() -> Iterator[None]:
        token = object()
        try:
            with lock:
                if not active_blocks:
                    undo.enter_context(change())
                active_blocks.add(token)
            yield
        finally:
            with lock:
                active_blocks.discard(token)
                if not active_blocks:
                    undo.close()

    return shared_change


@_shared_by_threads
@contextlib.contextmanager
def reading_synchronously() -> Iterator[None]:
    """Make transformers read each tensor when it is converted, instead of prefetching it in threads.

    The allocator does not reuse the threads' memory for converted weights, so loading would take twice the checkpoint's
    size.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    previous = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if previous is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = previous


@_shared_by_threads
@contextlib.contextmanager
def reading_without_mmap() -> Iterator[None]:
    """Make transformers read weights with pread instead of memory-mapping files.

    Pages of a mapped file stay resident until it is closed, so at the end of loading, the whole dense checkpoint would
    be in memory in addition to the quantized model. Threads that load other models at the same time are not affected.
    """
    import transformers.modeling_utils as reader

    safe_open = reader.safe_open

    def open_without_mmap(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "mmap":
            kwargs["backend"] = "pread"
        return safe_open(*args, **kwargs)

    reader.safe_open = open_without_mmap
    try:
        yield
    finally:
        reader.safe_open = safe_open
