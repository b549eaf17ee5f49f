"""Load base models (a hub id, a folder or a .gguf file), their tokenizers and their processors."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peftcore
from peftcore.errors import PeftcoreError, nearest
from peftcore_cli.bases import adapter_tokenizer, gguf_file, own_code
from peftcore_cli.bases.adapter_folders import Quantization, has_tokenizer
from peftcore_cli.bases.base_files import load_pretrained, quiet_transformers, remote_code
from peftcore_cli.bases.device_choice import HALVES, torch_device, torch_dtype, without_instructions
from peftcore_cli.console import note, require, warn
from peftcore_cli.tasks import conversations, registered

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(model: str, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the adapter's tokenizer, or the base's. If it has no padding token, padding uses the end-of-text token.

    Raises:
        PeftcoreError: the tokenizer cannot be loaded.
    """
    quiet_transformers()
    from transformers import AutoTokenizer

    if adapter is not None and has_tokenizer(adapter):
        return adapter_tokenizer.load(adapter)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, model, "tokenizer")
    if (
        type(tokenizer).__name__ == conversations.MISTRAL
    ):  # transformers prefers this class if mistral-common is installed
        tokenizer_from_json = load_pretrained(AutoTokenizer.from_pretrained, model, "tokenizer", mistral_format=False)
        tokenizer = (
            tokenizer if tokenizer_from_json.eos_token is None else tokenizer_from_json
        )  # an empty tokenizer, if the folder only has tekken.json
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def image_processor(model: str, task: str) -> Any:
    """Load the processor of an image classifier.

    Raises:
        PeftcoreError: it cannot be loaded.
    """
    quiet_transformers()
    from transformers import AutoImageProcessor

    _refuse_gguf(model, task)
    require("PIL", extra="images")
    load_config(model, task)
    return _with_torchvision(AutoImageProcessor, model, "image processor")


def chat_processor(model: str, task: str, *, hears: bool) -> Any:
    """Load the processor of a model for conversations with images, or with audio if `hears` is set.

    Raises:
        PeftcoreError: it cannot be loaded.
    """
    quiet_transformers()
    from transformers import AutoProcessor

    _refuse_gguf(model, task)
    if not hears:
        require("PIL", extra="images")
    load_config(model, task)
    return _with_torchvision(AutoProcessor, model, "processor")


def _refuse_gguf(model: str, task: str) -> None:
    if model.endswith(".gguf"):
        raise PeftcoreError(
            f"--task {task} does not support .gguf files, found '{model}'. Pass a model in transformers' format"
        )


def _with_torchvision(kind: Any, model: str, label: str) -> Any:
    """Load a processor, which may need torchvision.

    Raises:
        PeftcoreError: it cannot be loaded, or torchvision is not installed.
    """
    try:
        return load_pretrained(kind.from_pretrained, model, label)
    except (AttributeError, PeftcoreError) as error:
        # Some releases of transformers raise an AttributeError that does not name the package.
        is_named = isinstance(error, AttributeError) or "torchvision" in str(error).lower()
        if is_named and importlib.util.find_spec("torchvision") is None:
            raise PeftcoreError(
                f"the {label} of '{model}' needs torchvision, which is not installed. Install the release for your "
                "version of PyTorch: pip install torchvision"
            ) from error
        if isinstance(error, PeftcoreError):
            raise
        raise PeftcoreError(f"cannot load the {label} of '{model}': {error}") from error


def speech_processor(model: str, task: str, adapter: Path | None) -> tuple[Any, PretrainedConfig]:
    """Load the processor and the config of a Whisper model.

    Raises:
        PeftcoreError: the processor cannot be loaded, or the model is not a Whisper model.
    """
    quiet_transformers()
    from transformers import AutoFeatureExtractor, WhisperProcessor

    config = load_config(model, task)
    extractor = load_pretrained(AutoFeatureExtractor.from_pretrained, model, "feature extractor")
    tokenizer: Any = load_tokenizer(model, adapter)
    return WhisperProcessor(extractor, tokenizer), config


