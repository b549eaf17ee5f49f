"""Time calls on a GPU, in CUDA graphs and with events, with a cold and a warm L2 cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]


class Time(NamedTuple):
    """Time of one call, in microseconds."""

    median: float
    least: float


def _rounds(run: Call, calls: int, rounds: int = 7, least_ms: float = 4.0) -> Time:
    def once(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    once(2)
    count = max(1, round(least_ms / max(once(2), 1e-3)))
    times = [once(count) / calls * 1000 for _ in range(rounds)]
    return Time(statistics.median(times), min(times))


def by_events(calls: Sequence[Call]) -> Time:
    """Time calls that the host launches one after another, including the host's overhead."""

    def run() -> None:
        for call in calls:
            call()

    return _rounds(run, len(calls))


def captured(call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture the call in a graph. Return the graph, and the call's results, which replays overwrite."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def in_graph(calls: Sequence[Call]) -> Time:
    """Time calls in a CUDA graph of at least 20 calls, without the host's overhead."""
    times = -(-20 // len(calls))

    def run() -> None:
        for _ in range(times):
            for call in calls:
                call()

    graph, _ = captured(run)
    return _rounds(graph.replay, times * len(calls))


def l2_cache_bytes() -> int:
    """Return the size of the L2 cache in bytes; an H100's if PyTorch does not report it."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)


def rates() -> tuple[float, float]:
    """Return the rate of a copy on the GPU in GB/s, and of a large bf16 product in TFLOP/s."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy, product = by_events([lambda: target.copy_(source)]), by_events([lambda: x @ x])
    return 2 * source.nbytes / copy.least / 1e3, 2 * 8192**3 / product.least / 1e6
