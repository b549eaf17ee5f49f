"""Kernels and layers next to cuBLAS, peft's formula, torch._grouped_mm, bitsandbytes, torch.compile and Liger, and to
their floors.

    python -m card_stages.timings --results FILE --until SECONDS

A floor is the larger of what must be moved over the rate of a copy and of the products over the rate of a large one of
cuBLAS, both measured in this run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from card_stages.clock import Call, by_events, in_graph, rates, second_cache
from card_stages.results import MEASURED, SKIPPED, Results
from peftcore import ops, optim

DEVICE, N, RANK, DTYPE = "cuda", 4096, 16, torch.bfloat16
MANY = 8192  # rows of training
CLASSES, EXPERTS = 128256, (128, 2048, 1536)  # experts, in, out
PACKED = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of a value in 4 bits, with nested scales


class Row(NamedTuple):
    """A measurement: `make` returns a call on tensors of its own."""

    group: str
    label: str
    make: Callable[[], Call]
    moved: float  # bytes
    operations: float = 0
    resident: float = 0  # bytes of the tensors of one call that another call does not share
    graph: bool = True


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def factors() -> tuple[Tensor, Tensor]:
    return torch.randn(RANK, N, device=DEVICE) / 64, torch.randn(N, RANK, device=DEVICE) * 0.01


def theirs(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return peft's formula, under bf16."""
    return F.linear(x, weight) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * 2.0


def layer(rows: int) -> Iterator[Row]:
    """Yield forward passes of a layer; from 512 rows on, forward and backward."""
    back = rows >= 512
    group = f"{N} x {N}, {rows} rows, bf16, rank {RANK}, forward{' and backward' if back else ''}"
    x, grad = normal(rows, N).requires_grad_(back), normal(rows, N)
    passes, wide = 1 + back, 4 * rows * N

    def step(call: Callable[[Tensor], Tensor], *leaves: Tensor) -> Call:
        if not back:
            return lambda: call(x)
        return lambda: torch.autograd.grad(call(x), [x, *leaves], grad)

    def dense() -> Call:
        weight = normal(N, N)
        return step(lambda x: F.linear(x, weight))

    def packed() -> Call:
        weight = ops.quantize_4bit(normal(N, N), double_quant=True)
        return step(lambda x: ops.linear_4bit(x, weight))

    def with_lora(kind: str) -> Callable[[], Call]:
        def make() -> Call:
            weight = normal(N, N)
            a, b = (t.requires_grad_(back) for t in factors())
            if kind == "dense":
                return step(lambda x: ops.lora_linear(x, weight, None, a, b, 2.0), a, b)
            if kind == "peft":
                return step(lambda x: theirs(x, weight, a, b), a, b)
            four = ops.quantize_4bit(weight, double_quant=True)
            if kind == "peft4":
                return step(lambda x: theirs(x, ops.dequantize_4bit(four, DTYPE), a, b), a, b)
            return step(lambda x: ops.lora_linear(x, four, None, a, b, 2.0), a, b)

        return make

    products, kinds = 2 * rows * N * N * passes, {"dense": 2.0, "4 bits": PACKED}
    for label, make, kind in (
        ("peftcore QLoRA", with_lora("4 bits"), "4 bits"),
        ("peftcore 4 bits, frozen", packed, "4 bits"),
        ("F.linear (cuBLAS)", dense, "dense"),
        ("peftcore LoRA, dense", with_lora("dense"), "dense"),
        ("peft's formula, dense", with_lora("peft"), "dense"),
        ("peft's formula over unpacked 4 bits", with_lora("peft4"), "4 bits"),
    ):
        weight = kinds[kind] * N * N
        yield Row(group, label, make, (weight + wide) * passes, products, weight)
    if find_spec("bitsandbytes") and not back:
        import bitsandbytes as bnb

        def bitsandbytes() -> Call:
            data, state = bnb.functional.quantize_4bit(normal(N, N), quant_type="nf4", compress_statistics=True)
            return step(lambda x: bnb.matmul_4bit(x, data.t(), state))

        yield Row(group, "bitsandbytes, frozen", bitsandbytes, PACKED * N * N + wide, products, PACKED * N * N)


