"""Base of all optimizers: collects the tensors of a step and passes them to one operator call.

State is stored in tensors of `self.state`, or in pages (`paging.py`). In both cases `state_dict` has the same form as
torch's: `step` is an fp32 tensor, and moments have the parameter's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from peftcore.ops import optim as ops
from peftcore.ops.dynamic8 import block_count, decode, encode
from peftcore.ops.optim_rules import Rule
from peftcore.ops.weight import DTYPES
from peftcore.optim.batch import Batch, local, sharded_as


def is_among_largest(moments: Sequence[Tensor], keep: float) -> Tensor:
    """Return a mask of the elements that are among the largest fraction `keep` of magnitudes in each of `moments`."""
    is_largest = torch.ones_like(moments[0], dtype=torch.bool)
    for values in moments:
        count = min(values.numel(), max(1, round(keep * values.numel())))
        indices = values.abs().flatten().topk(count, sorted=False).indices
        is_largest &= torch.zeros_like(is_largest).flatten().index_fill_(0, indices, True).view(is_largest.shape)
    return is_largest


def _moments_of(saved: dict[str, Any], name: str, param: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the moments `name` in a parameter's saved state, and their scales if they are in 8 bits.

    Raises:
        ValueError: moments and scales do not match the parameter or each other.
    """
    value, scales = saved.get(name), f"{name}_absmax"
    absmax: Tensor | None = saved.get(scales)
    if not isinstance(value, Tensor):
        raise ValueError(f"the saved state has no tensor '{name}' (it has: {', '.join(map(str, saved))})")
    value = local(value)
    if value.shape != param.shape:
        raise ValueError(f"saved '{name}' has shape {list(value.shape)}, but the parameter has {list(param.shape)}")
    if absmax is None:
        if not value.is_floating_point():
            raise ValueError(f"saved '{name}' is {value.dtype}, but the state has no '{scales}' for its codes")
        return value, None
    if absmax.numel() != block_count(param.numel()):
        raise ValueError(
            f"saved '{scales}' has {absmax.numel()} scales, but {param.numel()} elements need "
            f"{block_count(param.numel())}"
        )
    if value.dtype != torch.uint8:
        raise ValueError(f"saved '{name}' is {value.dtype}, but state with '{scales}' must be torch.uint8")
    return value, absmax


