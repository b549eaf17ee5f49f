"""More than one process, on PyTorch's own engines: FSDP2 for the base, averaged or sharded adapters, DCP for state."""

from peftcore.parallel.clipping import clip_grad_norm_ as clip_grad_norm_
from peftcore.parallel.ending import finish as finish
from peftcore.parallel.sharded_loading import load_sharded as load_sharded
from peftcore.parallel.sharding import (
    blocks as blocks,
    check_ranks as check_ranks,
    divided as divided,
    give_adapters as give_adapters,
    refuse_between_blocks as refuse_between_blocks,
    shard as shard,
)
from peftcore.parallel.stages import join_stages as join_stages
from peftcore.parallel.starting import start as start
from peftcore.parallel.training_state import TrainingState as TrainingState
