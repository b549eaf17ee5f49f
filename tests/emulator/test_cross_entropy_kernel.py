"""The CUDA kernel of cross_entropy_rows_ on the emulator, against the reference."""

from ctypes import Structure, c_bool, c_float, c_int, c_int64, c_void_p

import pytest
import torch
from emulator.structs import DTYPES, address

from peftcore.ops.cross_entropy import CrossEntropyRows


class CrossEntropyCall(Structure):
    """csrc/cross_entropy/cuda/cross_entropy_cuda.h"""

    _fields_ = [
        ("x", c_void_p),
        ("dtype", c_int),
        ("rows", c_int64),
        ("columns", c_int64),
        ("labels", c_void_p),
        ("weights", c_void_p),
        ("total_weight", c_void_p),
        *((name, c_float) for name in ("smoothing", "z_loss", "scale", "cap")),
        ("grad_scale", c_void_p),
        ("ignore_index", c_int64),
        ("gradient", c_bool),
        ("out", c_void_p),
    ]


def call(emulated, logits, labels, weights, scale, settings, gradient, seed=0):
    out = torch.full((3, logits.shape[0]), torch.nan)
    total = None if weights is None else weights.sum()
    smoothing, factor, cap, z_loss = settings
    given = CrossEntropyCall(
        x=logits.data_ptr(),
        dtype=DTYPES.index(logits.dtype),
        rows=logits.shape[0],
        columns=logits.shape[1],
        labels=labels.data_ptr(),
        weights=address(weights),
        total_weight=address(total),
        smoothing=smoothing,
        z_loss=z_loss,
        scale=factor,
        cap=cap,
        grad_scale=address(scale),
        ignore_index=-100,
        gradient=gradient,
        out=out.data_ptr(),
    )
    emulated("peftcore_cross_entropy_rows")(given, seed=seed)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 7, 256, 900])
def test_against_the_reference(emulated, classes, dtype):
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (5,), generator=generator)
    labels[2] = -100
    weights = torch.rand(classes, generator=generator) + 0.1
    cases = [
        (None, None, [0.0, 1.0, 0.0, 0.0]),
        (weights, torch.tensor(0.25), [0.1, 0.5, 0.0, 0.01]),
        (None, None, [0.2, 2.0, 5.0, 0.0]),
    ]
    for seed, (w, scale, settings) in enumerate(cases):
        logits = (3 * torch.randn(5, classes, generator=generator)).to(dtype)
        kernel, reference = logits.clone(), logits.clone()
        found = call(emulated, kernel, labels, w, scale, settings, True, seed)
        wanted = CrossEntropyRows(reference, labels, w, scale, settings, -100, True).compute()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
        step = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(kernel, reference, rtol=2 * step, atol=1e-5)
        unread = logits.clone()
        assert torch.equal(call(emulated, unread, labels, w, scale, settings, False, seed), found)
        assert torch.equal(unread, logits)


def test_invalid_labels_and_values_that_are_not_finite(emulated):
    labels = torch.tensor([0, 300, 1, 1])
    logits = torch.zeros(4, 300)
    logits[2, 5], logits[3, 5] = torch.nan, -torch.inf
    found = call(emulated, logits, labels, None, None, [0.0, 1.0, 0.0, 0.0], True)
    assert found[0].isnan().tolist() == [False, True, True, False]
    assert logits[2].isnan().all() and logits[3, 5] == 0 and logits[3].isfinite().all()
