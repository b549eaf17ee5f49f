"""One rank of a tensor-parallel group, on the meta device.

The model is sharded as by transformers (`tp_plan`), and adapters are placed by the code of a real run. PyTorch's fake
process group simulates the other ranks: communication has the right sizes, but no effect.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed, nn

from peftcore.errors import PeftcoreError
from peftcore.estimating.following import NotFollowed
from peftcore.estimating.step import Step
from peftcore.plugin import ranks, text_config


@contextmanager
def first_of(size: int) -> Iterator[Any]:
    """Make this process the first of `size` ranks within the block, and yield their mesh, or None if `size` is 1.

    Raises:
        PeftcoreError: This process is a rank of a distributed run.
    """
    if size == 1:
        yield None
        return
    if distributed.is_initialized():
        raise PeftcoreError(
            "estimating tp_size needs its own process group, but this process already has one. Estimate before "
            "init_process_group, or in another process"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    check_equal, ranks.check_equal = ranks.check_equal, lambda facts, subject: None  # no other rank exists
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        ranks.check_equal = check_equal
        distributed.destroy_process_group()


def _plans(model: Any, tp_size: int, fsdp_size: int = 1) -> tuple[dict[str, str], ...]:
    """Return transformers' plans for a model: tensor parallelism, expert parallelism, FSDP2."""
    try:
        from transformers.distributed import DistributedConfig

        plans: tuple[dict[str, str], ...] = model._resolve_parallel_plans(
            DistributedConfig(tp_size=tp_size, fsdp_size=fsdp_size)
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise NotFollowed(
            f"tp_size={tp_size}: {type(model).__name__} cannot be sharded ({error}). Tensor parallelism needs a "
            "model from transformers 5.24 or later"
        ) from error
    except ValueError as error:  # no plan for this model
        raise NotFollowed(f"tp_size={tp_size}: {error}") from error
    return plans


def planned_groups(model: nn.Module, step: Step) -> list[tuple[nn.Module, bool]]:
    """Return the modules whose parameters FSDP2 gathers together, and whether it frees them after the forward."""
    plan = _plans(model, step.tp_size, step.copies)[2]
    gathered_layers = [(model.get_submodule(name), style == "free_full_weight") for name, style in plan.items()]
    return [*gathered_layers, (model, False)]


def divide(model: Any, mesh: Any) -> None:
    """Shard a model on the meta device over the ranks of `mesh` by its `tp_plan`; do nothing if `mesh` is None.

    Raises:
        NotFollowed: The model has no plan, or the installed transformers shards models in another way.
    """
    if mesh is None:
        return
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan = _plans(model, mesh.size())[0]
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text_config(model.config), name, None)
        if isinstance(heads, int) and heads % mesh.size():
            raise NotFollowed(f"tp_size={mesh.size()} does not divide the {heads} heads ({name}). Choose a divisor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_tensor_parallelism(model, mesh, plan)
    model.tie_weights()


def refuse_trained(model: nn.Module, size: int) -> None:
    """Raise NotFollowed if parameters of a sharded base are trained: their gradients and state are not estimated."""
    if size > 1 and any(ranks.is_dtensor(p) and p.requires_grad for p in model.parameters()):
        raise NotFollowed(
            f"tp_size={size} can only be estimated with adapters, not when the sharded base is trained. Pass a method"
        )
