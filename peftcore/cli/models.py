"""Base models and tokenizers (a hub id, a folder, a .gguf file) and adapter folders, as commands name them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcore.cli import adapter_tokenizer, data
from peftcore.cli.console import note, require, warn
from peftcore.cli.gguf_file import check_blocks
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.validation import check_types, shown

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TASK_FILE = "peftcore_task.json"
DTYPES = ("auto", "fp32", "bf16")
_LABELS = 1_000  # above this, the adapter's head is checked before the base gets one
_MODULES = 1_000
NEW_ROWS = "the adapter's vocabulary is larger than its base's, whose rows for the new tokens are initialised at random"


@dataclass(frozen=True)
class AdapterTask:
    """What an adapter was trained for, stored with it as `peftcore_task.json`, which PEFT ignores."""

    task: str
    max_length: int
    labels: tuple[str, ...] = ()
    chat: bool | None = None  # whether it was trained on conversations; None if unknown
    chat_template: str | None = None  # if it is not the tokenizer's own
    beta: float | None = None  # of preferences, if it is not the default
    dtype: str | None = None  # of the base in training
    seed: int | None = None  # seed of a classifier's new head

    def write(self, folder: Path) -> None:
        """Write the file into the adapter's folder, replacing a link."""
        if (folder / TASK_FILE).is_symlink():
            (folder / TASK_FILE).unlink()
        (folder / TASK_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def adapter_task(folder: Path, labels: str | None = None) -> AdapterTask:
    """Return the task of the adapter in `folder`; without our task file (written by PEFT), determined from the adapter.

    Args:
        folder: folder of the adapter.
        labels: a classifier's labels in the order of its outputs, separated by commas. An adapter in another library's
            format is taken to be a classifier's if they are given.

    Raises:
        PeftcoreError: the folder has no adapter, or one for a task that no command runs.
    """
    from peftcore.files.reading import fields_of_folder
    from peftcore.files.safe_reading import JSON_BYTES, parse_json, read_bytes

    given = tuple(part.strip() for part in labels.split(",")) if labels else ()
    fields, foreign = fields_of_folder(folder)
    try:
        stored = parse_json(read_bytes(folder / TASK_FILE, JSON_BYTES), folder / TASK_FILE)
        if not isinstance(stored, dict):
            raise TypeError(f"it must be a JSON object, found {shown(stored)}")
        # Files without `chat` are older than conversations.
        chat, template = stored.get("chat", False), stored.get("chat_template")
        more = {name: stored.get(name) for name in ("beta", "dtype", "seed")}
        task = AdapterTask(stored["task"], stored["max_length"], tuple(stored["labels"]), chat, template, **more)
        if type(stored["labels"]) is not list:
            raise TypeError(f"labels must be a list, found {shown(stored['labels'])}")
        if task.task not in data.TASKS:
            raise ValueError(f"task must be one of {', '.join(data.TASKS)}, found {shown(task.task)}")
        check_types(task)
        if template is not None and "{" not in template and template != "chatml":
            raise ValueError(
                f"chat_template={shown(template)} is neither a template nor 'chatml', and is not opened as a "
                "path (to use a file, pass --chat-template FILE)"
            )
        _refuse_labels_without_outputs(folder, task)
    except FileNotFoundError:
        if foreign is not None:  # not stated; heads are elsewhere and belong to the base
            return AdapterTask(data.CLASSIFICATION if given else data.LANGUAGE_MODEL, 512, given)
        task = _task_of_peft(folder, fields)
    except KeyError as error:
        raise CheckpointError(f"'{folder / TASK_FILE}' cannot be read: it lacks {error}. It can be deleted") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"'{folder / TASK_FILE}' cannot be read: {error}. It can be deleted") from error
    if given and len(given) != len(task.labels):
        raise PeftcoreError(f"--labels names {len(given)} labels, but the adapter has {len(task.labels)}")
    return replace(task, labels=given or task.labels)