def load_model(
    model: str,
    task: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    labels: tuple[str, ...] = (),
    quantize: str | Quantization | None = None,
) -> PreTrainedModel:
    """Load a base for `task` in evaluation mode on its device.

    Args:
        model: folder, hub id, or .gguf file.
        task: the task.
        dtype: value of `--dtype`.
        device: value of `--device`.
        labels: labels of a classifier.
        quantize: 4-bit type of the linear layers, or a full record of their quantization; None for dense weights.
    """
    quiet_transformers()
    from peftcore.quantization import release_free_memory

    quantization_choice = Quantization(quantize) if isinstance(quantize, str) else quantize
    packing = None if quantization_choice is None else quantization_choice.arguments()
    options: dict[str, Any] = {"dtype": torch_dtype(dtype, device)}
    is_gguf = model.endswith(".gguf")
    if packing is None and not is_gguf:
        packing = _packing_of(load_config(model, task, labels))
    if packing is not None:
        from peftcore import quantization

        quantization.find_type(packing["quant_type"])
    advice = quantize_advice(
        None if quantization_choice is None or quantization_choice.skip is not None else quantization_choice.quant_type
    )
    if is_gguf:
        with advice:
            base = _load_gguf(model, task, labels, packing, options)
    elif packing is None:
        if registered.find(task).replaces_head:
            options["ignore_mismatched_sizes"] = True
        loader = _auto_class(task).from_pretrained
        base, info = load_pretrained(loader, model, "model", output_loading_info=True, **options, **_head(task, labels))
        _check_whole(base, info["missing_keys"], model, task)
        _check_shapes(base, info.get("mismatched_keys", ()), model)
    else:
        options |= {**packing, **_head(task, labels), "model_class": _auto_class(task)}
        with advice:
            base = load_pretrained(quantization.load, model, "model", **options)
    base.config._name_or_path = model  # transformers would only record the folder of a .gguf file
    if quantization_choice is None and options["dtype"].itemsize == 4:
        _compute_in_fp32(base, device)
    if registered.find(task).learns_texts:
        own_code.complete(base)
    if registered.find(task).reads_tokens:
        _set_padding(base, model)
    release_free_memory()  # return memory that loading has freed to the system
    return base.to(torch_device(device)).eval()


def _load_gguf(
    model: str, task: str, labels: tuple[str, ...], packing: dict[str, Any] | None, options: dict[str, Any]
) -> PreTrainedModel:
    """Load a .gguf file, dense or in 4 bits; `options` are arguments of `from_pretrained`."""
    from peftcore import quantization

    require("gguf")
    gguf_file.check_blocks(model)
    loader, auto_class, config = gguf_file.load, _auto_class(task), load_config(model, task, labels)
    options = {**options, "config": config, "output_loading_info": True}
    reads_tensors_singly = gguf_file.header(model).architecture in gguf_file.ONE_BY_ONE
    if reads_tensors_singly:
        options["model_class"] = auto_class._model_mapping[type(config)]
        if packing is not None and packing["quant_type"] in quantization.QUANT_TYPES:
            from peftcore import FourBitConfig

            options["quantization_config"], packing = FourBitConfig(**packing), None
    else:
        loader = auto_class.from_pretrained
    base, info = load_pretrained(loader, model, "model", **options)
    _check_whole(base, info["missing_keys"], model, task)
    if not reads_tensors_singly and getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer.remove_quantization_config(base)  # loading has dequantized the model
    if packing is not None:
        quantization.quantize(base, **packing)
    return base


