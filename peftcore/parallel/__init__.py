"""More than one process, on PyTorch's own engines: FSDP2 for the base, averaged or sharded adapters, DCP for state."""

from peftcore.parallel.clipping import clip_grad_norm_
from peftcore.parallel.ending import finish
from peftcore.parallel.sharded_loading import load_sharded
from peftcore.parallel.sharding import blocks, check_ranks, divided, give_adapters, refuse_between_blocks, shard
from peftcore.parallel.stages import join_stages
from peftcore.parallel.starting import start
from peftcore.parallel.training_state import TrainingState

__all__ = [
    "TrainingState",
    "blocks",
    "check_ranks",
    "clip_grad_norm_",
    "divided",
    "finish",
    "give_adapters",
    "join_stages",
    "load_sharded",
    "refuse_between_blocks",
    "shard",
    "start",
]
