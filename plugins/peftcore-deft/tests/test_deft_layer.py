"""Parameters of 16 bits are applied, trained and merged like those of 32."""

import pytest
import torch
from support import tiny

import peftcore


@pytest.mark.parametrize("method", ["relu", "qr"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits(method: str, dtype: torch.dtype) -> None:
    base = tiny.llama().to(dtype)
    fields = {"r": 4, "decomposition_method": method, "target_modules": ["q_proj", "down_proj"]}
    tokens = torch.arange(8)[None]
    model = peftcore.apply(tiny.llama().to(dtype), "deft", dtype=dtype, **fields)
    parameters = [p for _, p in peftcore.engine.adapter_parameters(model, "default")]
    assert {p.dtype for p in parameters} == {dtype}
    logits = model(input_ids=tokens).logits
    scale = base(input_ids=tokens).logits.float().std().item()
    torch.testing.assert_close(logits, base(input_ids=tokens).logits, rtol=0, atol=0.1 * scale)  # of 8 bits of mantissa
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    with torch.no_grad():
        for p in parameters:
            p += 0.3 * torch.sign(p.grad)
    changed = model(input_ids=tokens).logits.float()
    assert (changed - logits).abs().max() > 0.2 * scale
    merged = peftcore.merge(model, undo=True)(input_ids=tokens).logits.float()
    torch.testing.assert_close(merged, changed, rtol=0, atol=0.1 * scale)
