"""Streams of cases: many, without counters, and captured in graphs."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from card.table import Place

STREAMS_WITH_COUNTERS = 128  # kStreams of csrc/common/cuda_tickets.cu
_made: list[torch.cuda.Stream] = []


def new_stream() -> torch.cuda.Stream:
    """Return a stream of its own; PyTorch's are shared after the 32nd."""
    handle = ctypes.c_void_p()
    error = torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(handle))
    assert int(error) == 0, f"cudaStreamCreate failed: {error}"
    return torch.cuda.ExternalStream(handle.value)


def _uses_a_counter(place: Place) -> None:
    from peftcore import ops

    weight = ops.quantize_4bit(place.normal(8, 64, seed=1), double_quant=True)
    factors = place.normal(1, 64, seed=2), place.normal(8, 1, seed=3)
    torch.ops.peftcore.lora_linear(
        place.normal(1, 64, seed=4, dtype=torch.half), *weight.operands(), None, *factors, 1.0
    )


@contextlib.contextmanager
def without_counters(place: Place) -> Iterator[None]:
    """Run on a stream that has no counters for sums of several blocks, since others have them all."""
    if place.emulated:
        from card.emulated import library

        library().emulator_use_stream(1)
        try:
            yield
        finally:
            library().emulator_use_stream(0)
        return
    while len(_made) <= STREAMS_WITH_COUNTERS:
        _made.append(new_stream())
        with torch.cuda.stream(_made[-1]):
            _uses_a_counter(place)
    torch.cuda.synchronize()
    with torch.cuda.stream(_made[-1]):
        yield
    torch.cuda.synchronize()


def captured(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Return a graph of the call, which was run before, and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results
