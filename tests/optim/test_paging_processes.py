"""Paged state beside forks and threads, and what is left when it is gone."""

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from support.paged_optimizers import PAGE, paged, parameters, step
from torch import nn

from peftcore import ops, optim

pytestmark = pytest.mark.skipif(ops.extension is None, reason="no _C")


def test_a_fork_is_refused_and_does_not_harm_its_parent():
    params, wanted = parameters(6), parameters(6)
    optimizer, resident = paged(params, 2 * PAGE), optim.AdamW(wanted)
    step(optimizer, params, 0)
    step(resident, wanted, 0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            step(optimizer, params, 1)
        except RuntimeError as error:
            status = 0 if "from which this one was forked" in str(error) else 2
        del optimizer
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    step(optimizer, params, 1)
    step(resident, wanted, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))


def test_threads_with_optimizers_of_their_own_and_one_that_only_looks():
    wanted = parameters(6)
    resident = optim.AdamW(wanted)
    for number in range(20):
        step(resident, wanted, number)
    found = [parameters(6) for _ in range(3)]
    optimizers = [paged(params, 2 * PAGE) for params in found]
    ends = threading.Event()

    def work(params, optimizer):
        for number in range(20):
            step(optimizer, params, number)

    def look():
        while not ends.is_set():
            for optimizer in optimizers:
                optimizer.evict()

    threads = [threading.Thread(target=work, args=pair) for pair in zip(found, optimizers, strict=True)]
    watcher = threading.Thread(target=look)
    for thread in [*threads, watcher]:
        thread.start()
    for thread in threads:
        thread.join()
    ends.set()
    watcher.join()
    for params in found:
        assert all(torch.equal(p, q) for p, q in zip(params, wanted, strict=True))


def resident_memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_no_leak_over_ten_thousand_steps():
    params = parameters(4)
    optimizer = paged(params, 2 * PAGE)
    for p in params:
        p.grad = torch.randn(p.shape)
    for _ in range(500):
        optimizer.step()
    gc.collect()  # what earlier tests left, which may hold files
    memory, descriptors = resident_memory(), len(os.listdir("/proc/self/fd"))
    for _ in range(10_000):
        optimizer.step()
    assert resident_memory() - memory < 2 << 20
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_an_optimizer_that_is_gone_gives_its_memory_and_file_back():
    for _ in range(3):
        params = [nn.Parameter(torch.zeros(1 << 20))]
        optimizer = optim.PagedAdamW(params, budget="8MiB", directory="/tmp")
        step(optimizer, params, 0)
        descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        del optimizer
        assert len(os.listdir("/proc/self/fd")) == descriptors - 1 and threading.active_count() == threads
