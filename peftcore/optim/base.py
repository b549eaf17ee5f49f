"""What all optimizers here share: they gather a step's tensors and hand them to one operator call.

State lies in tensors of `self.state`, or in pages (`paging.py`); `state_dict` has the same form either way,
torch's own: `step` as an fp32 tensor and moments in the parameter's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftcore.ops import optim as ops

_PLAIN = (Tensor, nn.Parameter)


def local(t: Tensor) -> Tensor:
    """A DTensor's own shard; any other tensor itself."""
    return t if type(t) in _PLAIN or not hasattr(t, "to_local") else t.to_local()


class FusedOptimizer(Optimizer):
    """One operator call a step and device. A subclass has a `rule`, names of its `planes` and `_row`.

    Raises:
        TypeError: a parameter that is not float32, float16 or bfloat16.
        RuntimeError: a sparse gradient.
    """

    rule: str
    planes: tuple[str, ...]  # of a parameter's state, in the order of ops.PLANES
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    def _row(self, group: dict[str, Any], step: int, factor: float) -> list[float]:
        """The scalars of the `step`-th update of parameters of a group."""
        raise NotImplementedError

    # --- state: in tensors here, in pages in PagedOptimizer

    def _new_state(self, param: Tensor) -> None:
        own = local(param)
        for name, size in zip(self.planes, ops.PLANES[self.rule], strict=True):
            if size == 0:
                value = torch.zeros(ops.blocks_of(own.numel()), dtype=torch.float32, device=own.device)
            else:
                zero = 127 if size == 1 and name == "exp_avg" else 0  # the signed map's code of 0
                dtype = torch.uint8 if size == 1 else torch.float32
                value = torch.full(own.shape, zero, dtype=dtype, device=own.device)
            self.state[param][name] = value

    def _get_state(self, param: Tensor) -> dict[str, Tensor]:
        return {name: self.state[param][name] for name in self.planes}

    def _set_state(self, param: Tensor, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.state[param][name] = value.to(local(param).device, copy=True).contiguous()

    def _update(self, params: list[Tensor], owners: list[Tensor], *step: Any) -> None:
        grads, scalars, steps, rows, streams = step
        state = [self.state[p][name] for name in self.planes for p in owners]
        ops.optim_step_(params, grads, state, self.rule, scalars, steps, rows, streams)

    # --- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and found.item():
            return loss
        batches = self._batches(1.0 if scale is None else 1.0 / float(scale))
        for batch in batches:
            batch.run(self)
        for batch in batches:  # a step counts when all of it is done
            batch.count(self)
        self._stepped()
        return loss

    def _stepped(self) -> None:
        """After a step. (`step` itself cannot be overridden in a base of several: torch sets it on each class.)"""

    def _batches(self, unscale: float) -> list[_Batch]:
        batches: dict[torch.device, _Batch] = {}
        ordinal = 0
        for group in self.param_groups:
            factor = -unscale if group["maximize"] else unscale
            key = ordinal + (int(group["seed"]) << 32) if group["stochastic_rounding"] else None
            for i, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    raise RuntimeError(f"{type(self).__name__} takes no sparse gradients; use torch.optim.SparseAdam")
                if not self.state.get(param):
                    self._admit(param)
                state = self.state[param]
                own, grad = (param, grad) if type(param) in _PLAIN else (local(param), local(grad))
                device = own.device
                batch = batches.get(device)
                if batch is None:
                    batch = batches[device] = _Batch()
                batch.add(self, param, own, grad, group, state["step"] + 1, factor, -1 if key is None else key + i)
            ordinal += len(group["params"])
        return list(batches.values())

    def _admit(self, param: Tensor) -> None:
        if param.dtype not in ops.DTYPES:
            raise TypeError(
                f"{type(self).__name__} updates float32, float16 and bfloat16 parameters, found {param.dtype}"
            )
        try:
            self._new_state(param)
        except BaseException:
            self.state.pop(param, None)
            raise
        self.state[param]["step"] = 0

    # --- saving and loading

    def _owners(self) -> Iterator[tuple[int, Tensor]]:
        yield from enumerate(p for group in self.param_groups for p in group["params"])

    def _exported(self, param: Tensor) -> dict[str, Tensor]:
        values = self._get_state(param)
        if param is not local(param):
            if self.rule == "adamw_8bit":
                raise NotImplementedError("8-bit state of a sharded parameter cannot be saved; use 32 bits")
            from torch.distributed.tensor import DTensor

            place = {"device_mesh": param.device_mesh, "placements": param.placements}
            sizes = {"shape": param.shape, "stride": param.stride()}
            values = {k: DTensor.from_local(v, **place, **sizes, run_check=False) for k, v in values.items()}
        return {"step": torch.tensor(float(self.state[param]["step"])), **values}

    def _read(self, param: Tensor, saved: dict[str, Any]) -> dict[str, Tensor]:
        """The saved state of one parameter, of 32 or 8 bits, as this optimizer has it.

        Raises:
            ValueError: it does not fit the parameter.
        """
        own, values = local(param), {}
        if "exp_avg" in self.planes and saved.get("max_exp_avg_sq") is not None:
            raise ValueError(f"{type(self).__name__} has no amsgrad, and the saved state has")
        for name, size in zip(self.planes, ops.PLANES[self.rule], strict=True):
            if size == 0:
                continue
            value, absmax = saved.get(name), saved.get(f"{name}_absmax")
            if not isinstance(value, Tensor):
                raise ValueError(f"the saved state lacks the tensor '{name}' (it has: {', '.join(map(str, saved))})")
            value = local(value)
            if value.numel() != own.numel():
                raise ValueError(f"saved '{name}' has shape {list(value.shape)}, its parameter has {list(own.shape)}")
            if absmax is not None and absmax.numel() != ops.blocks_of(own.numel()):
                raise ValueError(
                    f"saved '{name}_absmax' has {absmax.numel()} scales, {own.numel()} elements need "
                    f"{ops.blocks_of(own.numel())}"
                )
            if absmax is not None and value.dtype != torch.uint8:
                raise ValueError(f"saved '{name}' is {value.dtype}; with '{name}_absmax' beside it belongs torch.uint8")
            table = ops.UNSIGNED_MAP if name == "exp_avg_sq" else ops.SIGNED_MAP
            if size == 1 and absmax is None:
                value, absmax = ops.encode(value.float().flatten(), table)
            elif size == 4 and absmax is not None:
                value = ops.decode(value.flatten(), absmax, table)
            if size == 1:
                values[f"{name}_absmax"] = absmax.float().flatten()
            values[name] = value.to(torch.uint8 if size == 1 else torch.float32).reshape(own.shape)
        return values

    def _take_over(self, param: Tensor, values: dict[str, Tensor], step: int) -> None:
        if not self.state.get(param):
            self._admit(param)
        self._set_state(param, values)
        self.state[param]["step"] = step

    def state_dict(self) -> dict[str, Any]:
        """torch's form: `state` by number of the parameter, `param_groups`. Paged state is read whole into memory."""
        packed = super().state_dict()
        owners = dict(self._owners())
        packed["state"] = {
            key: self._exported(owners[key]) if key in owners else value for key, value in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State and groups as `state_dict` gives them: ours in 32 or 8 bits, or that of torch's optimizer.

        Raises:
            ValueError: they do not fit these parameters. The state is then as it was.
        """
        groups = state_dict["param_groups"]
        for group in groups:
            if group.get("amsgrad"):
                raise ValueError(f"{type(self).__name__} has no amsgrad, and the saved state has")
        sizes = [[len(group["params"]) for group in among] for among in (groups, self.param_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the saved state is of groups of {sizes[0]} parameters, this optimizer has groups of {sizes[1]}"
            )
        keys = [key for group in groups for key in group["params"]]
        owners = {key: param for key, (_, param) in zip(keys, self._owners(), strict=True)}
        read = {}
        for key, saved in state_dict["state"].items():
            if key in owners:
                try:
                    read[owners[key]] = self._read(owners[key], saved), int(saved.get("step", 0))
                except ValueError as error:
                    raise ValueError(f"the state of parameter {key} does not fit: {error}") from None
        super().load_state_dict({**state_dict, "state": {}})  # which would cast moments to the parameter's dtype
        for param, (values, step) in read.items():
            self._take_over(param, values, step)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


class _Batch:
    """The tensors of one device that a step updates."""

    def __init__(self) -> None:
        self.owners: list[Tensor] = []
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.rows: list[int] = []
        self.streams: list[int] = []
        self.steps: list[int] = []
        self.scalars: list[float] = []
        self.numbers: dict[tuple[int, int], int] = {}  # of rows, by group and step
        self.strided: list[tuple[Tensor, Tensor]] = []  # (parameter, its contiguous copy)

    def add(
        self,
        optimizer: FusedOptimizer,
        owner: Tensor,
        param: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        step: int,
        factor: float,
        stream: int,
    ) -> None:
        row = self.numbers.get((id(group), step))
        if row is None:
            row = self.numbers[id(group), step] = len(self.steps)
            self.steps.append(step)
            self.scalars += optimizer._row(group, step, factor)
        if not param.is_contiguous():
            copy = param.contiguous()
            self.strided.append((param, copy))
            param = copy
        self.owners.append(owner)
        self.params.append(param)
        self.grads.append(grad if grad.is_contiguous() else grad.contiguous())
        self.rows.append(row)
        self.streams.append(stream)

    def run(self, optimizer: FusedOptimizer) -> None:
        streams = self.streams if any(stream >= 0 for stream in self.streams) else []
        optimizer._update(self.params, self.owners, self.grads, self.scalars, self.steps, self.rows, streams)
        for param, copy in self.strided:
            param.copy_(copy)

    def count(self, optimizer: FusedOptimizer) -> None:
        for owner, row in zip(self.owners, self.rows, strict=True):
            optimizer.state[owner]["step"] = self.steps[row]
