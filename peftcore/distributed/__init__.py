"""More than one process, on PyTorch's own engines: FSDP2 for the base, averaged or sharded adapters, DCP for state.

It imports `files`, `quantization` and what is below them.
"""

from peftcore.distributed.clipping import clip_grad_norm_ as clip_grad_norm_
from peftcore.distributed.ending import finish as finish
from peftcore.distributed.sharded_loading import load_sharded as load_sharded
from peftcore.distributed.sharding import divided as divided, shard as shard
from peftcore.distributed.stages import join_stages as join_stages
from peftcore.distributed.starting import start as start
from peftcore.distributed.training_state import TrainingState as TrainingState
