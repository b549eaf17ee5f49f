"""Distributed training: FSDP2 for the base, replicated or sharded adapters, checkpoints with DCP.

It imports `files`, `quantization` and what is below them. `peftcore` exports `shard`, `load_sharded` and
`TrainingState`. This package exports `start`, `finish`, `join_stages` and `clip_grad_norm_`, and for `estimate` also
`divided` and `blocks`.
"""

from peftcore.distributed.gradients import clip_grad_norm_ as clip_grad_norm_
from peftcore.distributed.process_group import finish as finish, start as start
from peftcore.distributed.sharded_loading import load_sharded as load_sharded
from peftcore.distributed.sharding import divided as divided, shard as shard
from peftcore.distributed.stages import join_stages as join_stages
from peftcore.distributed.training_state import TrainingState as TrainingState
from peftcore.engine.replicas import blocks as blocks