def four_bits() -> Iterator[Row]:
    group, count = f"{N} x {N} to 4 bits and back, bf16", N * N

    def dequantize() -> Call:
        weight, out = ops.quantize_4bit(normal(N, N), double_quant=True), normal(N, N)
        return lambda: ops.dequantize_4bit(weight, out=out)

    def quantize() -> Call:
        x = normal(N, N)
        return lambda: ops.quantize_4bit(x, double_quant=True)

    def copy() -> Call:
        x, out = normal(N, N), normal(N, N)
        return lambda: out.copy_(x)

    yield Row(group, "peftcore dequantize", dequantize, (PACKED + 2) * count, 0, 2.5 * count)
    yield Row(group, "peftcore quantize", quantize, (PACKED + 2) * count, 0, 2.5 * count)
    yield Row(group, "copy of bf16", copy, 4 * count, 0, 4 * count)


def experts(tokens: int) -> Iterator[Row]:
    """Yield products of a layer of 128 experts, 8 of them for each token."""
    (count, width, out), rows = EXPERTS, tokens * 8
    group = f"{count} experts [{out}, {width}], {tokens} tokens, top 8, bf16, forward"
    generator = torch.Generator(DEVICE).manual_seed(0)
    index = torch.rand(tokens, count, device=DEVICE, generator=generator).topk(8).indices.flatten()
    offsets = torch.bincount(index, minlength=count).cumsum(0).to(torch.int32)
    used, x = len(index.unique()), normal(rows, width)
    wide, products = 2 * rows * (width + out), 2 * rows * width * out

    def make(kind: str) -> Callable[[], Call]:
        def call() -> Call:
            weight = normal(count, out, width)
            if kind == "torch":
                return lambda: torch._grouped_mm(x, weight.mT, offs=offsets)
            if kind != "dense":
                weight = ops.quantize_4bit(weight, double_quant=True)
            if kind != "lora":
                return lambda: ops.grouped_linear(x, offsets, weight)
            a, b = torch.randn(count, RANK, width, device=DEVICE) / 45, torch.randn(count, out, RANK, device=DEVICE)
            return lambda: ops.grouped_lora_linear(x, offsets, weight, None, a, b)

        return call

    for label, kind, size in (
        ("peftcore, dense", "dense", 2.0),
        ("peftcore, 4 bits", "4 bits", PACKED),
        ("peftcore LoRA, 4 bits", "lora", PACKED),
        ("torch._grouped_mm", "torch", 2.0),
    ):
        weight = used * out * width * size
        yield Row(group, label, make(kind), weight + wide, products, weight)


