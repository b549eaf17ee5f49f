"""The one mechanism: a module's class is swapped for one whose forward runs adapters, and threads call it safely.

It imports `model` and what is below it, and nothing else of the engine.

    adapted.py                    the swapped class, whose forward runs a chain (chain.py) under a lock (concurrency.py)
    ancestors.py                  the modules around adapted ones, whose calls take the same lock
    per_sample.py                 one batch whose samples have different adapters
    tensor_parallel.py            how ranks divide a layer; tensor_parallel_forward.py runs adapters on it
    expert_parallel.py            experts of which each rank has some
    fused_forward.py              modules that one operator computes; fused_attention.py for attention
    frozen_linear.py              frozen layers without adapters, multiplied faster than by PyTorch
"""

from peftcore.engine.adaptation import wrapped_weights  # noqa: F401  # it registers the format of other libraries' tensors
