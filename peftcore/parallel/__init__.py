"""More than one process, on PyTorch's own engines: FSDP2 for the base, averaged or sharded adapters, DCP for state."""

from peftcore.parallel.ending import finish
from peftcore.parallel.loading import load_sharded
from peftcore.parallel.sharding import check_ranks, give_adapters, refuse_between_blocks, shard
from peftcore.parallel.state import TrainingState

__all__ = ["TrainingState", "check_ranks", "finish", "give_adapters", "load_sharded", "refuse_between_blocks", "shard"]
