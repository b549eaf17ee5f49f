"""Files of PEFT's variants of LoRA: read as plain LoRA if they are one after training, otherwise refused.

monteclora_config   A is drawn around its mean in training; afterwards the mean is used
velora_config       the gradient of A is taken from compressed inputs, to save memory
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftcore.plugin import warn

PLAIN = {
    "monteclora_config": "in further training A is not drawn around it",
    "velora_config": "gradients are exact here",
}
OF_TRAINING = re.compile(r"\.lora_monteclora_sampler\.|\.lora_velora_")
ELSEWHERE = "is another method, whose plugin is not installed. Install it, or train a plain LoRA"
REFUSED = {
    "use_dora": f"DoRA {ELSEWHERE}",
    "alora_invocation_tokens": f"activated LoRA {ELSEWHERE}",
    "arrow_config": "Arrow chooses adapters for each token. Load each of them by name, and apply the method arrow",
    "kasa_config": "KaSA changes the base's weights. Merge it in PEFT (merge_and_unload), and use the merged model",
    "use_qalora": "QA-LoRA is for GPTQ layers, which LoRA cannot adapt here. Train on an NF4 base: method qlora",
    "megatron_config": "its layers are Megatron's, sharded over ranks. Train transformers' model with FSDP2: `shard`",
}


def why_not(fields: Mapping[str, Any]) -> str | None:
    """Return why a file with these fields cannot be read, or None."""
    named = next((name for name in REFUSED if fields.get(name)), None)
    return None if named is None else f"it has {named}: {REFUSED[named]}"


def as_plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the plain LoRA that the variant computes."""
    return {name: t for name, t in tensors.items() if not OF_TRAINING.search(name)}


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of plain LoRA; warn if further training would differ."""
    for name, what in PLAIN.items():
        if fields.get(name):
            warn(f"{name}: the adapter is plain LoRA, which computes the same; {what}")
    # only for a start
    return {name: value for name, value in fields.items() if name not in PLAIN and name != "loftq_config"}
