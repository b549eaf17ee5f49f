"""Functions that benchmarks share: rows timed in turn, so that a busy machine slows all; peak memory of a child."""

import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import time


def interleaved(rows, seconds, least=5, clock=time.perf_counter):
    """Return the times in ms of each row's calls, as a list by name; every round calls each row once, in random order.

    Args:
        rows: functions to call, by name.
        seconds: how long rounds begin, by the wall clock.
        least: the fewest rounds.
        clock: `time.process_time` where others use the machine, with one thread.
    """
    times = {name: [] for name in rows}
    for call in rows.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < least:
        for name, call in random.sample(list(rows.items()), len(rows)):
            start = clock()
            call()
            times[name].append((clock() - start) * 1e3)
    return times


def last_cache():
    """Return the bytes of the last level of cache, as the kernels read it from the machine, or 64 MB without them."""
    from peftcore.ops.build_info import build_info

    return max(build_info().caches, default=64 << 20)


def beyond_caches(nbytes):
    """Return how many pieces of `nbytes` no cache holds, so that each comes from memory when they are read in turn."""
    return 2 * last_cache() // nbytes + 2


def read_rate(clock=time.perf_counter):
    """Return the GB/s of a plain read of memory that no cache holds."""
    import torch

    words = torch.zeros(max(4 * last_cache(), 256 << 20) // 8, dtype=torch.int64)
    return words.nbytes / min(interleaved({"read": words.sum}, 1, clock=clock)["read"]) / 1e6


def copy_rate():
    """Return the GB/s, read and written, of a copy of memory that no cache holds."""
    import torch

    words = torch.zeros(max(4 * last_cache(), 256 << 20) // 8, dtype=torch.int64)
    target = torch.zeros_like(words)
    return 2 * words.nbytes / min(interleaved({"copy": lambda: target.copy_(words)}, 1)["copy"]) / 1e6


def product_rate(dtype, size=2048, clock=time.perf_counter):
    """Return the GFLOP/s of a large product with a dense weight, by PyTorch or peftcore, whichever is faster."""
    import torch

    from peftcore import ops

    x, weight = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    rows = {
        name: lambda call=call: call(x, weight)
        for name, call in (("PyTorch", torch.nn.functional.linear), ("peftcore", ops.dense_linear))
    }
    with torch.no_grad():
        return 2 * size**3 / min(map(min, interleaved(rows, 1, clock=clock).values())) / 1e6


def floor_of_step(model, inputs, rate):
    """Return the ms that the products of a step take: forward, and for the gradient of the input, with frozen weights.

    Counts the products of one forward pass of `model`: of its linear layers, and of the experts that its tokens are
    sent to.

    Args:
        rate: GFLOP/s, such as `product_rate` returns.
    """
    import torch

    products = []

    def count(module, args, output):
        products.append(args[0].numel() * module.out_features)

    def count_experts(module, args, output):
        weights = sum(p[0].numel() for p in module.parameters() if p.dim() == 3)
        products.append(args[1].numel() * weights)  # (hidden states, experts of each token, their shares)

    handles = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_hook(count))
        elif any(p.dim() == 3 for p in module._parameters.values() if p is not None) and hasattr(module, "num_experts"):
            handles.append(module.register_forward_hook(count_experts))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return 2 * 2 * sum(products) / rate / 1e6


def from_memory(rows, seconds, least=5):
    """Return the times in ms with weights from memory, and those with weights from a cache, each as a list by name.

    A row's calls are one computation over different weights, which together no cache holds (`beyond_caches`). Every
    round takes the next one of each row's calls and times it twice: first its weights come from memory, as in a model,
    then from whatever cache holds them. Rows may share weights: rows that follow one another read different ones.
    """
    first, again = ({name: [] for name in rows} for _ in range(2))
    apart = {name: place * len(calls) // len(rows) for place, (name, calls) in enumerate(rows.items())}
    turn = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or turn < least:
        for name, calls in random.sample(list(rows.items()), len(rows)):
            call = calls[(turn + apart[name]) % len(calls)]
            for times in (first, again):
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
        turn += 1
    return tuple({name: times[1:] for name, times in found.items()} for found in (first, again))


def print_rates(title, found, base, moved, operations=0, floor=None):
    """Print a table of the times of `from_memory`: the shortest and the median, and the ratio of each to row `base`'s.

    Args:
        moved: the least bytes that a call reads and writes, by row, for the column GB/s.
        operations: number of operations of a call, for the column GFLOP/s; 0 leaves the column out.
        floor: ms, for a row of its own.
    """
    first, again = found
    of = spread(first[base])
    rate = f"{'GFLOP/s':>9}" if operations else ""
    print(f"\n{title}; ratios of shortest times, and of medians, to {base}")
    print(f"{'':34}{'min':>9}{'median':>9}{'IQR':>8}{'ratio':>9}{'median':>8}", end="")
    print(f"{'GB/s':>8}{rate}{'in cache':>10}{'ratio':>8}")
    if floor is not None:
        print(f"{'floor':34}{floor:9.3f}{'':17}{floor / of[0]:9.3f}")
    for name, times in first.items():
        low, median, width = spread(times)
        flops = f"{operations / low / 1e6:.0f}" if name != "read" else ""
        print(f"{name:34}{low:9.3f}{median:9.3f}{width:8.3f}{low / of[0]:9.3f}{median / of[1]:8.3f}", end="")
        cached, rate = min(again[name]), f"{flops:>9}" if operations else ""
        print(f"{moved[name] / low / 1e6:8.1f}{rate}{cached:10.3f}{cached / min(again[base]):8.3f}", flush=True)


def note_ratio(what, ratio, peer):
    """Keep the ratio of our figure to the peer's, less being better, for the summary of `make bench` (run_all.py)."""
    if file := os.environ.get("PEFTCORE_RATIOS"):
        with open(file, "a") as out:
            out.write(json.dumps({"what": what, "ratio": ratio, "peer": peer}) + "\n")


def note_pairs(title, times, peer="peft"):
    """Call `note_ratio` with the shortest times of each row of peftcore for which the peer has a row, too."""
    for name, ours in times.items():
        theirs = times.get(name.replace("peftcore", peer))
        if "peftcore" in name and theirs:
            note_ratio(f"{title}: {name}", min(ours) / min(theirs), peer)


def print_surroundings(threads):
    """Print the version of PyTorch, the load of the machine, and the level of the kernels."""
    import torch

    from peftcore.ops.build_info import build_info

    info = build_info()
    print(f"PyTorch {torch.__version__}, {threads} threads, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"extension: {info.cpu_level} ({info.compiler or info.missing_because})")


def keep_freed_memory():
    """Let this process keep freed memory (glibc), so that no row pays for fresh pages, 1.3 µs each, by chance."""
    trim_threshold, mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def map_large_blocks():
    """Map blocks of 64 KiB and more one by one (glibc), so that each is given back as soon as it is freed.

    Otherwise the heap's order decides what is given back, and equal peaks differ by 10 %.
    """
    libc, mmap_threshold = ctypes.CDLL(None), -3
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 2**16)


def give_back_freed_memory():
    """Give freed memory back to the system (glibc), so that the process holds what it uses."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def spread(times):
    """Return (minimum, median, interquartile range)."""
    low, median, high = statistics.quantiles(times, n=4)
    return min(times), median, high - low


def in_child(file, *arguments):
    """Run `file` in a process of its own and return the JSON that it prints last."""
    out = subprocess.run([sys.executable, file, *map(str, arguments)], capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{' '.join(map(str, (file, *arguments)))} ended with {out.returncode}:\n{out.stderr}")
    return json.loads(out.stdout.splitlines()[-1])


def print_peak(step, times=2):
    """Print the peak memory of `times` steps as JSON, for `in_child`."""
    reset_peak()
    for _ in range(times):
        step()
    print(json.dumps({"peak": peak_megabytes()}))


def reset_peak():
    """Reset the peak of this process's memory to what it holds now (Linux)."""
    with open("/proc/self/clear_refs", "w") as out:
        out.write("5")


def peak_megabytes():
    """Return the peak of this process's memory since `reset_peak`."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3


# Environment in which PyTorch, oneDNN, MKL and peftcore use a level's instructions and no newer ones.
LEVELS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "PEFTCORE_CPU_LEVEL": "avx2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "PEFTCORE_CPU_LEVEL": "avx512",
    },
}


def add_level_argument(parser):
    parser.add_argument(
        "--level", choices=LEVELS, help="run all kernels, PyTorch's too, as on a processor that has no more than this"
    )


def run_at(level):
    """Start this program again with the environment of a level, unless it has it; None: the processor as it is."""
    wanted = LEVELS.get(level, {})
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
