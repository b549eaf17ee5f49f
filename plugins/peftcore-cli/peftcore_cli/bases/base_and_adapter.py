"""Load an adapter on its base, fit the base's vocabulary to the adapter, and merge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import adapter_tokenizer, base_quantization, dtype_choice, models
from peftcore_cli.bases.adapter_folders import AdapterTask, Quantization, has_tokenizer
from peftcore_cli.bases.device_choice import torch_dtype
from peftcore_cli.bases.models import load_tokenizer
from peftcore_cli.console import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_ROWS = "the adapter's vocabulary is larger than its base's, so the base has random embeddings for the new tokens"


def load_base(
    base: str, task: AdapterTask, adapter: Path | None, *, quantize: str | None, dtype: str, device: str
) -> PreTrainedModel:
    """Load the base of an adapter for `task`, in the dtype and format of the options, by default as in training."""
    dtype = dtype_choice.choose_for_inference(base, task.task, dtype, device, task.labels, task.dtype).report()
    quantization = base_quantization.of_adapter(quantize, adapter, task)
    return models.load_model(base, task.task, dtype=dtype, device=device, labels=task.labels, quantize=quantization)


def fit_vocabulary(model: PreTrainedModel, folder: Path) -> bool:
    """Resize the base's vocabulary to the vocabulary of the adapter in `folder`. Return whether the size changed.

    Raises:
        PeftcoreError: the adapter's tokenizer has tokens without embeddings.
    """
    from peftcore.files import vocabulary_rows

    base_rows = vocabulary(model)
    if base_rows is None:
        return False
    rows = vocabulary_rows(model, folder) or base_rows
    if rows != base_rows:
        model.resize_token_embeddings(rows)  # the new rows come from the adapter
    if has_tokenizer(folder) and (tokens := _tokens(adapter_tokenizer.load(folder))) > rows:
        base = str(getattr(model.config, "_name_or_path", ""))
        if tokens > _tokens(load_tokenizer(base)):
            raise PeftcoreError(
                f"the tokenizer in '{folder}' has {tokens:,} tokens, but the base has embeddings for {rows:,} and "
                "the adapter stores none. Save the adapter with its embedding (in PEFT: save_embedding_layers=True)"
            )
    return rows != base_rows


def vocabulary(model: PreTrainedModel) -> int | None:
    """Return the number of rows of the token embedding, or None for models without one (such as character models)."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return None
    return None if weight is None else len(weight)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def load_adapter(model: PreTrainedModel, folder: Path, name: str | None = None) -> PreTrainedModel:
    """Load the adapter in `folder`, frozen and in evaluation mode."""
    import peftcore

    fit_vocabulary(model, folder)
    return peftcore.load(model, folder, adapter=name, trainable=False).eval()


def merge_adapter(
    model: PreTrainedModel, *, untie: bool, quantize: str | Quantization | None, dtype: str, device: str
) -> PreTrainedModel:
    """Merge the adapter permanently, and dequantize 4-bit weights. Warnings are printed like warnings of commands."""
    import peftcore

    dense = torch_dtype(dtype, device) if quantize or _is_packed(model) or _is_read_only(model) else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            peftcore.merge(model, untie=untie, dtype=dense)
        except PeftcoreError as error:
            if not quantize:
                raise
            raise type(error)(f"{error}. Pass --quantize none to merge into the dense base") from error
    if dense is not None:
        peftcore.quantization.dequantize(model, dense)  # layers without adapters
    for warning in caught:
        warn(str(warning.message))
    return model


def _is_packed(model: PreTrainedModel) -> bool:
    """Return whether the checkpoint has 4-bit weights."""
    from peftcore.quantization import quantized_experts, quantized_layers

    return any(True for _ in quantized_layers(model)) or any(True for _ in quantized_experts(model))


def _is_read_only(model: PreTrainedModel) -> bool:
    """Return whether a layer has a plugin's weight format that cannot store changed values."""
    from peftcore.plugin import base_modules, find_weight_format

    formats = (find_weight_format(module) for _, module in base_modules(model))
    return any(
        weight_format is not None and weight_format.decode and weight_format.plain and not weight_format.quantize
        for weight_format in formats
    )
