"""Parameters of divided layers that an adapter trains in place of the base's, such as biases and `modules_to_save`.

The adapter's parameter is whole and equal on every rank, as all its tensors are. The plan's forward computes with this
rank's part of it, and the backward pass joins the gradients of all parts:

    y = layer(x; part(trained parameter), frozen rest)
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from peftcore.engine.adaptation.division import division_of, mesh_of_norm, plan_of
from peftcore.engine.adaptation.rank_agreement import check_random
from peftcore.model.base_modules import OWN_FORWARD, original_class, original_forward
from peftcore.plugin import ranks


def trains_in_parts(module: nn.Module, name: str) -> bool:
    """Return whether an adapter can train the parameter `name` of a layer that a plan divides, or leaves whole."""
    parameter = module._parameters.get(name)
    if parameter is None or not ranks.is_dtensor(found := ranks.behind(parameter)):
        return True
    by_plan = division_of(module) is not None and plan_of(module) is not None
    return by_plan and found.device_mesh.ndim == 1  # else FSDP2 has its parts, too


def follow(modules: Iterable[nn.Module]) -> None:
    """Make the forward of divided layers read whole parameters where an adapter's own are in the base's place."""
    for module in modules:
        slot = _slot(module)
        planned = module.__dict__.get(slot)
        if isinstance(planned, TrainedForward) or plan_of(module) is None:
            continue
        if division_of(module) is not None or mesh_of_norm(module) is not None:
            module.__dict__[slot] = TrainedForward(module, planned)


def unfollow(modules: Iterable[nn.Module]) -> None:
    """Undo `follow`."""
    for module in modules:
        planned = module.__dict__.get(_slot(module))
        if isinstance(planned, TrainedForward):
            module.__dict__[_slot(module)] = planned.planned


class TrainedForward:
    """Forward of a plan's layer that gives the plan's own forward this rank's parts of trained parameters.

    Args:
        module: the layer, with the base's parameters.
        planned: the plan's forward of this instance.
    """

    def __init__(self, module: nn.Module, planned: Any) -> None:
        self.module, self.planned, self._checked = module, planned, False
        self.placements = {
            name: ranks.behind(each).placements  # type: ignore[attr-defined]
            for name, each in module._parameters.items()
            if each is not None and ranks.is_dtensor(ranks.behind(each))
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, mesh = self.module, mesh_of_norm(self.module)
        trained = [name for name in self.placements if not ranks.is_dtensor(ranks.behind(module._parameters[name]))]  # type: ignore[arg-type]
        if mesh is not None:
            trained = [name for name, each in module._parameters.items() if each is not None and each.requires_grad]
        if not trained:
            return self.planned(*args, **kwargs)
        plan = plan_of(module)
        assert plan is not None
        if module.training and not self._checked and not is_dynamo_compiling():
            check_random(args[0].device, mesh or plan["mesh"])
            self._checked = True
        parts = {name: self._part(name, mesh or plan["mesh"]) for name in trained}
        copy: Any = object.__new__(original_class(module))
        copy.__dict__.update(module.__dict__, _parameters={**module._parameters, **parts})
        copy.__dict__["forward"] = MethodType(original_forward(module), copy)
        if mesh is None:
            plan["self"].install_forward(copy, mesh or plan["mesh"])
        return copy.forward(*args, **kwargs)

    def _part(self, name: str, mesh: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        whole = self.module._parameters[name]
        assert whole is not None
        replicated = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
        if name not in self.placements:  # of a norm of single heads, of which every rank has some
            return replicated.to_local(grad_placements=[Partial()])
        return replicated.redistribute(placements=self.placements[name])


def _slot(module: nn.Module) -> str:
    return OWN_FORWARD if OWN_FORWARD in module.__dict__ else "forward"
