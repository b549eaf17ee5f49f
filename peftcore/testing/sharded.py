"""Check of a method on two ranks with a sharded base (FSDP2), compared with one process.

The check starts processes, which takes some seconds; a plugin's test that uses it should be marked as slow.
"""

from __future__ import annotations

import multiprocessing
import queue
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.errors import PluginError
from peftcore.plugin import ranks, sharded
from peftcore.plugin.registry import registry
from peftcore.testing.case import Case, logits, loss_of, same
from peftcore.testing.families import family_of

Shards = Literal["replicate", "shard"]
COUNT = 2

if TYPE_CHECKING:
    Results = multiprocessing.Queue[str | None]


def check_sharded(config: Any, *, family: str = "Llama", adapters: Shards = "replicate", seconds: float = 300) -> None:
    """Train the method of `config` for one step on two ranks, save the adapter, and compare with one process.

    Args:
        config: config of a method that is installed, or whose importable module has the plugin's hooks.
        family: one of `FAMILIES`.
        adapters: see `peftcore.shard`.
        seconds: timeout in seconds.

    Raises:
        AssertionError: a rank computes or saves other values than a single process, or times out.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        arguments = (folder, config, family, adapters, results)
        processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(COUNT)]
        for process in processes:
            process.start()
        error: str | None = "the check was interrupted"
        try:
            error = first_error(results, seconds)
        finally:
            for process in processes:
                if error is None:
                    process.join(10)
                if process.is_alive():
                    process.kill()  # after an error in one rank, the other rank keeps waiting for it
        assert error is None, error


def first_error(results: Results, seconds: float) -> str | None:
    """Return the first error that a rank puts into the queue `results`; None if all ranks put None."""
    end = time.monotonic() + seconds
    for _ in range(COUNT):
        try:
            error: str | None = results.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            return f"a rank did not finish within {seconds:g} s"
        if error is not None:
            return error
    return None


def _rank(rank: int, folder: str, config: Any, family: str, adapters: Shards, results: Results) -> None:
    try:
        torch.set_num_threads(1)
        store = f"file://{folder}/store"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=COUNT)
        _work(folder, config, family, adapters)
        results.put(None)
    except BaseException:
        results.put(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _work(folder: str, config: Any, family: str, adapters: Shards) -> None:
    _install(config)
    case = Case(config, family_of(family))
    inputs = case.inputs(rows=2 * COUNT)
    batch_of_rank = {name: value.chunk(COUNT)[ranks.rank()] for name, value in inputs.items()}
    single_model, sharded_model = case.model().train(), case.model().train()
    peftcore.shard(sharded_model, adapter_placement=adapters)
    for model, batch in ((single_model, inputs), (sharded_model, batch_of_rank)):
        (loss_of(model, batch) + peftcore.extra_loss(model)).backward()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, foreach=False)
        optimizer.step()
        peftcore.after_step(model, 1, 2, optimizer=optimizer)
    wanted = dict(adapter_parameters(single_model, "default"))
    sharded.reshard(sharded_model)
    for name, parameter in adapter_parameters(sharded_model, "default"):
        limit = 1e-4 * wanted[name].abs().max().item() + 1e-6
        same(sharded.whole(parameter), wanted[name], f"'{name}' after a step", limit)
    peftcore.save(sharded_model, Path(folder, "adapter"))
    distributed.barrier()
    loaded = peftcore.load(case.base(), Path(folder, "adapter"))
    actual = logits(loaded, inputs)
    expected = logits(single_model.eval(), inputs)
    same(actual, expected, "output of the saved adapter", 1e-3 * expected.abs().max().item())


def _install(config: Any) -> None:
    """Register the plugin of `config` if it is imported but not installed, as in the plugin's tests."""
    try:
        registry.method_of_config(config)
    except PluginError:
        module = sys.modules[type(config).__module__]
        (method,) = module.peftcore_methods()
        registry.register(method.name, module)