def _packing_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return arguments of `quantization.load` that keep a 4-bit checkpoint in 4 bits, or None for other checkpoints."""
    from peftcore.quantization import is_packed

    quantization_config = getattr(config, "quantization_config", None)
    if quantization_config is not None:
        _refuse_unknown_quantization(quantization_config)
    quantization_config = quantization_config if isinstance(quantization_config, dict) else {}
    if quantization_config.get("quant_method") == "bitsandbytes" and quantization_config.get("load_in_4bit"):
        # bitsandbytes' own layers lose gradients on CPUs with AVX512-BF16 after an evaluation.
        return {"quant_type": "nf4", "compute_dtype": quantization_config.get("bnb_4bit_compute_dtype")}
    return {"quant_type": "nf4"} if is_packed(config) else None


def _refuse_unknown_quantization(quantization_config: Any) -> None:
    """Raise a PeftcoreError for a quantization that transformers does not know, because it would load random weights.

    Args:
        quantization_config: the field of the model's config.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = quantization_config.get("quant_method") if isinstance(quantization_config, dict) else quantization_config
    names = {str(name) for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    if isinstance(quantization_config, dict) and (
        quantization_config.get("load_in_4bit") or quantization_config.get("load_in_8bit")
    ):
        names.add("bitsandbytes")
    if not isinstance(method, str) or method not in names:
        raise PeftcoreError(
            f"the model's quantization_config has quant_method={method!r:.100}, which transformers does not know"
            f"{nearest(method, names) if isinstance(method, str) else ''}. Correct it in config.json, or choose a "
            "dense checkpoint"
        )


@contextlib.contextmanager
def quantize_advice(quant_type: str | None) -> Iterator[None]:
    """Inside the block, extend errors that suggest arguments of `peftcore.quantize` with the matching options.

    Args:
        quant_type: 4-bit type of the base; with None, errors stay unchanged.
    """
    try:
        yield
    except PeftcoreError as error:
        method = next(
            (name for name, candidate in peftcore.methods().items() if _quantizes(candidate.config_class)), None
        )
        if quant_type is None or method is None or not any(f"{name}=" in str(error) for name in ("skip", "blocksize")):
            raise
        raise type(error)(
            f"{error}. For `peftcore train`, skip and blocksize are fields of a method: --method {method} --set "
            f"quant_type={quant_type} --set skip=NAME,NAME. Other commands use the values that the adapter records"
        ) from error


def _quantizes(config_class: Any) -> bool:
    """Return whether the method's config has fields for the quantization of the base."""
    return {"quant_type", "skip", "blocksize"} <= {config_field.name for config_field in fields(config_class)}


_CODE_NOT_RUN = ". The repository's own code was not run: read the code, and pass --trust-remote-code"


def _check_whole(base: PreTrainedModel, missing_names: Collection[str], model: str, task: str) -> None:
    """Warn about weights that are missing from the checkpoint and thus random; raise for a .gguf file.

    Args:
        base: the model.
        missing_names: names of the missing weights. A classifier's head may be among them.
        model: name of the model, for messages.
        task: the task.
    """
    base_task = registered.find(task)
    backbone = f"{base.base_model_prefix}." if base_task.new_head else ""
    names = sorted(name for name in missing_names if name.startswith(backbone) and base_task.uses(name))
    if not names:
        return
    lacks = f"lacks {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    if model.endswith(".gguf"):
        raise PeftcoreError(f"cannot load the model of '{model}': the file {lacks}. Download it again")
    code = "" if remote_code() or not getattr(base.config, "auto_map", None) else _CODE_NOT_RUN
    warn(f"the checkpoint '{model}' {lacks}, so these weights are initialised at random{code}")


def _check_shapes(base: PreTrainedModel, mismatched_names: Collection[Any], model: str) -> None:
    """Print a notice if a head for other labels was replaced, and refuse other weights with unexpected shapes."""
    names = [entry if isinstance(entry, str) else entry[0] for entry in mismatched_names]
    backbone = f"{base.base_model_prefix}."
    wrong = next((name for name in names if name.startswith(backbone)), None)
    if wrong is not None:
        raise PeftcoreError(
            f"cannot load the model of '{model}': the weight '{wrong}' does not have the shape that its config "
            "requires. Download the model again, or correct config.json"
        )
    if names:
        note(
            f"the head of '{model}' is for other labels, so it was replaced by a new head for "
            f"{base.config.num_labels} labels"
        )


def _compute_in_fp32(base: PreTrainedModel, device: str) -> None:
    """Compute a 4-bit checkpoint in fp32 if this processor has no instructions for its compute dtype.

    Checkpoints choose a compute dtype for GPUs, which bitsandbytes and peftcore store in the layers as `compute_dtype`.
    """
    import torch

    if torch_device(device).type != "cpu":
        return
    packed = [module for module in base.modules() if isinstance(vars(module).get("compute_dtype"), torch.dtype)]
    for name, full_name in HALVES.items():
        modules: list[Any] = [module for module in packed if module.compute_dtype == getattr(torch, full_name)]
        reason = without_instructions(name)
        if modules and reason is not None:
            note(f"4-bit weights are multiplied in fp32 instead of {name}, the dtype of the checkpoint: {reason}")
            for module in modules:
                module.compute_dtype = torch.float32


def empty_model(model: str, task: str, labels: tuple[str, ...] = ()) -> PreTrainedModel:
    """Return a base on the meta device, without loading weights."""
    from peftcore.quantization import build_empty

    config = load_config(model, task, labels)
    base: Any = build_empty(config, lambda dense: _empty_from_config(dense, model, task))
    if registered.find(task).learns_texts:
        own_code.complete(base)
    return base


def _empty_from_config(config: PretrainedConfig, model: str, task: str) -> Any:
    auto_class = _auto_class(task)
    if not has_code(config, task):
        return auto_class.from_config(config)
    try:
        return auto_class.from_config(config, **remote_code())
    except Exception as error:  # the model's code may not support the meta device
        raise PeftcoreError(f"the code of '{model}' cannot create a model on the meta device: {error}") from error


def load_config(model: str, task: str, labels: tuple[str, ...] = ()) -> PretrainedConfig:
    """Load the config of a base, with the class that `load_model` uses for this task as its architecture."""
    quiet_transformers()
    import transformers
    from transformers import AutoConfig

    if model.endswith(".gguf"):
        config = copy.deepcopy(_gguf_config(model, os.stat(model).st_mtime_ns, task, labels))
    else:
        config = load_pretrained(AutoConfig.from_pretrained, model, "configuration", **_head(task, labels))
    auto_class = _auto_class(task)
    model_classes = auto_class._model_mapping
    description = f"'{model}' ({config.model_type})"
    config_task = registered.find(task)
    if config_task.needed_model is not None and type(config) not in model_classes and not has_code(config, task):
        raise PeftcoreError(f"--task {task} needs {config_task.needed_model.format(description)}")
    if auto_class is transformers.AutoModelForCausalLM and _is_encoder(config):
        raise PeftcoreError(
            f"--task {task} needs a decoder, found the encoder {description}, which attends to the tokens it has to "
            "predict. Use the encoder for classification, tags or pairs, or pass another model"
        )
    config_task.check_config(model, config)
    if type(config) in model_classes:
        config.architectures = [model_classes[type(config)].__name__]
    elif has_code(config, task):
        config.architectures = [str(config.auto_map[_auto_class(task).__name__]).rpartition(".")[2]]
    return config


@functools.lru_cache(maxsize=1)
def _gguf_config(model: str, modification_time: int, task: str, labels: tuple[str, ...]) -> PretrainedConfig:
    """Return the config of a .gguf file, cached because reading takes seconds and a run needs it three times."""
    from transformers import AutoConfig

    config: PretrainedConfig = load_pretrained(
        AutoConfig.from_pretrained, model, "configuration", **_head(task, labels)
    )
    return config


def has_code(config: PretrainedConfig, task: str) -> bool:
    """Return whether the model's class comes from its own code instead of transformers."""
    return bool(remote_code()) and _auto_class(task).__name__ in (getattr(config, "auto_map", None) or {})


def _is_encoder(config: PretrainedConfig) -> bool:
    """Return whether transformers would load the model as a decoder without a causal mask, such as BERT."""
    import transformers

    is_masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return is_masked and not config.is_encoder_decoder and getattr(config, "is_decoder", None) is False


def load_generation_config(model: str) -> Any:
    """Return the generation config in the files of a base, or None."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return None


def _auto_class(task: str) -> Any:
    import transformers

    return getattr(transformers, registered.find(task).model_class)


def _head(task: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the config fields that determine the head's outputs and loss."""
    return registered.find(task).head(labels)


def _set_padding(base: PreTrainedModel, model: str) -> None:
    """Set the padding token in the config, which classifiers on decoders use to find the last token."""
    if getattr(base.config, "pad_token_id", None) is None:
        base.config.pad_token_id = load_tokenizer(model).pad_token_id
