"""Readers of 4-bit checkpoints: GPTQ, AutoAWQ, compressed-tensors (W4A16, NVFP4) and ModelOpt (NVFP4).

`peftcore.quantization.load` and the command line use them, without the tools' libraries. Layers become peftcore's types
`affine4` and `nvfp4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftcore.plugin import CheckpointFormat, CheckpointLayout, hookimpl
from peftcore_checkpoints import int4, nvfp4

peftcore_api = ">=3.8,<4"


def _compressed_tensors(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout:
    reader = nvfp4 if nvfp4.is_nvfp4(config, checkpoint) else int4
    return reader.compressed_tensors_layout(config, checkpoint)


@hookimpl
def peftcore_checkpoint_formats() -> list[CheckpointFormat]:
    return [
        CheckpointFormat("gptq", int4.gptq_layout),
        CheckpointFormat("awq", int4.awq_layout),
        CheckpointFormat("compressed-tensors", _compressed_tensors),
        CheckpointFormat("modelopt", nvfp4.modelopt_layout),
    ]
