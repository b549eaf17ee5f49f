"""4 bits for transformers: `from_pretrained(..., quantization_config=NF4Config())`, and `load`.

transformers reads a checkpoint tensor by tensor and hands each weight to the quantizer below, so what is in memory at
once is the quantized model and one dense weight. Importing this module registers the quantizer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.quantization.convert import convert, convert_dense
from peftcore.quantization.format import DTYPES, STATE_KEY, check_blocksize, check_quant_type, from_tensors
from peftcore.quantization.linear import QuantizedLinear
from peftcore.quantization.noted import note_in_config
from peftcore.quantization.parameters import check_shape, refuse_non_finite
from peftcore.quantization.selection import selected
from peftcore.targets import sizes

METHOD = "peftcore_4bit"
_failures: list[PeftcoreError] = []  # what transformers, while it loads, turns into a line of its log


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """How `from_pretrained` quantizes a dense checkpoint; the arguments are those of `peftcore.quantize`.

    For a checkpoint that bitsandbytes quantized, transformers takes bitsandbytes' config only and raises ValueError:
    read it with `peftcore.quantization.load`.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        double_quant: bool = True,
        skip: Sequence[str] | None = None,
        compute_dtype: torch.dtype | str | None = None,
        blocksize: int = 64,
        **_: Any,
    ) -> None:
        check_quant_type(quant_type)
        check_blocksize(blocksize)
        compute_dtype = str(compute_dtype).removeprefix("torch.") if compute_dtype is not None else None
        if compute_dtype is not None and compute_dtype not in DTYPES:
            raise PeftcoreError(f"compute_dtype must be one of {', '.join(DTYPES)} or None, found {compute_dtype!r}")
        self.quant_method = METHOD
        self.quant_type = quant_type
        self.double_quant = double_quant
        self.skip = list(skip) if skip is not None else None
        self.compute_dtype = compute_dtype
        self.blocksize = blocksize


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """Quantizes dense checkpoints on the way in, and reads those that bitsandbytes' format keeps in 4 bits."""

    quantization_config: NF4Config
    # transformers' Trainer takes a quantized model without PEFT's wrapper for one that has nothing to train.
    is_qat_trainable = True
    is_trainable = True
    quantized_element_size = 0.5
    serialized_names: ClassVar = {
        "weight": [
            "weight",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_map",
            "weight.absmax",
            f"weight.{STATE_KEY}nf4",
            f"weight.{STATE_KEY}fp4",
        ]
    }

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.weights: set[str] = set()

    @property
    def compute_dtype(self) -> torch.dtype | None:
        name = self.quantization_config.compute_dtype
        return DTYPES[name] if name else None

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.weights

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
            chosen = selected(model, self.quantization_config.skip)
            self.weights = {f"{path}.weight" for path in chosen} - tied

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        note_in_config(model)
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _Deserialize}


class _Quantize(ConversionOps):
    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, nn.Parameter]:
        config, done = self.hf_quantizer.quantization_config, {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            with _noted():
                refuse_non_finite(value, name)
            module = model.get_submodule(name.rpartition(".")[0])
            module.weight = nn.Parameter(value, requires_grad=False)
            convert_dense(
                module, config.quant_type, config.double_quant, config.blocksize, self.hf_quantizer.compute_dtype
            )
            done[name] = module.weight
        return done


class _Deserialize(ConversionOps):
    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        if len(tensors) == 1:
            return input_dict  # a dense weight
        parts = {name.removeprefix("weight."): value for name, value in tensors.items() if name != "weight"}
        with _noted():
            if "weight" not in tensors:
                raise CheckpointError(f"the checkpoint lacks '{full_layer_name}', whose 4-bit state it has")
            packed = from_tensors(tensors["weight"], parts, full_layer_name)
            module: Any = model.get_submodule(full_layer_name.rpartition(".")[0])
            check_shape(packed, sizes(module)[::-1], full_layer_name)
        if not isinstance(module, QuantizedLinear):
            module._parameters["weight"] = None
            convert(module, packed._replace(codes=packed.codes.clone()), self.hf_quantizer.compute_dtype)
            self.hf_quantizer.weights.add(full_layer_name)
        return {"weight": module.weight}

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsItIs()


class _AsItIs(ConversionOps):
    """Saving: the state dict has the keys of the format already."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    try:
        yield
    except PeftcoreError as error:
        _failures.append(error)
        raise


def load(
    path: str | os.PathLike[str],
    quant_type: str = "nf4",
    *,
    double_quant: bool = True,
    skip: Sequence[str] | None = None,
    compute_dtype: torch.dtype | str | None = None,
    blocksize: int = 64,
    dtype: torch.dtype | str = "auto",
    model_class: Any = None,
    **options: Any,
) -> nn.Module:
    """See `peftcore.quantization.load`."""
    import transformers

    where = os.fspath(path)
    ours = NF4Config(quant_type, double_quant, skip, compute_dtype, blocksize)
    config, _ = transformers.AutoConfig.from_pretrained(where, return_unused_kwargs=True, **options)
    options = {name: value for name, value in options.items() if not hasattr(config, name)}
    told = getattr(config, "quantization_config", None)
    if told is None:
        options["quantization_config"] = ours
    elif told.get("quant_method") == "bitsandbytes" and told.get("load_in_4bit"):
        config.quantization_config = ours.to_dict()
    else:
        raise PeftcoreError(
            f"'{where}' is quantized by {told.get('quant_method')!r}, which is not read here. Give a dense checkpoint, "
            "or one of bitsandbytes in 4 bits"
        )
    if model_class is None:
        named = (config.architectures or [None])[0]
        model_class = getattr(transformers, named or "", None) or transformers.AutoModelForCausalLM
    _failures.clear()
    try:
        return model_class.from_pretrained(where, config=config, dtype=dtype, **options)
    except RuntimeError as error:
        if _failures:
            raise _failures[0] from error
        raise
