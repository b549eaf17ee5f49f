"""Readers of 4-bit checkpoints: GPTQ, AutoAWQ, compressed-tensors (W4A16, NVFP4) and ModelOpt (NVFP4).

`peftcore.quantization.load` and the command line use them to load such a checkpoint as a frozen base, without the
libraries of these tools. Each reader describes the checkpoint with a `CheckpointLayout`, which converts the weights to
peftcore's types: `gptq.py`, `awq.py` and `compressed_int4.py` to `affine4`, `nvfp4.py` to `nvfp4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftcore.plugin import CheckpointFormat, CheckpointLayout, hookimpl
from peftcore_checkpoints import nvfp4
from peftcore_checkpoints.awq import awq_layout
from peftcore_checkpoints.compressed_int4 import compressed_int4_layout
from peftcore_checkpoints.gptq import gptq_layout

peftcore_api = ">=3.8,<4"


def _compressed_tensors(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    if nvfp4.is_nvfp4(config, checkpoint):
        return nvfp4.compressed_tensors_layout(config, checkpoint)
    return compressed_int4_layout(config, checkpoint)


@hookimpl
def peftcore_checkpoint_formats() -> list[CheckpointFormat]:
    return [
        CheckpointFormat("gptq", gptq_layout),
        CheckpointFormat("awq", awq_layout),
        CheckpointFormat("compressed-tensors", _compressed_tensors),
        CheckpointFormat("modelopt", nvfp4.modelopt_layout),
    ]