def _refuse_labels_without_outputs(folder: Path, task: AdapterTask) -> None:
    """Raise a ValueError for very many labels without a head in the adapter, before the base gets one of that size."""
    from peftcore.files.folder import read_tensors

    count = len(task.labels)
    if task.task in data.HEADED and count > _LABELS:
        tensors, _ = read_tensors(folder)
        if not any(tensor.shape[:1] == (count,) for tensor in tensors.values()):
            raise ValueError(f"it names {count:,} labels, but no tensor of the adapter has as many rows")


def base_of(folder: Path, model: str | None) -> str:
    """Return the base of an adapter: `model` if given, otherwise the one the adapter names."""
    from peftcore.files.reading import fields_of_folder

    named = model or fields_of_folder(folder)[0].get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise PeftcoreError(f"'{folder}' does not name the base it was trained on. Pass it: --model MODEL")
    return named


def resolve(model: str) -> str:
    """Return a path as an absolute one, so that an adapter finds its base from anywhere; a hub id unchanged.

    Raises:
        PeftcoreError: it is a path that does not exist, or a folder without a model.
    """
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path) and not os.path.exists(path / "config.json"):
        _refuse_folder(path, model)
    if os.path.exists(path):
        return str(path.resolve())
    if model.startswith((".", "/", "~")) or path.suffix == ".gguf" or model.count("/") > 1:
        raise PeftcoreError(f"there is no model at '{model}'. A hub id has the form NAME or OWNER/NAME")
    return model


def _refuse_folder(path: Path, model: str) -> None:
    """Raise a PeftcoreError that says what a folder without a model's config has instead."""
    if os.path.exists(adapter_folder(path) / "adapter_config.json"):
        raise PeftcoreError(
            f"--model '{model}' is an adapter, not a base. Pass it as --adapter, or pass the base it was trained on"
        )
    names = sorted(os.listdir(path))
    found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
    raise PeftcoreError(
        f"'{model}' has no model: config.json is missing, found {found}. Pass a folder that save_pretrained wrote, "
        "a hub id, or a .gguf file"
    )


def has_tokenizer(folder: Path) -> bool:
    """Return whether a tokenizer is saved with the adapter, as trainers do; it may have more tokens than the base's."""
    return os.path.exists(folder / "tokenizer_config.json")


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
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_processor(model: str, task: str, adapter: Path | None = None) -> Any:
    """Return what prepares the inputs of a task: an image processor, or the tokenizer (`load_tokenizer`).

    Raises:
        PeftcoreError: it cannot be loaded.
    """
    if task != data.IMAGE:
        return load_tokenizer(model, adapter)
    quiet_transformers()
    from transformers import AutoImageProcessor

    if model.endswith(".gguf"):
        raise PeftcoreError(f"--task image needs a model of transformers, found the .gguf file '{model}'")
    require("PIL", extra="images")
    return pretrained(AutoImageProcessor.from_pretrained, model, "image processor")


