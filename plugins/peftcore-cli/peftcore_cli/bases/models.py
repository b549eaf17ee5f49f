"""Base models (a hub id, a folder, a .gguf file) and what prepares their inputs: tokenizers and processors."""

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
from peftcore_cli.bases.base_files import pretrained, quiet_transformers, remote_code
from peftcore_cli.bases.device_choice import HALVES, torch_device, torch_dtype, without_instructions
from peftcore_cli.console import note, require, warn
from peftcore_cli.tasks import conversations, registered

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(model: str, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the adapter's tokenizer, else the base's; if it has no padding token, its end-of-text token is used.

    Raises:
        PeftcoreError: the tokenizer cannot be loaded.
    """
    quiet_transformers()
    from transformers import AutoTokenizer

    if adapter is not None and has_tokenizer(adapter):
        return adapter_tokenizer.load(adapter)
    tokenizer = pretrained(AutoTokenizer.from_pretrained, model, "tokenizer")
    if type(tokenizer).__name__ == conversations.MISTRAL:  # found first where mistral-common is installed
        other = pretrained(AutoTokenizer.from_pretrained, model, "tokenizer", mistral_format=False)
        tokenizer = tokenizer if other.eos_token is None else other  # None if made of tekken.json alone
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def image_processor(model: str, task: str) -> Any:
    """Return the processor of a model that classifies images.

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
    """Return the processor of a model of conversations with images, or, if it `hears`, with audio.

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
        raise PeftcoreError(f"--task {task} needs a model of transformers, found the .gguf file '{model}'")


def _with_torchvision(kind: Any, model: str, what: str) -> Any:
    """Return a processor.

    Raises:
        PeftcoreError: it cannot be loaded; the message says so if that is because torchvision is not installed.
    """
    try:
        return pretrained(kind.from_pretrained, model, what)
    except (AttributeError, PeftcoreError) as error:
        # Some releases of transformers raise an AttributeError that does not name the package.
        is_named = isinstance(error, AttributeError) or "torchvision" in str(error).lower()
        if is_named and importlib.util.find_spec("torchvision") is None:
            raise PeftcoreError(
                f"the {what} of '{model}' needs torchvision, which is not installed. Install the release for your "
                "PyTorch, which no extra of peftcore chooses: pip install torchvision"
            ) from error
        if isinstance(error, PeftcoreError):
            raise
        raise PeftcoreError(f"the {what} of '{model}' cannot be loaded: {error}") from error


def speech_processor(model: str, task: str, adapter: Path | None) -> tuple[Any, PretrainedConfig]:
    """Return the processor of a model of Whisper's kind, and the model's config.

    Raises:
        PeftcoreError: it cannot be loaded, or the model is of another kind.
    """
    quiet_transformers()
    from transformers import AutoFeatureExtractor, WhisperProcessor

    config = load_config(model, task)
    extractor = pretrained(AutoFeatureExtractor.from_pretrained, model, "feature extractor")
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
    """Return a base for `task`, in evaluation mode on its device.

    Args:
        model: folder, hub id, or .gguf file.
        task: the task.
        dtype: value of `--dtype`.
        device: value of `--device`.
        labels: a classifier's labels.
        quantize: 4-bit type of the linear layers, or all about how they are quantized; None for dense weights.
    """
    quiet_transformers()
    from peftcore.quantization import release_free_memory

    asked = Quantization(quantize) if isinstance(quantize, str) else quantize
    packing = None if asked is None else asked.arguments()
    options: dict[str, Any] = {"dtype": torch_dtype(dtype, device)}
    is_gguf = model.endswith(".gguf")
    if packing is None and not is_gguf:
        packing = _packing_of(load_config(model, task, labels))
    if packing is not None:
        from peftcore import quantization

        quantization.find_type(packing["quant_type"])
    advice = quantize_advice(None if asked is None or asked.skip is not None else asked.quant_type)
    if is_gguf:
        with advice:
            loaded = _load_gguf(model, task, labels, packing, options)
    elif packing is None:
        if registered.find(task).replaces_head:
            options["ignore_mismatched_sizes"] = True
        loader = _auto_class(task).from_pretrained
        loaded, info = pretrained(loader, model, "model", output_loading_info=True, **options, **_head(task, labels))
        _check_whole(loaded, info["missing_keys"], model, task)
        _check_shapes(loaded, info.get("mismatched_keys", ()), model)
    else:
        options |= {**packing, **_head(task, labels), "model_class": _auto_class(task)}
        with advice:
            loaded = pretrained(quantization.load, model, "model", **options)
    loaded.config._name_or_path = model  # for a .gguf file transformers would record its folder only
    if asked is None and options["dtype"].itemsize == 4:
        _compute_in_fp32(loaded, device)
    if registered.find(task).learns_texts:
        own_code.complete(loaded)
    if registered.find(task).reads_tokens:
        _set_padding(loaded, model)
    release_free_memory()  # what loading leaves in the heap
    return loaded.to(torch_device(device)).eval()


def _load_gguf(
    model: str, task: str, labels: tuple[str, ...], packing: dict[str, Any] | None, options: dict[str, Any]
) -> PreTrainedModel:
    """Return the model of a .gguf file, dense or in 4 bits; `options` are those of `from_pretrained`."""
    from peftcore import quantization

    require("gguf")
    gguf_file.check_blocks(model)
    loader, auto_class, config = gguf_file.load, _auto_class(task), load_config(model, task, labels)
    options = {**options, "config": config, "output_loading_info": True}
    one_by_one = gguf_file.header(model).architecture in gguf_file.ONE_BY_ONE
    if one_by_one:
        options["model_class"] = auto_class._model_mapping[type(config)]
        if packing is not None and packing["quant_type"] in quantization.QUANT_TYPES:
            from peftcore import FourBitConfig

            options["quantization_config"], packing = FourBitConfig(**packing), None
    else:
        loader = auto_class.from_pretrained
    loaded, info = pretrained(loader, model, "model", **options)
    _check_whole(loaded, info["missing_keys"], model, task)
    if not one_by_one and getattr(loaded, "hf_quantizer", None) is not None:
        loaded.hf_quantizer.remove_quantization_config(loaded)  # loading has dequantized it: a plain model
    if packing is not None:
        quantization.quantize(loaded, **packing)
    return loaded


def _packing_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return arguments of `quantization.load` for a quantized checkpoint, which keeps its bits; None for others."""
    from peftcore.quantization import is_packed

    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        _refuse_unknown_quantization(stored)
    stored = stored if isinstance(stored, dict) else {}
    if stored.get("quant_method") == "bitsandbytes" and stored.get("load_in_4bit"):
        # Not by bitsandbytes, whose layers lose gradients on CPUs with AVX512-BF16 once they have been evaluated.
        return {"quant_type": "nf4", "compute_dtype": stored.get("bnb_4bit_compute_dtype")}
    return {"quant_type": "nf4"} if is_packed(config) else None


def _refuse_unknown_quantization(stored: Any) -> None:
    """Raise a PeftcoreError for a `quantization_config` that transformers skips, so that all weights would be random.

    Args:
        stored: the field of the model's config.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    names = {str(name) for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    if isinstance(stored, dict) and (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        names.add("bitsandbytes")
    if not isinstance(method, str) or method not in names:
        raise PeftcoreError(
            f"the model's quantization_config has quant_method={method!r:.100}, which transformers does not know"
            f"{nearest(method, names) if isinstance(method, str) else ''}. Correct it in config.json, or choose a "
            "dense checkpoint"
        )


@contextlib.contextmanager
def quantize_advice(quant_type: str | None) -> Iterator[None]:
    """Add to errors that advise arguments of `peftcore.quantize` how the command line passes them.

    Args:
        quant_type: 4-bit type of the base, or None, with which nothing is added.
    """
    try:
        yield
    except PeftcoreError as error:
        method = next((name for name, each in peftcore.methods().items() if _quantizes(each.config_class)), None)
        if quant_type is None or method is None or not any(f"{name}=" in str(error) for name in ("skip", "blocksize")):
            raise
        raise type(error)(
            f"{error}. `peftcore train` takes skip and blocksize as fields of a method: --method {method} --set "
            f"quant_type={quant_type} --set skip=NAME,NAME; the adapter records them, and other commands follow the "
            "record"
        ) from error


def _quantizes(config_class: Any) -> bool:
    """Return whether a method's config says how to quantize the base."""
    return {"quant_type", "skip", "blocksize"} <= {each.name for each in fields(config_class)}


_UNREAD = ". Its repository has code of its own, which was not run: read it, and pass --trust-remote-code"


def _check_whole(loaded: PreTrainedModel, missing: Collection[str], model: str, task: str) -> None:
    """Warn of weights that the checkpoint lacks and transformers initialised at random; refuse a .gguf file.

    Args:
        loaded: the model.
        missing: names of these weights. A classifier's head is expected to be among them.
        model: its name, for messages.
        task: the task.
    """
    found = registered.find(task)
    backbone = f"{loaded.base_model_prefix}." if found.new_head else ""
    names = sorted(name for name in missing if name.startswith(backbone) and found.uses(name))
    if not names:
        return
    lacks = f"lacks {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    if model.endswith(".gguf"):
        raise PeftcoreError(f"the model of '{model}' cannot be loaded: the file {lacks}. Download it again")
    code = "" if remote_code() or not getattr(loaded.config, "auto_map", None) else _UNREAD
    warn(f"checkpoint '{model}' {lacks}: these weights are initialised at random{code}")


def _check_shapes(loaded: PreTrainedModel, mismatched: Collection[Any], model: str) -> None:
    """Say that a head of other labels was replaced; refuse other weights whose shapes differ from the config's."""
    names = [each if isinstance(each, str) else each[0] for each in mismatched]
    backbone = f"{loaded.base_model_prefix}."
    wrong = next((name for name in names if name.startswith(backbone)), None)
    if wrong is not None:
        raise PeftcoreError(f"the model of '{model}' cannot be loaded: '{wrong}' does not have the shape of its config")
    if names:
        note(f"the head of '{model}' is for other labels and was replaced by a new one for {loaded.config.num_labels}")


def _compute_in_fp32(loaded: PreTrainedModel, device: str) -> None:
    """Make a 4-bit checkpoint compute in fp32 if this processor has no instructions for its 16-bit dtype.

    The checkpoint's dtype of computation is that of the GPU it was made for; layers of bitsandbytes and ours keep it as
    `compute_dtype`.
    """
    import torch

    if torch_device(device).type != "cpu":
        return
    packed = [module for module in loaded.modules() if isinstance(vars(module).get("compute_dtype"), torch.dtype)]
    for name, full_name in HALVES.items():
        found: list[Any] = [module for module in packed if module.compute_dtype == getattr(torch, full_name)]
        reason = without_instructions(name)
        if found and reason is not None:
            note(f"4-bit weights are multiplied in fp32, not in {name} as the checkpoint says: {reason}")
            for module in found:
                module.compute_dtype = torch.float32


def empty_model(model: str, task: str, labels: tuple[str, ...] = ()) -> PreTrainedModel:
    """Return a base without weights, on the meta device."""
    from peftcore.quantization import build_empty

    config = load_config(model, task, labels)
    made: Any = build_empty(config, lambda dense: _made_empty(dense, model, task))
    if registered.find(task).learns_texts:
        own_code.complete(made)
    return made


def _made_empty(config: PretrainedConfig, model: str, task: str) -> Any:
    auto_class = _auto_class(task)
    if not has_code(config, task):
        return auto_class.from_config(config)
    try:
        return auto_class.from_config(config, **remote_code())
    except Exception as error:  # code that may not be made for the meta device
        raise PeftcoreError(f"the code of '{model}' cannot make a model without weights: {error}") from error


def load_config(model: str, task: str, labels: tuple[str, ...] = ()) -> PretrainedConfig:
    """Return a base's config, which names the class that `load_model` makes for this task."""
    quiet_transformers()
    import transformers
    from transformers import AutoConfig

    if model.endswith(".gguf"):
        config = copy.deepcopy(_gguf_config(model, os.stat(model).st_mtime_ns, task, labels))
    else:
        config = pretrained(AutoConfig.from_pretrained, model, "configuration", **_head(task, labels))
    auto_class = _auto_class(task)
    kinds = auto_class._model_mapping
    found = f"'{model}' ({config.model_type})"
    named = registered.find(task)
    if named.needed_model is not None and type(config) not in kinds and not has_code(config, task):
        raise PeftcoreError(f"--task {task} needs {named.needed_model.format(found)}")
    if auto_class is transformers.AutoModelForCausalLM and _is_encoder(config):
        raise PeftcoreError(
            f"--task {task} needs a decoder, found {found}, an encoder, which reads the words that it would have to "
            "write. Use it for classification, tags or pairs, or pass another model"
        )
    named.check_config(model, config)
    if type(config) in kinds:
        config.architectures = [kinds[type(config)].__name__]
    elif has_code(config, task):
        config.architectures = [str(config.auto_map[_auto_class(task).__name__]).rpartition(".")[2]]
    return config


@functools.lru_cache(maxsize=1)
def _gguf_config(model: str, changed: int, task: str, labels: tuple[str, ...]) -> PretrainedConfig:
    """Return the config in a .gguf file as of a time; transformers takes seconds to read it, and a run asks thrice."""
    from transformers import AutoConfig

    found: PretrainedConfig = pretrained(AutoConfig.from_pretrained, model, "configuration", **_head(task, labels))
    return found


def has_code(config: PretrainedConfig, task: str) -> bool:
    """Return whether a class of the model's own code is to be run in place of one of transformers."""
    return bool(remote_code()) and _auto_class(task).__name__ in (getattr(config, "auto_map", None) or {})


def _is_encoder(config: PretrainedConfig) -> bool:
    """Return whether transformers would load a model as a decoder that has no causal mask, such as a BERT."""
    import transformers

    is_masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return is_masked and not config.is_encoder_decoder and getattr(config, "is_decoder", None) is False


def load_generation_config(model: str) -> Any:
    """Return how a base generates, as its files say; None if they do not."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return None


def _auto_class(task: str) -> Any:
    import transformers

    return getattr(transformers, registered.find(task).model_class)


def _head(task: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the config fields of the head, for the model to have its outputs and its loss."""
    return registered.find(task).head(labels)


def _set_padding(loaded: PreTrainedModel, model: str) -> None:
    """Set the padding token, by which classifiers on decoders find the last token."""
    if getattr(loaded.config, "pad_token_id", None) is None:
        loaded.config.pad_token_id = load_tokenizer(model).pad_token_id
