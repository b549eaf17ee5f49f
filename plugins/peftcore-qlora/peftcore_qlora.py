"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): y = dequantize(W₄) x + scale · B A x, with W₄ in 4 bits and frozen.

            y [out]
            |
           (+)----------------.
            |                 |  · scale = lora_alpha / r
      .-----+------.      .---+---.
      | dequantize |      |   B   |  [out, r]
      |    W₄      |      '---+---'
      |  4 bits a  |      .---+---.
      |   weight   |      |   A   |  [r, in]
      '-----+------'      '---+---'
            '--------+--------'
                  x [in]

`apply` quantizes the base once, and then adds an ordinary LoRA of `peftcore-lora`, which is also what is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import peftcore_lora
import torch
from torch import nn

import peftcore
from peftcore.plugin import Method, default_skip, hookimpl, quantized_layers, validation

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class QLoraConfig(peftcore_lora.LoraConfig):
    """Config with LoRA's fields, and fields for quantizing the base. A base that is already quantized is not changed.

    Args:
        quant_type, double_quant, blocksize, compute_dtype: see `peftcore.quantize`.
        skip: modules that stay dense; None: the heads. Modules in modules_to_save always stay dense.
    """

    quant_type: str = "nf4"
    double_quant: bool = True
    blocksize: int = 64
    compute_dtype: str | None = None
    skip: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.one_of((None, "float32", "bfloat16", "float16"), compute_dtype=self.compute_dtype)


def prepare(model: nn.Module, config: QLoraConfig) -> None:
    """Quantize the base, unless it is quantized already."""
    if next(quantized_layers(model), None) is not None:
        return
    skip = [
        *(default_skip(model) if config.skip is None else config.skip),
        *(config.modules_to_save or ()),
    ]
    peftcore.quantize(
        model,
        config.quant_type,
        double_quant=config.double_quant,
        skip=skip,
        compute_dtype=getattr(torch, config.compute_dtype) if config.compute_dtype else None,
        blocksize=config.blocksize,
    )


def as_lora(config: QLoraConfig) -> peftcore_lora.LoraConfig:
    """Return the LoRA config without the fields for quantization; the adapter is saved with it."""
    names = (f.name for f in fields(peftcore_lora.LoraConfig))
    return peftcore_lora.LoraConfig(**{name: getattr(config, name) for name in names})


@hookimpl
def peftcore_methods() -> list[Method]:
    (lora,) = peftcore_lora.peftcore_methods()
    options: dict[str, Any] = {"prepare": prepare, "recorded_as": as_lora, "learning_rate": lora.learning_rate}
    return [Method("qlora", QLoraConfig, lora.place, lora.state, **options)]
