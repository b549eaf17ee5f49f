"""Files of PEFT's variants of LoRA: plain LoRA where they compute that once they are trained, else why not.

monteclora_config   A is drawn around its mean in training; that mean is what acts afterwards
velora_config       the gradient of A is taken from compressed inputs, to save memory
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

PLAIN = {
    "monteclora_config": "A is not drawn anew in training here",
    "velora_config": "gradients are exact here",
}
OF_TRAINING = (".lora_monteclora_sampler.", ".lora_velora_")
ELSEWHERE = "is a method of its own, and needs a plugin that is not installed. Or train without: that is LoRA"
REFUSED = {
    "use_dora": f"DoRA {ELSEWHERE}",
    "alora_invocation_tokens": f"activated LoRA {ELSEWHERE}",
    "arrow_config": "Arrow chooses adapters for each token. Load those, each by its name, and apply the method arrow",
    "kasa_config": "KaSA cuts the base's own weights. Merge it in PEFT (merge_and_unload), and take that model",
    "use_qalora": "QA-LoRA is of layers in GPTQ, which LoRA does not adapt here. Train on a base in NF4: method qlora",
    "megatron_config": "its layers are Megatron's, sharded over ranks. Train on transformers' model, by FSDP2: `shard`",
}


def why_not(fields: Mapping[str, Any]) -> str | None:
    """Why a file with these fields cannot be read; None: it can."""
    named = next((name for name in REFUSED if fields.get(name)), None)
    return None if named is None else f"it has {named}: {REFUSED[named]}"


def as_plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of plain LoRA that computes what the variant does."""
    return {name: t for name, t in tensors.items() if not any(part in name for part in OF_TRAINING)}


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of plain LoRA. Where training would go another way, a warning says so."""
    for name, what in PLAIN.items():
        if fields.get(name):
            warnings.warn(f"{name}: the adapter is plain LoRA, which computes the same; {what}", stacklevel=6)
    return {name: value for name, value in fields.items() if name not in PLAIN and name != "loftq_config"}  # of a start
