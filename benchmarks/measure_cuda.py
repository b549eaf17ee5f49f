"""Functions that benchmarks on a GPU share: rows timed in turn, calls queued without waiting, and the card's rates."""

import torch


def milliseconds(rows, rounds=15, least_ms=10):
    """Return the ms of each row's call, as a list by name, from rounds of many calls between two events."""

    def once(call, count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    counts = {}
    for name, call in rows.items():
        once(call, 5)
        counts[name] = max(1, round(least_ms / once(call, 5)))
    times = {name: [] for name in rows}
    for _ in range(rounds):
        for name, call in rows.items():
            times[name].append(once(call, counts[name]))
    return times


def rates():
    """Return (GB/s of a device copy, TFLOP/s of a cuBLAS product)."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    found = milliseconds({"copy": lambda: target.copy_(source), "product": lambda: x @ x})
    return 2 * source.nbytes / min(found["copy"]) / 1e6, 2 * 8192**3 / min(found["product"]) / 1e9
