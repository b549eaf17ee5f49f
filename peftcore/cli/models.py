"""Base models and tokenizers (a hub id, a folder, a .gguf file) and adapter folders, as the commands name them."""

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
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.validation import check_types, shown

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TASK_FILE = "peftcore_task.json"
DTYPES = ("auto", "fp32", "bf16")
_LABELS = 1_000  # beyond them the adapter's head is looked at before the base is given one
_MODULES = 1_000
NEW_ROWS = "the adapter's vocabulary is larger than its base's, whose rows for the new tokens are drawn at random here"


@dataclass(frozen=True)
class AdapterTask:
    """What an adapter was trained for; lies beside it as `peftcore_task.json`, which PEFT passes over."""

    task: str
    max_length: int
    labels: tuple[str, ...] = ()
    chat: bool | None = None  # was it trained on conversations? None: not known
    chat_template: str | None = None  # where it is not the tokenizer's own
    beta: float | None = None  # of preferences, where it is not the default
    dtype: str | None = None  # of the base in training
    seed: int | None = None  # by which a classifier's new head was drawn

    def write(self, folder: Path) -> None:
        """Write it into the adapter's folder, in place of a link that leads out of it."""
        if (folder / TASK_FILE).is_symlink():
            (folder / TASK_FILE).unlink()
        (folder / TASK_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def adapter_task(folder: Path, labels: str | None = None) -> AdapterTask:
    """What the adapter in `folder` is for; where no file of ours says so (PEFT wrote it), read off the adapter.

    Args:
        labels: a classifier's labels in the order of its outputs, separated by commas. An adapter of a foreign format
            is a classifier's where they are given.

    Raises:
        PeftcoreError: the folder holds no adapter, or one for a task that no command runs.
    """
    from peftcore import checkpoint
    from peftcore.adapter_files.content import JSON_BYTES, parse_json, read_bytes

    given = tuple(part.strip() for part in labels.split(",")) if labels else ()
    fields, foreign = checkpoint.about(folder)
    try:
        stored = parse_json(read_bytes(folder / TASK_FILE, JSON_BYTES), folder / TASK_FILE)
        if not isinstance(stored, dict):
            raise TypeError(f"it is not a table, found {shown(stored)}")
        # A file without `chat` is of before there were conversations.
        chat, template = stored.get("chat", False), stored.get("chat_template")
        more = {name: stored.get(name) for name in ("beta", "dtype", "seed")}
        task = AdapterTask(stored["task"], stored["max_length"], tuple(stored["labels"]), chat, template, **more)
        if type(stored["labels"]) is not list:
            raise TypeError(f"labels={shown(stored['labels'])} is no list")
        if task.task not in data.TASKS:
            raise ValueError(f"task={shown(task.task)} is none of {', '.join(data.TASKS)}")
        check_types(task)
        if template is not None and "{" not in template and template != "chatml":
            raise ValueError(
                f"chat_template={shown(template)} is neither a template's text nor 'chatml', and is not opened as a "
                "path (a file of yours is given by --chat-template FILE)"
            )
        _refuse_labels_without_outputs(folder, task)
    except FileNotFoundError:
        if foreign is not None:  # it does not say; heads lie elsewhere, and are the base's own
            return AdapterTask(data.CLASSIFICATION if given else data.LANGUAGE_MODEL, 512, given)
        task = _task_of_peft(folder, fields)
    except KeyError as error:
        raise CheckpointError(f"'{folder / TASK_FILE}' cannot be read: it lacks {error}. It may be deleted") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"'{folder / TASK_FILE}' cannot be read: {error}. It may be deleted") from error
    if given and len(given) != len(task.labels):
        raise PeftcoreError(f"--labels names {len(given)} labels, the adapter has {len(task.labels)}")
    return replace(task, labels=given or task.labels)