def entropy() -> Iterator[Row]:
    rows, classes = N // 2, CLASSES
    group = f"cross-entropy and its gradient, {rows} x {classes}, bf16"
    labels = torch.randint(classes, (rows,), device=DEVICE)

    def ours() -> Call:
        logits = normal(rows, classes)
        settings = [0.0, 1.0, 0.0, 0.0]
        return lambda: torch.ops.peftcore.cross_entropy_rows_(logits, labels, None, None, settings, -100, True)

    def formula(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    def peer(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Call]:
        def make() -> Call:
            logits = normal(rows, classes).requires_grad_()
            return lambda: torch.autograd.grad(loss(logits, labels), logits)

        return make

    size = 2 * rows * classes
    yield Row(group, "peftcore", ours, 2 * size, 0, size)
    yield Row(group, "F.cross_entropy", peer(formula), 2 * size, 0, size)
    yield Row(group, "torch.compile of F.cross_entropy", peer(torch.compile(formula)), 2 * size, 0, size)
    if liger := liger_kernels():
        yield Row(group, "Liger", peer(liger.liger_cross_entropy), 2 * size, 0, size)


def liger_kernels() -> ModuleType | None:
    """Return Liger's functions, or None if it is not installed."""
    return importlib.import_module("liger_kernel.transformers.functional") if find_spec("liger_kernel") else None


def norms() -> Iterator[Row]:
    """Yield RMSNorms with a frozen weight and gated activations: forward, and forward and backward."""
    size = 2 * MANY * N  # bytes of a matrix
    liger = liger_kernels()

    def silu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    for back in (False, True):
        passes = "forward and backward" if back else "forward"
        grad = normal(MANY, N)

        def step(call: Callable[..., Tensor], count: int, back: bool = back, grad: Tensor = grad) -> Callable[[], Call]:
            def make() -> Call:
                inputs = [normal(MANY, N).requires_grad_(back) for _ in range(count)]
                if not back:
                    return lambda: call(*inputs)
                return lambda: torch.autograd.grad(call(*inputs), inputs, grad)

            return make

        weight = normal(N)

        def llama(x: Tensor, weight: Tensor = weight) -> Tensor:
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

        group, moved = f"RMSNorm of {MANY} x {N}, bf16, {passes}", (5 if back else 2) * size
        yield Row(group, "peftcore", step(lambda x, w=weight: ops.rms_norm(x, w, 1e-5), 1), moved, 0, moved)
        yield Row(group, "F.rms_norm", step(lambda x, w=weight: F.rms_norm(x, (N,), w, 1e-5), 1), moved, 0, moved)
        yield Row(group, "Llama's formula", step(llama, 1), moved, 0, moved)
        yield Row(group, "torch.compile of Llama's formula", step(torch.compile(llama), 1), moved, 0, moved)
        if liger:
            yield Row(group, "Liger", step(lambda x, w=weight: liger.liger_rms_norm(x, w, 1e-5), 1), moved, 0, moved)
        group, moved = f"silu(g) u of {MANY} x {N}, bf16, {passes}", (8 if back else 3) * size
        yield Row(group, "peftcore", step(ops.gated, 2), moved, 0, moved)
        yield Row(group, "F.silu(g) * u", step(silu, 2), moved, 0, moved)
        yield Row(group, "torch.compile of F.silu(g) * u", step(torch.compile(silu), 2), moved, 0, moved)
        if liger:
            yield Row(group, "Liger", step(liger.liger_swiglu, 2), moved, 0, moved)


def steps() -> Iterator[Row]:
    shapes, count = [(N, N)] * 6, 6 * N * N
    group = f"a step of AdamW, {count / 1e6:.0f} M parameters in fp32"

    def make(kind: str) -> Callable[[], Call]:
        def call() -> Call:
            params = [torch.nn.Parameter(torch.zeros(shape, device=DEVICE)) for shape in shapes]
            for p in params:
                p.grad = torch.full_like(p, 1e-3)
            if kind == "torch":
                return torch.optim.AdamW(params, fused=True).step
            return getattr(optim, kind)(params).step

        return call

    for label, kind, each in (("peftcore AdamW", "AdamW", 28), ("peftcore AdamW8bit", "AdamW8bit", 16)):
        yield Row(group, label, make(kind), each * count, 0, 1e12, graph=False)
    yield Row(group, "torch.optim.AdamW(fused=True)", make("torch"), 28 * count, 0, 1e12, graph=False)


def all_rows() -> Iterator[Row]:
    yield from layer(1)
    yield from layer(64)
    yield from four_bits()
    yield from layer(MANY)
    yield from experts(16)
    yield from layer(16)
    yield from layer(512)
    yield from experts(MANY // 2)
    yield from norms()
    yield from steps()
    yield from entropy()
    for rows in (4, 8):
        yield from layer(rows)


def bounds() -> dict[str, float]:
    """Return the bytes that cuda_bounds has for its kernels, by label."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda_bounds"))
    from work import WORK

    return {work.label: work.bytes for work in WORK}


def measure(row: Row, bandwidth: float, product: float) -> dict[str, float]:
    copies = max(1, min(64, int(3 * second_cache() // max(1, row.resident))))
    calls, floor = [row.make() for _ in range(copies)], max(row.moved / bandwidth / 1e3, row.operations / product / 1e6)
    if not row.graph:
        eager = by_events(calls)
        return {"µs": eager.median, "least": eager.least, "floor, µs": floor, "of floor": eager.least / floor}
    cold, warm, eager = in_graph(calls), in_graph(calls[:1]), by_events(calls)
    found = {"µs": cold.median, "least": cold.least, "warm": warm.median, "by events": eager.median}
    return found | {"floor, µs": floor, "of floor": cold.least / floor}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    options = parser.parse_args()
    results = Results(options.results)
    known = results.names("timings")
    bandwidth, product = rates()
    values = {"copy, GB/s": bandwidth, "bf16 product, TFLOP/s": product}
    results.add("timings", "rates of the card", MEASURED, values=values, group="rates of the card")
    moved = bounds()
    results.add(
        "timings",
        "cuda_bounds",
        MEASURED,
        group="memory bounds of cuda_bounds at the measured rate",
        values={f"{label}, µs": count / bandwidth / 1e3 for label, count in moved.items()},
    )
    for row in all_rows():
        name = f"{row.group}: {row.label}"
        if name in known:
            continue
        if time.time() > options.until:
            return
        began = time.time()
        found = {"group": row.group, "label": row.label}
        try:
            values = measure(row, bandwidth, product)
        except torch.AcceleratorError:
            raise  # the card is unusable for this process
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"[:500]
            results.add("timings", name, SKIPPED, time.time() - began, detail=detail, **found)
        else:
            results.add("timings", name, MEASURED, time.time() - began, values=values, **found)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
