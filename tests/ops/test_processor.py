"""Instructions of the processor, within the limits of the environment."""

import pytest
import torch

from peftcore.ops.processor import has_instructions, onednn_multiplies


def test_fp32_needs_no_further_instructions() -> None:
    assert has_instructions(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_instructions_are_used_by_onednn(dtype: torch.dtype) -> None:
    assert onednn_multiplies(dtype) or not has_instructions(dtype)