def _refuse_labels_without_outputs(folder: Path, task: AdapterTask) -> None:
    """Raise a ValueError for very many labels of which the adapter has no head, since the base is given one first."""
    from peftcore import adapter_files

    count = len(task.labels)
    if task.task in data.LABELLED and count > _LABELS:
        tensors, _ = adapter_files.read_tensors(folder)
        if not any(tensor.shape[:1] == (count,) for tensor in tensors.values()):
            raise ValueError(f"it names {count:,} labels, and no tensor of the adapter has as many rows")


def base_of(folder: Path, model: str | None) -> str:
    """The base of an adapter: `model` if given, else what the adapter names."""
    from peftcore import checkpoint

    named = model or checkpoint.about(folder)[0].get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise PeftcoreError(f"'{folder}' does not say what base it was trained on. Name it: --model MODEL")
    return named


def resolve(model: str) -> str:
    """A path as an absolute one, so that an adapter finds its base from anywhere; a hub id as it is.

    Raises:
        PeftcoreError: it is a path, and nothing lies there.
    """
    path = Path(os.path.expanduser(model))
    if os.path.exists(path):
        return str(path.resolve())
    if model.startswith((".", "/", "~")) or path.suffix == ".gguf" or model.count("/") > 1:
        raise PeftcoreError(f"there is no model at '{model}'. A hub id has the form NAME or OWNER/NAME")
    return model


def has_tokenizer(folder: Path) -> bool:
    """Does one lie beside the adapter? Trainers put theirs there, which may have tokens that the base's has not."""
    return os.path.exists(folder / "tokenizer_config.json")


