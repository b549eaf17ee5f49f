"""Run adapters by swapping a module's class for one whose forward calls them, safely across threads.

It imports `model` and what is below it, and nothing else of the engine.

    adapted.py                    the swapped class, whose forward runs a chain (chain.py) under a lock (concurrency.py)
    ancestors.py                  the modules around adapted ones, whose calls take the same lock
    per_sample.py                 batches whose samples have different adapters
    tensor_parallel.py            how ranks shard a layer; tensor_parallel_forward.py runs adapters on it
    expert_parallel.py            experts that are sharded over the ranks
    fused_forward.py              modules computed by one operator; fused_attention.py does so for attention
    frozen_linear.py              frozen layers without adapters, faster than in PyTorch
"""

from peftcore.engine.adaptation import wrapped_weights  # noqa: F401  # registers the weight format of other libraries' tensors
