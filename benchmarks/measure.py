"""What benchmarks share: rows timed in turn, so that a busy machine slows all alike, and peak memory of a child."""

import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import time


def interleaved(rows, seconds, least=5, clock=time.perf_counter):
    """Times in ms of each row's calls: every round calls each row once, in random order.

    Args:
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
    """Bytes of the last level of cache, as the kernels read it from the machine; 64 MB where they could not."""
    from peftcore.ops.build_info import build_info

    return max(build_info().caches, default=64 << 20)


def beyond_caches(nbytes):
    """How many pieces of `nbytes` come from memory when they are read in turn: twice the last cache, and one."""
    return 2 * last_cache() // nbytes + 2


def read_rate(clock=time.perf_counter):
    """GB/s of a plain read of what no cache holds."""
    import torch

    words = torch.zeros(max(4 * last_cache(), 256 << 20) // 8, dtype=torch.int64)
    return words.nbytes / min(interleaved({"read": words.sum}, 1, clock=clock)["read"]) / 1e6


def copy_rate():
    """GB/s of a copy of what no cache holds, read and written."""
    import torch

    words = torch.zeros(max(4 * last_cache(), 256 << 20) // 8, dtype=torch.int64)
    target = torch.zeros_like(words)
    return 2 * words.nbytes / min(interleaved({"copy": lambda: target.copy_(words)}, 1)["copy"]) / 1e6


def product_rate(dtype, size=2048, clock=time.perf_counter):
    """GFLOP/s of a large product with a dense weight, by PyTorch or by peftcore, whichever is faster."""
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
    """ms of the products of a step with frozen weights, forward and for the gradient of the input.

    They are those of one forward pass of `model` with these inputs: of its linear layers, and of the experts that its
    tokens are sent to.

    Args:
        rate: GFLOP/s.
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
    """(times, times again) in ms: every round times one of each row's calls, another each time, then it again.

    A row's calls are one computation over different weights, which together no cache holds (`beyond_caches`): so the
    first time weights come from memory, as in a model, and the second from whatever cache holds one. Rows may share
    weights: what the one has just read is not what the next one reads.
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
    """A table of `from_memory`'s times: shortest ones and what they are of those of `base`, medians likewise.

    Args:
        moved: bytes that a call reads and writes at least, by row, for GB/s.
        operations: of a call, for GFLOP/s; 0: nothing that is counted so.
        floor: ms.
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
    """Keep ours over the peer's, less being better, for the summary of `make bench` (run_all.py)."""
    if file := os.environ.get("PEFTCORE_RATIOS"):
        with open(file, "a") as out:
            out.write(json.dumps({"what": what, "ratio": ratio, "peer": peer}) + "\n")


def note_pairs(title, times, peer="peft"):
    """`note_ratio` of the shortest times of each row of peftcore that has the peer's next to it."""
    for name, ours in times.items():
        theirs = times.get(name.replace("peftcore", peer))
        if "peftcore" in name and theirs:
            note_ratio(f"{title}: {name}", min(ours) / min(theirs), peer)


def print_surroundings(threads):
    """PyTorch, how busy the machine is, and the kernels that run."""
    import torch

    from peftcore.ops.build_info import build_info

    info = build_info()
    print(f"PyTorch {torch.__version__}, {threads} threads, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"extension: {info.cpu_level} ({info.compiler or info.missing_because})")


def keep_freed_memory():
    """Freed memory stays with this process (glibc), so that no row pays for fresh pages, 1.3 µs each, by chance."""
    trim_threshold, mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def map_large_blocks():
    """Blocks of 64 KiB and more are mapped and given back one by one (glibc): what is held is what lives.

    Otherwise the heap's order decides what is given back, and equal peaks differ by 10 %.
    """
    libc, mmap_threshold = ctypes.CDLL(None), -3
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 2**16)


def give_back_freed_memory():
    """Freed memory goes back to the system (glibc), so that what is held is what is used."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def spread(times):
    """(minimum, median, interquartile range)."""
    low, median, high = statistics.quantiles(times, n=4)
    return min(times), median, high - low


def in_child(file, *arguments):
    """Run `file` in a process of its own and return the JSON that it prints last."""
    out = subprocess.run([sys.executable, file, *map(str, arguments)], capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"{' '.join(map(str, (file, *arguments)))} ended with {out.returncode}:\n{out.stderr}")
    return json.loads(out.stdout.splitlines()[-1])


def print_peak(step, times=2):
    """Print the peak memory of so many steps as JSON, for `in_child`."""
    reset_peak()
    for _ in range(times):
        step()
    print(json.dumps({"peak": peak_megabytes()}))


def reset_peak():
    """Forget what this process has held at most (Linux)."""
    with open("/proc/self/clear_refs", "w") as out:
        out.write("5")


def peak_megabytes():
    """The most memory this process has held since `reset_peak`."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3


# What a processor that has no more than a level's instructions would run: PyTorch's own kernels, oneDNN's, MKL's, ours.
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
