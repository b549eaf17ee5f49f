"""Training in more than one process, on PyTorch's own engines: FSDP2 for the base, averaged or sharded adapters, DCP.

It imports `files`, `quantization` and what is below them. Public names: `peftcore.shard`, `load_sharded` and
`TrainingState`; here `start`, `finish`, `join_stages` and `clip_grad_norm_`; and `divided` and `blocks` for `estimate`.
"""

from peftcore.distributed.gradients import clip_grad_norm_ as clip_grad_norm_
from peftcore.distributed.process_group import finish as finish, start as start
from peftcore.distributed.sharded_loading import load_sharded as load_sharded
from peftcore.distributed.sharding import divided as divided, shard as shard
from peftcore.distributed.stages import join_stages as join_stages
from peftcore.distributed.training_state import TrainingState as TrainingState
from peftcore.engine.replicas import blocks as blocks
