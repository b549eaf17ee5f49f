"""More than 2^31 elements: what operators make of rows about the limits of 32-bit arithmetic is what they make of these
rows alone, and all others stay zeros.

    cd tests; python -m fuzz.large [NAME ...]

`tests/ops/test_large_tensors.py` has the operators of 4 bits. Each case is a process of its own; what is only read of
a large tensor is pages that nobody has written, and take no memory.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from peftcore import ops
from peftcore.ops import routing
from peftcore.ops.swiglu import swiglu

LIMIT = 2**31
BF16 = torch.bfloat16
_GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR).to(dtype)


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Zeros that take no memory where nobody writes; torch.zeros writes them."""
    return torch.from_numpy(np.zeros(shape, np.int16)).view(dtype)


def rows_of(columns: int) -> tuple[int, Tensor]:
    """(number of rows with more than 2^31 elements, those at which elements or bytes pass a limit, and both ends)."""
    count = LIMIT // columns + 3
    edges = [0, 2**28, 2**29, 2**30, LIMIT]
    found = {min(max(0, edge // columns + more), count - 1) for edge in edges for more in (-1, 0, 1)}
    return count, torch.tensor(sorted(found | {count - 1}))


def large(columns: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """(x of more than 2^31 elements, zeros but for some rows; these rows)."""
    count, rows = rows_of(columns)
    x = zeros(count, columns, dtype=dtype)
    x[rows] = drawn(len(rows), columns, dtype=dtype)
    return x, rows


def check(found: Tensor, wanted: Tensor, rows: Tensor, tolerance: float = 2**-7) -> None:
    """`found` is `wanted` at `rows`, and zeros elsewhere."""
    torch.testing.assert_close(found[rows].double(), wanted.double(), rtol=tolerance, atol=tolerance)
    assert not bool(wanted.isnan().any())
    nonzero = sum(int(part.count_nonzero()) for part in found.split(1 << 20))
    assert nonzero == int(found[rows].count_nonzero()), "rows elsewhere were written"


def _swiglu() -> None:
    x, rows = large(4096)
    check(swiglu(x), swiglu(x[rows]), rows)


def _swiglu_backward() -> None:
    x, rows = large(4096)
    grad = zeros(len(x), 2048)
    grad[rows] = drawn(len(rows), 2048)
    check(torch.ops.peftcore.swiglu_backward(grad, x), torch.ops.peftcore.swiglu_backward(grad[rows], x[rows]), rows)


def _lora_linear() -> None:
    x, rows = large(64)
    w, a, b = drawn(64, 64), drawn(8, 64, dtype=torch.float32), drawn(64, 8, dtype=torch.float32)
    check(ops.lora_linear(x, w, None, a, b, 0.5), ops.lora_linear(x[rows], w, None, a, b, 0.5), rows, 0.05)


def _lora_linear_4bit() -> None:
    x, rows = large(64)
    w = ops.quantize_4bit(drawn(64, 64))
    a, b = drawn(8, 64, dtype=torch.float32), drawn(64, 8, dtype=torch.float32)
    check(ops.lora_linear(x, w, None, a, b, 0.5), ops.lora_linear(x[rows], w, None, a, b, 0.5), rows, 0.05)


def _lora_gradients() -> None:
    """Of the factors, which are sums over all rows, and of x."""
    x, rows = large(64)
    grad = zeros(len(x), 64)
    grad[rows] = drawn(len(rows), 64)
    w, a, b = drawn(64, 64), drawn(8, 64, dtype=torch.float32), drawn(64, 8, dtype=torch.float32)

    def gradients(x: Tensor, grad: Tensor) -> list[Tensor]:
        inputs = [x.requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        return list(torch.autograd.grad(ops.lora_linear(inputs[0], w, None, *inputs[1:], 0.5), inputs, grad))

    wanted = gradients(x.detach()[rows], grad[rows])
    found = gradients(x, grad)
    check(found[0], wanted[0], rows, 0.05)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def _per_sample() -> None:
    x, rows = large(64)
    w, a, b = drawn(64, 64), drawn(8, 64, dtype=torch.float32), drawn(64, 8, dtype=torch.float32)
    index = torch.zeros(len(x), dtype=torch.int64)
    index[::2] = -1
    found = ops.lora_linear_per_sample(x, w, None, [a], [b], [0.5], index)
    check(found, ops.lora_linear_per_sample(x[rows], w, None, [a], [b], [0.5], index[rows]), rows, 0.05)


def _dense_linear() -> None:
    x, rows = large(64, torch.float16)
    w = drawn(64, 64, dtype=torch.float16)
    check(ops.dense_linear(x, w), ops.dense_linear(x[rows], w), rows, 0.05)


def _scaled() -> None:
    x, rows = large(2048)
    g = drawn(2048, dtype=torch.float32)
    check(ops.scaled(x, g), ops.scaled(x[rows], g), rows)


def _row_norms() -> None:
    w, rows = large(32768)
    a, b = drawn(8, 32768, dtype=torch.float32) / 100, torch.zeros(len(w), 8)
    b[rows] = drawn(len(rows), 8, dtype=torch.float32)
    check(ops.row_norms(w, a, b, 0.5)[:, None], ops.row_norms(w[rows], a, b[rows], 0.5)[:, None], rows)


def _grouped_linear() -> None:
    """Weights of many experts, of which those about the limits have rows."""
    count, experts = rows_of(1 << 20)
    w = zeros(count, 1024, 1024)
    w[experts] = drawn(len(experts), 1024, 1024) / 32
    x = drawn(2 * len(experts), 1024)
    counts = torch.zeros(count, dtype=torch.int32)
    counts[experts] = 2
    found = ops.grouped_linear(x, counts.cumsum(0).int(), w)
    few = torch.arange(1, len(experts) + 1, dtype=torch.int32) * 2
    wanted = ops.grouped_linear(x, few, w[experts])
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7)
    assert found.count_nonzero() > 0.9 * found.numel()


def _gathered_and_combined() -> None:
    tokens = LIMIT // 2 // 4096 + 2
    x = zeros(tokens, 4096)
    rows = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1])
    x[rows] = drawn(len(rows), 4096)
    route = routing.route(torch.arange(2 * tokens).view(tokens, 2) % 3, 3)
    copies = routing.gather_rows(x, route)
    assert copies.numel() > LIMIT
    at = route.places[rows]
    assert torch.equal(copies[at.flatten()], x[rows].repeat_interleave(2, 0))
    weights = torch.full((tokens, 2), 0.5, dtype=BF16)
    del x
    found = routing.combine_rows(copies, weights, route)
    check(found, copies[at].float().mean(1).to(BF16), rows)


def _adamw() -> None:
    from peftcore import optim

    count = LIMIT + 259
    edges = [slice(max(0, edge - 512), min(edge + 512, count)) for edge in (0, 2**29, 2**30, LIMIT, count)]
    p, grad = zeros(count), zeros(count)
    for part in edges[:4]:  # the last one overlaps
        p[part], grad[part] = drawn(part.stop - part.start), drawn(part.stop - part.start)
    few = [torch.nn.Parameter(p[part].clone()) for part in edges[:4]]
    for params, grads in (([torch.nn.Parameter(p)], [grad]), (few, [grad[part] for part in edges[:4]])):
        for each, own in zip(params, grads, strict=True):
            each.grad = own
        optimizer = optim.AdamW8bit(params, lr=0.1, weight_decay=0.0)
        optimizer.step()
        optimizer.step()
    for part, each in zip(edges, few, strict=False):
        assert torch.equal(p[part], each.detach())
    nonzero = sum(int(piece.count_nonzero()) for piece in p.split(1 << 28))
    assert nonzero == sum(int(p[part].count_nonzero()) for part in edges[:4])


CASES: dict[str, Callable[[], None]] = {
    "swiglu": _swiglu,
    "swiglu backward": _swiglu_backward,
    "lora_linear": _lora_linear,
    "lora_linear in 4 bits": _lora_linear_4bit,
    "gradients of lora_linear": _lora_gradients,
    "lora_linear per sample": _per_sample,
    "dense_linear": _dense_linear,
    "scaled": _scaled,
    "row_norms": _row_norms,
    "grouped_linear": _grouped_linear,
    "gathered and combined": _gathered_and_combined,
    "AdamW in 8 bits": _adamw,
}


GIGABYTES = {
    "gradients of lora_linear": 10.7,
    "gathered and combined": 6.5,
    "AdamW in 8 bits": 8.7,
}  # others: 5.4 or less


def available() -> float:
    """Gigabytes."""
    text = Path("/proc/meminfo").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable")) / 1e6


def main(names: list[str]) -> None:
    for name in names or CASES:
        wanted = GIGABYTES.get(name, 5.5) + 2
        if available() < wanted:
            print(f"{name}: skipped, {available():.1f} GB are available, {wanted} are needed", flush=True)
            continue
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                CASES[name]()
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        _, status, usage = os.wait4(child, 0)
        word = "right" if status == 0 else f"WRONG: status {status}"
        print(f"{name}: {word}, {usage.ru_maxrss / 1e6:.1f} GB, {time.monotonic() - began:.0f} s", flush=True)
    print(f"done, {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.1f} GB at most")


if __name__ == "__main__":
    main(sys.argv[1:])