def load_model(
    model: str,
    task: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    labels: tuple[str, ...] = (),
    quantize: str | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Return a base for `task`, in evaluation mode on its device.

    Args:
        model: folder, hub id, or .gguf file.
        task: the task.
        dtype: value of `--dtype`.
        device: value of `--device`.
        labels: a classifier's labels.
        quantize: 4-bit type of the linear layers, or arguments of `quantization.load`; None for dense weights.
    """
    quiet_transformers()
    from peftcore.quantization.int4_models import int4_config

    packing = {"quant_type": quantize} if isinstance(quantize, str) else quantize
    loader, options = _auto_class(task).from_pretrained, {"dtype": torch_dtype(dtype, device), **_head(task, labels)}
    is_gguf = model.endswith(".gguf")
    if packing is None and not is_gguf and int4_config(load_config(model, task, labels)) is not None:
        packing = {"quant_type": "affine4"}  # it keeps its bits
    if packing is not None:
        from peftcore import quantization

        quantization.find_type(packing["quant_type"])
        if not is_gguf:  # transformers reads the whole file
            loader, options = quantization.load, {**options, **packing, "model_class": _auto_class(task)}
    if is_gguf:
        require("gguf", extra="gguf")
        check_blocks(model)
    if packing is None or is_gguf:
        if task == data.IMAGE:
            options["ignore_mismatched_sizes"] = True  # image models come with the head of another data set
        loaded, info = pretrained(loader, model, "model", output_loading_info=True, **options)
        _check_whole(loaded, info["missing_keys"], model, task)
        _check_shapes(loaded, info.get("mismatched_keys", ()), model)
    else:
        loaded = pretrained(loader, model, "model", **options)
    loaded.config._name_or_path = model  # for a .gguf file transformers would record its folder only
    if is_gguf and getattr(loaded, "hf_quantizer", None) is not None:
        loaded.hf_quantizer.remove_quantization_config(loaded)  # loading has dequantized it: a plain model
    if is_gguf and packing is not None:
        quantization.quantize(loaded, **packing)
    if packing is None and options["dtype"].itemsize == 4:
        _compute_in_fp32(loaded, device)
    if task != data.IMAGE:
        _set_padding(loaded, model)
    return loaded.to(torch_device(device)).eval()


def _check_whole(loaded: PreTrainedModel, missing: Collection[str], model: str, task: str) -> None:
    """Warn of weights that the checkpoint lacks and transformers initialised at random; refuse a .gguf file.

    Args:
        loaded: the model.
        missing: names of these weights. A classifier's head is expected to be among them.
        model: its name, for messages.
        task: the task.
    """
    backbone = f"{loaded.base_model_prefix}." if task in data.NEW_HEAD else ""
    names = sorted(name for name in missing if name.startswith(backbone))
    if not names:
        return
    lacks = f"lacks {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    if model.endswith(".gguf"):
        raise PeftcoreError(f"the model of '{model}' cannot be loaded: the file {lacks}. Download it again")
    warn(f"checkpoint '{model}' {lacks}: these weights are initialised at random")


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
    """Make a 4-bit checkpoint compute in fp32 if this processor is slow in its 16-bit dtype.

    The checkpoint's dtype of computation is that of the GPU it was made for; layers of bitsandbytes and ours keep it as
    `compute_dtype`.
    """
    import torch

    from peftcore.estimating import dtype_rates

    if torch_device(device).type != "cpu":
        return
    packed = [module for module in loaded.modules() if isinstance(vars(module).get("compute_dtype"), torch.dtype)]
    for name in ("bf16", "fp16"):
        found: list[Any] = [module for module in packed if module.compute_dtype == dtype_rates.DTYPES[name]]
        if found and not (rates := dtype_rates.here()).is_fast(name):
            note(
                f"4-bit weights are multiplied in fp32, not in {name} as the checkpoint says: "
                f"PyTorch multiplies {name} {rates.sentence(name)}"
            )
            for module in found:
                module.compute_dtype = torch.float32


def empty_model(model: str, task: str, labels: tuple[str, ...] = ()) -> PreTrainedModel:
    """Return a base without weights, on the meta device."""
    import torch

    from peftcore.quantization.int4_models import int4_config, pack_empty, without_quantization

    config = load_config(model, task, labels)
    stored = int4_config(config)
    with torch.device("meta"):
        made = _auto_class(task).from_config(config if stored is None else without_quantization(config))
    if stored is not None:
        pack_empty(made, stored)
    return made


def load_config(model: str, task: str, labels: tuple[str, ...] = ()) -> PretrainedConfig:
    """Return a base's config, which names the class that `load_model` makes for this task."""
    quiet_transformers()
    from transformers import AutoConfig

    config = pretrained(AutoConfig.from_pretrained, model, "configuration", **_head(task, labels))
    kinds = _auto_class(task)._model_mapping
    if type(config) in kinds:
        config.architectures = [kinds[type(config)].__name__]
    return config


def packing_by(
    method: str, fields: Mapping[str, Any], model: str, task: str, labels: tuple[str, ...]
) -> dict[str, Any] | None:
    """Return how a method quantizes the base before it places adapters, as `load_model` takes it, or None.

    The method prepares a base without weights to find out. A base loaded that way is never dense as a whole.
    """
    from peftcore.quantization import quantized_experts, quantized_layers
    from peftcore.quantization.quantizable import selected, selected_experts
    from peftcore.registry import registry

    found = registry.method(method)
    if found.prepare is None:
        return None
    config, empty = found.config_class(**fields), empty_model(model, task, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `apply` raises them
        could = {*selected(empty, ())}
        could |= {f"{path}.{name}" for path, names in selected_experts(empty, (), 64).items() for name in names}
        found.prepare(empty, config)
    layers = dict(quantized_layers(empty))
    packed = {*layers}
    for path, module in quantized_experts(empty):
        packed |= {f"{path}.{name}" for name in module.packings if module.packed_parameter(name) is not None}
    ways = {
        (each.quant_type, each.nested_absmax is not None, each.blocksize, each.compute_dtype)
        for each in layers.values()
    }
    if len(ways) != 1:
        return None
    quant_type, double_quant, blocksize, compute_dtype = ways.pop()
    return {
        "quant_type": quant_type,
        "double_quant": double_quant,
        "blocksize": blocksize,
        "compute_dtype": compute_dtype,
        "skip": sorted(could - packed),
    }


def fit_vocabulary(model: PreTrainedModel, folder: Path) -> bool:
    """Resize the base's vocabulary to that of the adapter in `folder`. Return whether it changed.

    Raises:
        PeftcoreError: the adapter's tokenizer has tokens without rows.
    """
    from peftcore.files.reading import vocabulary_rows

    before = vocabulary(model)
    if before is None:
        return False
    rows = vocabulary_rows(model, folder) or before
    if rows != before:
        model.resize_token_embeddings(rows)  # the new rows come from the adapter
    if has_tokenizer(folder) and (tokens := _tokens(adapter_tokenizer.load(folder))) > rows:
        base = str(getattr(model.config, "_name_or_path", ""))
        if tokens > _tokens(load_tokenizer(base)):
            raise PeftcoreError(
                f"the tokenizer in '{folder}' has {tokens:,} tokens, but the model has {rows:,} rows and the "
                "adapter brings no others. Ask its author to save it with its embedding (in PEFT: "
                "save_embedding_layers=True)"
            )
    return rows != before


def vocabulary(model: PreTrainedModel) -> int | None:
    """Return the number of rows of the token embedding; None for models without one, which read characters."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return None
    return None if weight is None else len(weight)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def load_adapter(model: PreTrainedModel, folder: Path, name: str | None = None) -> PreTrainedModel:
    """Load the adapter in `folder`, frozen."""
    import peftcore

    fit_vocabulary(model, folder)
    return peftcore.load(model, folder, adapter=name, trainable=False).eval()


def merge_adapter(
    model: PreTrainedModel, *, untie: bool, quantize: str | None, dtype: str, device: str
) -> PreTrainedModel:
    """Merge the adapter for good; 4-bit weights become dense. Warnings are worded for the commands."""
    import peftcore

    is_int4 = (
        getattr(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None), "stored", None) is not None
    )
    dense = torch_dtype(dtype, device) if quantize or is_int4 else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peftcore.merge(model, keep_adapters=False, untie=untie, dtype=dense)
    if dense is not None:
        peftcore.quantization.dequantize(model, dense)  # layers without adapters
    for warning in caught:
        warn(str(warning.message))
    return model


def adapter_folder(folder: Path) -> Path:
    """Return the adapter's folder; `folder` may be that of the run that made it."""
    inside = folder / "adapter"
    here, there = (os.path.exists(each / "adapter_config.json") for each in (folder, inside))
    return inside if there and not here else folder


def torch_device(device: str) -> torch.device:
    """Return the device; `auto` is CUDA if there is one."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise PeftcoreError(f"device '{device}' is not known. Use auto, cpu, cuda, or cuda:1") from error
    if named.type == "cuda" and not torch.cuda.is_available():
        raise PeftcoreError(f"device '{device}' is not available: PyTorch {torch.__version__} finds no CUDA device")
    return named


def torch_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the dtype; `auto` is bf16 on a CUDA device that supports it, else fp32. For CPUs see `dtype_choice`."""
    import torch

    if dtype not in DTYPES:
        raise PeftcoreError(f"--dtype must be one of {', '.join(DTYPES)}, found '{dtype}'")
    on_cuda = torch_device(device).type == "cuda"
    if dtype == "bf16" or (dtype == "auto" and on_cuda and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def quiet_transformers() -> None:
    """Import transformers without its progress bars and notices; the commands print their own.

    Raises:
        PeftcoreError: it is not installed.
    """
    require("transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def pretrained(loader: Any, model: str, what: str, **options: Any) -> Any:
    where = model
    hidden: Any = contextlib.nullcontext()
    if model.endswith(".gguf"):
        require("gguf", extra="gguf")
        where, options["gguf_file"] = str(Path(model).parent), Path(model).name
        hidden = contextlib.redirect_stderr(io.StringIO())  # a progress bar that no setting of transformers disables
    from huggingface_hub.errors import StrictDataclassError

    try:
        with hidden:
            return loader(where, **options)
    except Exception as error:
        # GGUF readers may raise anything on invalid bytes
        expected = (OSError, ValueError, KeyError, ImportError, StrictDataclassError)
        mismatched = isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error)
        if not (isinstance(error, expected) or mismatched or "gguf_file" in options):
            raise
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else None  # the error of the field
        lines = [line.strip() for line in str(cause or error).strip().splitlines()] or [type(error).__name__]
        reason = " ".join(lines)[:400] if lines[0].endswith(":") else lines[0]  # a list follows a colon
        reason = "its tensors and its config have different shapes" if mismatched else reason
        raise PeftcoreError(f"the {what} of '{model}' cannot be loaded: {reason}") from error


def _auto_class(task: str) -> Any:
    import transformers

    if task == data.TAGS:
        return transformers.AutoModelForTokenClassification
    if task == data.SEQ2SEQ:
        return transformers.AutoModelForSeq2SeqLM
    if task == data.IMAGE:
        return transformers.AutoModelForImageClassification
    if task in data.NEW_HEAD:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM


def _head(task: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the config fields of the head, for the model to have its outputs and its loss."""
    if task not in data.NEW_HEAD:
        return {}
    if task in (data.REGRESSION, data.REWARD):
        return {"num_labels": 1, "problem_type": "regression"}
    kinds = dict.fromkeys((data.CLASSIFICATION, data.IMAGE), "single_label_classification")
    kinds[data.MULTI_LABEL] = "multi_label_classification"
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    kind = {"problem_type": kinds[task]} if task in kinds else {}
    return {**kind, **(names if labels else {})}


def _set_padding(loaded: PreTrainedModel, model: str) -> None:
    """Set the padding token, by which classifiers on decoders find the last token."""
    if getattr(loaded.config, "pad_token_id", None) is None:
        loaded.config.pad_token_id = load_tokenizer(model).pad_token_id


def _task_of_peft(folder: Path, fields: dict[str, Any]) -> AdapterTask:
    from peftcore.files.folder import read_tensors

    if fields.get("task_type") in (None, "CAUSAL_LM"):
        return AdapterTask(data.LANGUAGE_MODEL, 512)
    if fields["task_type"] == "SEQ_2_SEQ_LM":
        return AdapterTask(data.SEQ2SEQ, 512)
    if fields["task_type"] != "SEQ_CLS":
        raise PeftcoreError(
            f"'{folder}' is for the task {fields['task_type']}, which no command supports. Use the library"
        )
    tensors, _ = read_tensors(folder)
    saved = fields.get("modules_to_save") or ["classifier", "score"]
    if not isinstance(saved, list) or len(saved) > _MODULES or not all(isinstance(each, str) for each in saved):
        raise CheckpointError(f"'{folder}': modules_to_save must be a list of names, found {shown(saved)}")
    held = [tensor for name, tensor in tensors.items() if any(f".{module}." in name for module in saved)]
    heads = [tensor for tensor in held if tensor.dim()]
    if not heads:
        raise CheckpointError(f"'{folder}' has no classification head among its tensors")
    outputs = heads[-1].shape[0]
    if outputs == 1:
        return AdapterTask(data.REGRESSION, 512)
    return AdapterTask(data.CLASSIFICATION, 512, tuple(str(i) for i in range(outputs)))
