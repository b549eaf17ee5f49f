"""What the timed calls compute."""

import pytest
import torch

from peftcore.ops.probes import over_dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_multiply_by_the_dense_weight(dtype: torch.dtype) -> None:
    forward, backward = over_dense(4, 64, dtype)
    y, s = forward()
    assert y.dtype == dtype and torch.equal(y, torch.full((4, 64), 64.0 + 64.0, dtype=dtype))  # base and rank 1
    assert s.shape == (4, 1)
    dx, da, db = backward()
    assert torch.equal(dx, torch.full((4, 64), 2 * 64.0 * 128.0, dtype=dtype))
    assert not da.numel() and not db.numel()