def load_tokenizer(model: str, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer next to the adapter, else the base's; its end-of-text pads, where it has no other token.

    Raises:
        PeftcoreError: the tokenizer cannot be loaded.
    """
    quiet_transformers()
    from transformers import AutoTokenizer

    if adapter is not None and has_tokenizer(adapter):
        return adapter_tokenizer.load(adapter)
    tokenizer = _load(AutoTokenizer.from_pretrained, model, "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(
    model: str,
    task: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    labels: tuple[str, ...] = (),
    quantize: str | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A base for `task`, in evaluation mode on its device.

    Args:
        quantize: its linear layers are in 4 bits of this type, or as these arguments of `quantization.load` say.
    """
    quiet_transformers()
    packing = {"quant_type": quantize} if isinstance(quantize, str) else quantize
    loader, options = _auto_class(task).from_pretrained, {"dtype": torch_dtype(dtype, device), **_head(task, labels)}
    is_gguf = model.endswith(".gguf")
    if packing is not None:
        from peftcore import quantization

        quantization.check_quant_type(packing["quant_type"])
        if not is_gguf:  # transformers reads such a file whole
            loader, options = quantization.load, {**options, **packing, "model_class": _auto_class(task)}
    if packing is None or is_gguf:
        loaded, info = _load(loader, model, "model", output_loading_info=True, **options)
        _check_whole(loaded, info["missing_keys"], model, task)
    else:
        loaded = _load(loader, model, "model", **options)
    loaded.config._name_or_path = model  # for a .gguf file transformers would note its folder alone
    if is_gguf and getattr(loaded, "hf_quantizer", None) is not None:
        loaded.hf_quantizer.remove_quantization_config(loaded)  # loading has dequantized it: a plain model
    if is_gguf and packing is not None:
        quantization.quantize(loaded, **packing)
    if packing is None and options["dtype"].itemsize == 4:
        _compute_in_fp32(loaded, device)
    _set_padding(loaded, model)
    return loaded.to(torch_device(device)).eval()


def _check_whole(loaded: PreTrainedModel, missing: Collection[str], model: str, task: str) -> None:
    """Warn of weights that transformers drew at random, as the checkpoint lacks them; refuse a .gguf file.

    Args:
        missing: names of these weights. Those of a classifier's head are expected.
    """
    backbone = f"{loaded.base_model_prefix}." if task in data.LABELLED else ""
    names = sorted(name for name in missing if name.startswith(backbone))
    if not names:
        return
    lacks = f"lacks {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    if model.endswith(".gguf"):
        raise PeftcoreError(f"the model of '{model}' cannot be loaded: the file {lacks}. Download it again")
    warn(f"the checkpoint '{model}' {lacks}: these weights are drawn at random")


def _compute_in_fp32(loaded: PreTrainedModel, device: str) -> None:
    """Let what a checkpoint has in 4 bits compute in fp32 where this processor multiplies the named 16 bits slowly.

    Such a checkpoint names a dtype of computation, which is that of the card for which it was made; bitsandbytes'
    layers and ours keep it as `compute_dtype`.
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
    """A base without its weights, on the meta device: shapes only."""
    import torch

    config = load_config(model, task, labels)
    with torch.device("meta"):
        return _auto_class(task).from_config(config)


def load_config(model: str, task: str, labels: tuple[str, ...] = ()) -> PretrainedConfig:
    """A base's configuration, which names the class that `load_model` makes of it for this task."""
    quiet_transformers()
    from transformers import AutoConfig

    config = _load(AutoConfig.from_pretrained, model, "configuration", **_head(task, labels))
    kinds = _auto_class(task)._model_mapping
    if type(config) in kinds:
        config.architectures = [kinds[type(config)].__name__]
    return config


def packing_by(
    method: str, fields: Mapping[str, Any], model: str, task: str, labels: tuple[str, ...]
) -> dict[str, Any] | None:
    """How a method packs the base before it places anything, as `load_model` takes it; None: it does not.

    Known by letting it prepare a base without weights. A base that is loaded so is never dense as a whole.
    """
    from peftcore.quantization import quantized_experts, quantized_layers
    from peftcore.quantization.quantizable import selected, selected_experts
    from peftcore.registry import registry

    found = registry.method(method)
    if found.prepare is None:
        return None
    config, empty = found.config_class(**fields), empty_model(model, task, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `apply` gives them
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
    """Give the base as many rows of vocabulary as the adapter in `folder` was trained with. Has it others now?

    Raises:
        PeftcoreError: the tokenizer beside the adapter has tokens for which there are no rows.
    """
    from peftcore import checkpoint

    before = vocabulary(model)
    if before is None:
        return False
    rows = checkpoint.vocabulary_rows(model, folder) or before
    if rows != before:
        model.resize_token_embeddings(rows)  # the new rows are the adapter's
    if has_tokenizer(folder) and (tokens := _tokens(adapter_tokenizer.load(folder))) > rows:
        base = str(getattr(model.config, "_name_or_path", ""))
        if tokens > _tokens(load_tokenizer(base)):
            raise PeftcoreError(
                f"the tokenizer beside '{folder}' has {tokens:,} tokens, the model rows for {rows:,}, and the adapter "
                "brings no others. Have its author save it with its embedding (in PEFT: save_embedding_layers=True)"
            )
    return rows != before


def vocabulary(model: PreTrainedModel) -> int | None:
    """The rows of the embedding of tokens; None: the model has none, as those that read characters."""
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
    """Work the adapter into the weights for good; what is in 4 bits becomes dense. Warnings are the commands' own."""
    import peftcore

    dense = torch_dtype(dtype, device) if quantize else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peftcore.merge(model, keep_adapters=False, untie=untie, dtype=dense)
    if quantize:
        peftcore.quantization.dequantize(model, dense)  # layers that the adapter leaves alone
    for warning in caught:
        warn(str(warning.message))
    return model


def adapter_folder(folder: Path) -> Path:
    """The adapter's folder, where `folder` may be that of the run that made it."""
    inside = folder / "adapter"
    here, there = (os.path.exists(each / "adapter_config.json") for each in (folder, inside))
    return inside if there and not here else folder


def torch_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise PeftcoreError(f"'{device}' is no device. Try: auto, cpu, cuda, cuda:1") from error
    if named.type == "cuda" and not torch.cuda.is_available():
        raise PeftcoreError(f"device '{device}': this PyTorch ({torch.__version__}) sees no CUDA device")
    return named


def torch_dtype(dtype: str, device: str) -> torch.dtype:
    """`auto` is bf16 on a CUDA device that has it, else fp32. Which dtype is fast on a CPU: `dtype_choice`."""
    import torch

    if dtype not in DTYPES:
        raise PeftcoreError(f"--dtype is one of {', '.join(DTYPES)}, found '{dtype}'")
    on_cuda = torch_device(device).type == "cuda"
    if dtype == "bf16" or (dtype == "auto" and on_cuda and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def quiet_transformers() -> None:
    """Import transformers; its progress bars and notices give way to the commands' own.

    Raises:
        PeftcoreError: it is not installed.
    """
    require("transformers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _load(loader: Any, model: str, what: str, **options: Any) -> Any:
    where = model
    hidden: Any = contextlib.nullcontext()
    if model.endswith(".gguf"):
        require("gguf", extra="gguf")
        where, options["gguf_file"] = str(Path(model).parent), Path(model).name
        hidden = contextlib.redirect_stderr(io.StringIO())  # a bar that no setting of transformers turns off
    from huggingface_hub.errors import StrictDataclassError

    try:
        with hidden:
            return loader(where, **options)
    except Exception as error:
        # Readers of GGUF raise whatever a strange byte leads to.
        expected = (OSError, ValueError, KeyError, ImportError, StrictDataclassError)
        mismatched = isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error)
        if not (isinstance(error, expected) or mismatched or "gguf_file" in options):
            raise
        told = error.__cause__ if isinstance(error, StrictDataclassError) else None  # what is wrong with the field
        reason = str(told or error).strip().partition("\n")[0] or type(error).__name__
        reason = "its tensors have other shapes than its config says" if mismatched else reason
        raise PeftcoreError(f"the {what} of '{model}' cannot be loaded: {reason}") from error


def _auto_class(task: str) -> Any:
    import transformers

    if task in data.LABELLED:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM


def _head(task: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """What the config has to say of the head, for the model to have its outputs and its loss."""
    if task not in data.LABELLED:
        return {}
    if task == data.REGRESSION:
        return {"num_labels": 1, "problem_type": "regression"}
    kinds = {data.CLASSIFICATION: "single_label_classification", data.MULTI_LABEL: "multi_label_classification"}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return {"problem_type": kinds[task], **(names if labels else {})}


def _set_padding(loaded: PreTrainedModel, model: str) -> None:
    """Classifiers on decoders find the last token by it."""
    if getattr(loaded.config, "pad_token_id", None) is None:
        loaded.config.pad_token_id = load_tokenizer(model).pad_token_id


def _task_of_peft(folder: Path, fields: dict[str, Any]) -> AdapterTask:
    from peftcore import adapter_files

    if fields.get("task_type") in (None, "CAUSAL_LM"):
        return AdapterTask(data.LANGUAGE_MODEL, 512)
    if fields["task_type"] != "SEQ_CLS":
        raise PeftcoreError(f"'{folder}' is for the task {fields['task_type']}, which no command runs. Use the library")
    tensors, _ = adapter_files.read_tensors(folder)
    saved = fields.get("modules_to_save") or ["classifier", "score"]
    if not isinstance(saved, list) or len(saved) > _MODULES or not all(isinstance(each, str) for each in saved):
        raise CheckpointError(f"'{folder}': modules_to_save must be a list of names, found {shown(saved)}")
    held = [tensor for name, tensor in tensors.items() if any(f".{module}." in name for module in saved)]
    heads = [tensor for tensor in held if tensor.dim()]
    if not heads:
        raise CheckpointError(f"'{folder}' holds no classification head among its tensors")
    outputs = heads[-1].shape[0]
    if outputs == 1:
        return AdapterTask(data.REGRESSION, 512)
    return AdapterTask(data.CLASSIFICATION, 512, tuple(str(i) for i in range(outputs)))
