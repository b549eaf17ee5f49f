"""Ray Train on two workers: each writes what it found to the folder in `argv`; worker 1 is killed once."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import ray.train.torch


def train_and_kill_one() -> None:
    import torch.distributed.checkpoint as dcp
    from torch import distributed

    import peftcore
    from support.ranks import engines, work

    rank, first = distributed.get_rank(), not list(Path(folder).glob("first *"))
    found: object
    if first:
        found = engines.table("Ray Train", folder)
    else:
        found = {}
        for name, case in engines.METHODS.items():
            alone, (model, spread, optimizer) = work.adapted(case), engines.begun("Ray Train", case)
            state = {"training": peftcore.TrainingState(spread, optimizer)}
            dcp.load(state, checkpoint_id=f"{folder}/{name}/state")
            work.backward_here(spread, model)
            optimizer.step()
            of_alone = engines.optimizer_of(alone)
            for _ in range(engines.STEPS):
                wanted = engines.step_alone(alone, of_alone)
            found[name] = work.farthest(work.values(model), wanted)
    distributed.barrier()
    Path(folder, f"{'first' if first else 'again'} {rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    if first and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


if __name__ == "__main__":
    folder = sys.argv[1]
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path[1:] + sys.path[:1])}})
    workers = ray.train.ScalingConfig(num_workers=2)
    run = ray.train.RunConfig(storage_path=f"{folder}/ray", failure_config=ray.train.FailureConfig(max_failures=1))
    ray.train.torch.TorchTrainer(train_and_kill_one, scaling_config=workers, run_config=run).fit()
