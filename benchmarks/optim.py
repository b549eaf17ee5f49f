"""A step of AdamW next to torch's and bitsandbytes', resident and paged, in one run on the same threads.

    python benchmarks/optim.py [--millions 100] [--threads 2] [--seconds 3] [--directory DIR]
        [--only large small paged memory]

Large: six matrices of 100 M fp32 parameters in all. Small: 1,000 tensors of 16 x 1024. Rows of a table are timed in
turn; ratios are of the medians, to torch's fused AdamW. The floor is what must move (28 bytes a parameter, with 8-bit
state 16) over the bandwidth of a scaling in place, measured once in the same run; a step writes less than it reads, so
where writing is slower it may take less.

Paged: a budget that holds everything, and a quarter of the state. For the latter the floor is what must be read and
written, over the best speed at which pages go through the same directory (O_DIRECT, page by page, written and read by
turns, by one, two or four threads). Peak memory is what steps add to that of a process of its own.
"""

import argparse
import ctypes
import logging
import mmap
import os
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import measure
import torch
from torch import nn

from peftcore import optim

logging.disable(logging.WARNING)  # bitsandbytes reports optional packages
warnings.simplefilter("ignore")
PAGE = 4 << 20


def parameters(shapes):
    found = [
        nn.Parameter(torch.empty(shape).normal_(0, 0.02)) for shape in shapes
    ]  # no temporaries: peaks are measured
    for p in found:
        p.grad = torch.empty(p.shape).normal_(0, 0.01)
    return found


def large(millions):
    rows = int(millions * 1e6 / 6 / 4096)
    return [(rows, 4096)] * 6


def bandwidth():
    """Return the GB/s of reading and writing in place, as a step does."""
    x = torch.randn(64 << 20)
    return 2 * x.nbytes / min(measure.interleaved({"scaling": lambda: x.mul_(1.0)}, 1)["scaling"]) / 1e6


def in_huge_pages(count):
    """Return `count` bytes in huge pages, as the optimizer's pages are, which a disk transfers in fewer parts."""
    huge = 2 << 20
    whole = mmap.mmap(-1, count + huge)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        whole.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(whole)) % huge
    return memoryview(whole)[begin : begin + count]


def disk_speed(directory, pages=96):
    """Return the bytes a second of pages that are written and read by turns, by as many threads as are fastest."""
    return max(disk_speed_of(directory, pages, threads) for threads in (1, 2, 4))