class FusedOptimizer(Optimizer):
    """Optimizer with one operator call per step and device. Subclasses define `rule` and the scalars of an update.

    Args:
        maximize: maximize the objective, as in torch's optimizers.
        stochastic_rounding: round 16-bit parameters up or down at random, so that small updates are not lost.
        seed: seed of stochastic rounding. The rounding depends only on the seed, the parameter's index and the step.

    Raises:
        TypeError: a parameter is not float32, float16 or bfloat16.
        RuntimeError: a gradient is sparse.
    """

    rule: Rule
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        options = {"maximize": maximize, "stochastic_rounding": stochastic_rounding, "seed": seed}
        super().__init__(params, {**defaults, **options})

    def _scalars(self, group: dict[str, Any], step: int, factor: float) -> tuple[float, ...]:
        """Return the rule's scalars for the `step`-th update of a group's parameters."""
        raise NotImplementedError

    # --- state: in tensors here, in pages in PagedOptimizer

    def _new_state(self, param: Tensor) -> None:
        for name, values in zip(self.rule.plane_names, self.rule.new_state(local(param)), strict=True):
            self.state[param][name] = values

    def _get_state(self, param: Tensor) -> dict[str, Tensor]:
        return {name: self.state[param][name] for name in self.rule.plane_names}

    def _set_state(self, param: Tensor, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.state[param][name] = value.to(local(param).device, copy=True).contiguous()

    def _update_of(self, batch: Batch) -> Callable[[], None]:
        """Return a function that only calls the operator on `batch`."""
        state = [values[name] for name in self.rule.plane_names for values in batch.states]
        return partial(ops.optim_step_, batch.params, batch.grads, state, self.rule.name, *batch.updates())

    # --- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Return the result of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and found_inf.item():
            return loss
        batches = self._batches(1.0 if scale is None else 1.0 / float(scale))
        updates = [self._update_of(batch) for batch in batches]
        # Steps are counted before the operator runs: a KeyboardInterrupt is raised when it returns, after the step is
        # done.
        self._count(batches, 1)
        try:
            for batch, update in zip(batches, updates, strict=True):
                try:
                    update()
                finally:
                    batch.copy_back()  # also after an error, for pages that have been updated
        except Exception:
            self._count(batches, -1)
            raise
        return loss

    def _count(self, batches: list[Batch], steps: int) -> None:
        """Add `steps` to the step counts of all parameters in `batches`: 1, or -1 after a failed step."""
        for batch in batches:
            for state in batch.states:
                state["step"] += steps

    def _batches(self, unscale: float) -> list[Batch]:
        batches: dict[torch.device, Batch] = {}
        ordinal = 0  # index among the parameters of all groups
        for group in self.param_groups:
            factor = -unscale if group["maximize"] else unscale
            seed = int(group["seed"]) << 32 if group["stochastic_rounding"] else None
            for param in group["params"]:
                stream = -1 if seed is None else seed + ordinal
                ordinal += 1
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients. Use torch.optim.SparseAdam"
                    )
                state = self.state.get(param)
                if not state:
                    self._create_state(param)
                    state = self.state[param]
                step = state["step"] + 1
                device = param.device
                batch = batches.get(device)
                if batch is None:
                    batch = batches[device] = Batch()
                row = batch.row_numbers.get((id(group), step))
                if row is None:
                    row = batch.add_row(id(group), step, self._scalars(group, step, factor))
                batch.add(param, state, grad, row, stream)
        return list(batches.values())

    def _create_state(self, param: Tensor) -> None:
        if param.dtype not in DTYPES:
            raise TypeError(
                f"{type(self).__name__} supports float32, float16 and bfloat16 parameters, found {param.dtype}"
            )
        try:
            self._new_state(param)
        except BaseException:
            self.state.pop(param, None)
            raise
        self.state[param]["step"] = 0

    # --- saving and loading

    def _numbered_params(self) -> Iterator[tuple[int, Tensor]]:
        yield from enumerate(p for group in self.param_groups for p in group["params"])

    def _export_state(self, param: Tensor) -> dict[str, Tensor]:
        values = self._get_state(param)
        if param is not local(param):
            if any(plane.is_coded for plane in self.rule.planes):
                raise NotImplementedError("cannot save the 8-bit state of a sharded parameter. Use a 32-bit optimizer")
            values = {name: sharded_as(param, value) for name, value in values.items()}
        return {"step": torch.tensor(float(self.state[param]["step"])), **values}

    def _convert_saved_state(self, param: Tensor, saved: dict[str, Any]) -> dict[str, Tensor]:
        """Convert the saved state of one parameter, in 32 or 8 bits, to the form of this optimizer.

        Raises:
            ValueError: the state does not match the parameter.
        """
        if saved.get("max_exp_avg_sq") is not None:
            raise ValueError(
                f"{type(self).__name__} does not support amsgrad, but the saved state uses it. Continue with "
                "torch.optim.AdamW(amsgrad=True)"
            )
        values: dict[str, Tensor] = {}
        for plane in self.rule.planes:
            if plane.elements != 1:
                continue  # scales are handled together with their codes
            name, scales = plane.name, f"{plane.name}_absmax"
            value, absmax = _moments_of(saved, name, local(param))
            if plane.is_coded and absmax is None:
                value, absmax = encode(value.float().flatten(), plane.map)
            elif not plane.is_coded and absmax is not None:
                value = decode(value.flatten(), absmax, plane.map)
            if plane.is_coded and absmax is not None:
                values[scales] = absmax.float().flatten()
            values[name] = value.to(plane.dtype).reshape(local(param).shape)
        return values

    def _install_state(self, param: Tensor, values: dict[str, Tensor], step: int) -> None:
        if not self.state.get(param):
            self._create_state(param)
        self._set_state(param, values)
        self.state[param]["step"] = step

    def keep_largest(self, param: Tensor, keep: float) -> None:
        """Zero the moments of `param`, except for elements whose moments are all among the largest fraction `keep`.

        For a sharded parameter, each rank keeps this fraction of its shard.
        """
        state, planes = self._get_state(param), [plane for plane in self.rule.planes if plane.elements == 1]
        values = []
        for plane in planes:
            value = state[plane.name]
            if plane.is_coded:
                value = decode(value.flatten(), state[f"{plane.name}_absmax"], plane.map).view_as(value)
            values.append(value)
        if values:
            is_largest = is_among_largest(values, keep)
            state |= {plane.name: state[plane.name].where(is_largest, plane.initial) for plane in planes}
            self._set_state(param, state)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's form: `state` by parameter number, and `param_groups`.

        Paged state is read in full.
        """
        packed = super().state_dict()
        owners = dict(self._numbered_params())
        packed["state"] = {
            key: self._export_state(owners[key]) if key in owners else value for key, value in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state and groups from `state_dict`, in 32 or 8 bits, or from torch's optimizer.

        Raises:
            ValueError: the saved state does not match these parameters. The optimizer is left unchanged.
        """
        groups = state_dict["param_groups"]
        for group in groups:
            if group.get("amsgrad"):
                raise ValueError(
                    f"{type(self).__name__} does not support amsgrad, but the saved state uses it. Continue with "
                    "torch.optim.AdamW(amsgrad=True)"
                )
        saved_sizes = [len(group["params"]) for group in groups]
        sizes = [len(group["params"]) for group in self.param_groups]
        if saved_sizes != sizes:
            raise ValueError(
                f"the saved state has groups of {saved_sizes} parameters, but this optimizer has groups of {sizes}"
            )
        keys = [key for group in groups for key in group["params"]]
        owners = {key: param for key, (_, param) in zip(keys, self._numbered_params(), strict=True)}
        loaded_state = {}
        for key, saved in state_dict["state"].items():
            if key in owners:
                try:
                    loaded_state[owners[key]] = self._convert_saved_state(owners[key], saved), int(saved.get("step", 0))
                except ValueError as error:
                    raise ValueError(
                        f"the saved state of parameter {key} does not match the parameter: {error}"
                    ) from None
        super().load_state_dict({**state_dict, "state": {}})  # torch would cast moments to the parameter's dtype
        for param, (values, step) in loaded_state.items():
            self._install_state(param, values, step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
