"""Checkpoints of GPTQ, AutoAWQ, compressed-tensors (W4A16, NVFP4) and ModelOpt (NVFP4), read without these libraries.

`peftcore.quantization.load` and the command line read them. Their layers have the core's types `affine4` and `nvfp4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftcore.plugin import CheckpointFormat, CheckpointLayout, hookimpl
from peftcore_checkpoints import int4, nvfp4

peftcore_api = ">=3.8,<4"


def _compressed_tensors(config: Mapping[str, Any], where: str) -> CheckpointLayout:
    tool = nvfp4 if nvfp4.is_nvfp4(config, where) else int4
    return tool.compressed_tensors_layout(config, where)


@hookimpl
def peftcore_checkpoint_formats() -> list[CheckpointFormat]:
    return [
        CheckpointFormat("gptq", int4.gptq_layout),
        CheckpointFormat("awq", int4.awq_layout),
        CheckpointFormat("compressed-tensors", _compressed_tensors),
        CheckpointFormat("modelopt", nvfp4.modelopt_layout),
    ]