def disk_speed_of(directory, pages, threads):
    with tempfile.TemporaryFile(dir=directory) as file, ThreadPoolExecutor(threads) as pool:
        descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT)
        os.posix_fallocate(descriptor, 0, pages * PAGE)
        random = os.urandom(PAGE)

        def go(first, reads):
            buffer = in_huge_pages(PAGE)
            buffer[:] = random
            for page in range(first, pages, threads):
                os.pwritev(descriptor, [buffer], page * PAGE)
                if reads:
                    os.preadv(descriptor, [buffer], (page + pages // 2) % pages * PAGE)

        def all_pages(reads):
            began = time.perf_counter()
            list(pool.map(go, range(threads), [reads] * threads))
            return time.perf_counter() - began

        all_pages(reads=False)
        seconds = all_pages(reads=True)
        os.close(descriptor)
    return 2 * pages * PAGE / seconds


def table(title, rows, floor, seconds):
    print(f"\n{title}\n{'':34}{'min':>9}{'median':>9}{'IQR':>8}   of torch fused\n{'floor':34}{floor:9.2f}")
    found = {name: measure.spread(times) for name, times in measure.interleaved(rows, seconds, least=3).items()}
    base = found["torch fused"][1]
    for name, (least, median, width) in found.items():
        print(f"{name:34}{least:9.2f}{median:9.2f}{width:8.2f}   {median / base:8.3f}", flush=True)
    for ours, peer in (("AdamW", "torch fused"), ("AdamW8bit", "bitsandbytes AdamW8bit")):
        if peer in found:
            measure.note_ratio(f"{ours}, {title}", found[f"peftcore {ours}"][1] / found[peer][1], peer)


def resident(shapes, title, options, peers=True):
    """Time steps of resident optimizers. They share parameters and gradients, which would not fit once for each."""
    params = parameters(shapes)
    count = sum(p.numel() for p in params)
    rows = {
        "torch fused": torch.optim.AdamW(params, fused=True),
        "peftcore AdamW": optim.AdamW(params),
        "peftcore PagedAdamW, all resident": optim.PagedAdamW(params, budget=count * 8 + 64 * PAGE),
        "peftcore AdamW8bit": optim.AdamW8bit(params),
    }
    if peers:
        import bitsandbytes as bnb

        rows["torch foreach"] = torch.optim.AdamW(params, foreach=True)
        rows["bitsandbytes AdamW"] = bnb.optim.AdamW(params, optim_bits=32)
        rows["bitsandbytes AdamW8bit"] = bnb.optim.AdamW8bit(params)
    table(title, {name: row.step for name, row in rows.items()}, 28 * count / options.bandwidth / 1e6, options.seconds)


def paged(options):
    params = parameters(large(options.millions))
    count = sum(p.numel() for p in params)
    state = count * 8
    optimizer = optim.PagedAdamW(params, budget=state // 4, directory=options.directory)
    for _ in range(2):
        optimizer.step()
    times, speeds, before = [], [], optimizer.paging()
    for _ in range(3):
        speeds.append(disk_speed(options.directory))
        began = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - began)
    after = optimizer.paging()
    moved = (after.read - before.read + after.written - before.written) / 3
    print(f"\na budget of a quarter of {state / 1e6:,.0f} MB, pages in {options.directory}")
    print(f"disk at best {max(speeds) / 1e6:,.0f} MB/s (from {min(speeds) / 1e6:,.0f})")
    print(f"moved {moved / 1e6:,.0f} MB a step; three quarters read and written are {1.5 * state / 1e6:,.0f} MB")
    least, floor = min(times), moved / max(speeds)
    print(f"step {least:.2f} s (up to {max(times):.2f}), floor {floor:.2f} s: {least / floor:.2f}")
    print(f"waiting {(after.waiting - before.waiting) / 3:.2f} s a step", flush=True)


def child(kind, millions, directory):
    """Print what steps add to this process's peak memory; a paged optimizer keeps a quarter of its state resident."""
    import json

    params = parameters(large(millions))
    state = sum(p.numel() for p in params) * 8

    def make(params):
        if kind == "fused":
            return torch.optim.AdamW(params, fused=True)
        return optim.PagedAdamW(params, budget=state // 4, directory=directory)

    make(parameters([(4,)])).step()  # what the first step of all loads
    optimizer = make(params)
    measure.reset_peak()
    before = measure.peak_megabytes()
    for _ in range(2):
        optimizer.step()
    print(json.dumps({"added": measure.peak_megabytes() - before, "budget": state / 4e6}))


def memory(options):
    found = {
        kind: measure.in_child(__file__, "--child", kind, "--millions", 24, "--directory", options.directory)
        for kind in ("fused", "paged")
    }
    print("\npeak memory that steps add, 24 M parameters")
    print(f"torch fused {found['fused']['added']:,.0f} MB, peftcore PagedAdamW "
          f"{found['paged']['added']:,.0f} MB with a budget of {found['paged']['budget']:,.0f} MB")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--directory", default="/var/tmp")
    parser.add_argument("--only", nargs="+", default=["large", "small", "paged", "memory"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        return child(options.child, options.millions, options.directory)
    measure.print_surroundings(options.threads)
    options.bandwidth = bandwidth()
    print(f"memory {options.bandwidth:.1f} GB/s")
    if "large" in options.only:
        resident(large(options.millions), f"{options.millions:g} M parameters in 6 matrices (ms)", options)
    if "small" in options.only:
        resident([(16, 1024)] * 1000, "1,000 tensors of 16 x 1024 (ms)", options)
    if "paged" in options.only:
        paged(options)
    if "memory" in options.only:
        memory(options)


if __name__ == "__main__":
    main()
