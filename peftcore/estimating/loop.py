"""Training step of a meta model: forward, backward, gradient clipping and optimizer.

Operators that only have a CPU kernel are simulated like that kernel on meta tensors (`kernels_of_cpu`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore import ops
from peftcore.errors import PeftcoreError, nearest
from peftcore.estimating.following import LARGEST_INDEX, Following, NotFollowed
from peftcore.estimating.losses import VECTORS, Own, loss_of, rows_of, tiles_in_place
from peftcore.estimating.mixed_precision import asked_of_cpu, autocast, on_meta, to_single
from peftcore.estimating.processes import Alone, Replicas, Shards
from peftcore.estimating.purpose import Purpose
from peftcore.estimating.step import Step
from peftcore.model.base_modules import original_forward
from peftcore.model.inputs import BATCH, LENGTH, example_inputs
from peftcore.optim import NAMES, PagedOptimizer
from peftcore.plugin import MetaFloats, base_modules, has_adapters, meta_copy, number_of_positions, text_config
from peftcore.training.loss_without_logits import switch_on

FORWARD, BACKWARD, UPDATE = "forward", "backward", "optimizer"

_TORCH: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw_torch": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "adamw_torch_fused": lambda parameters: torch.optim.AdamW(parameters, foreach=False),  # with equal state
    "sgd": lambda parameters: torch.optim.SGD(parameters, foreach=False),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, foreach=False),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, foreach=False),
}
OPTIMIZERS = (*_TORCH, *NAMES)


def make_inputs(
    model: nn.Module, rows: int, length: int, loss: str | None = None, example: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return inputs and labels with `rows` rows of `length` tokens. Losses on vectors get a mask instead of labels.

    With an `example`, each row is the example, with pixels and features in the model's dtype.

    Raises:
        NotFollowed: The model's forward has no argument `labels`.
        PeftcoreError: The model supports fewer positions than `length`.
    """
    if loss not in VECTORS and "labels" not in inspect.signature(original_forward(model)).parameters:
        raise NotFollowed(
            f"the forward of {type(model).__name__} does not accept labels, so its loss is unknown. Estimate a class "
            "with a loss, such as ...ForCausalLM or ...ForSequenceClassification"
        )
    if example is not None:
        return _repeat_example(model, rows, example)
    _refuse_too_long(model, length)
    inputs = _resized_example_inputs(model, rows, length)
    if loss in VECTORS:
        inputs["attention_mask"] = _padding_mask(rows, length)
    else:
        _add_labels(model, inputs, rows, length)
    return inputs


def _refuse_too_long(model: nn.Module, length: int) -> None:
    positions = number_of_positions(model)
    if positions is not None and length > positions:
        raise PeftcoreError(
            f"{type(model).__name__} has positions for {positions:,} tokens, found length={length:,}. Pass "
            f"length={positions} (--max-length {positions})"
        )


def _resized_example_inputs(model: nn.Module, rows: int, length: int) -> dict[str, Any]:
    """Return the model's example inputs, resized to `rows` rows of `length` tokens."""
    inputs = {}
    for name, value in example_inputs(model, device="cpu").items():
        shape = list(value.shape)
        if shape[:1] == [BATCH]:
            shape[0] = rows
        if shape[1:2] == [LENGTH]:
            shape[1] = length
        if value.is_floating_point():
            inputs[name] = value.new_empty(shape, device="meta")
        else:
            inputs[name] = torch.full(shape, 3, dtype=value.dtype, device="cpu")
    return inputs


def _padding_mask(rows: int, length: int) -> Tensor:
    """Return a mask with padding, since texts rarely have the same length."""
    mask = torch.ones(rows, length, dtype=torch.long, device="cpu")
    mask[1:, max(1, length - 1) :] = 0
    return mask


def _add_labels(model: nn.Module, inputs: dict[str, Any], rows: int, length: int) -> None:
    """Add labels for the model's task: language modeling, token classification or classification."""
    config = getattr(model, "config", None)
    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if is_encoder_decoder:
        inputs.pop("decoder_input_ids", None)  # the model derives them from the labels
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is not None and ("input_ids" in inputs or is_encoder_decoder):
        inputs["labels"] = torch.full((rows, length), 3, device="cpu")
    elif "input_ids" in inputs and _has_token_logits(model):
        inputs["labels"] = torch.zeros(rows, length, dtype=torch.long, device="cpu")
    else:
        inputs["labels"] = torch.zeros(rows, dtype=torch.long, device="cpu")
        if config is not None and hasattr(config, "problem_type"):
            text_config(config).problem_type = config.problem_type = "single_label_classification"


def _repeat_example(model: nn.Module, rows: int, example: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch of `rows` copies of an example, concatenated in dimension 0, as processors do with images."""
    inputs = {"labels": example["input_ids"], **example}
    batch = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            batch[name] = value
        elif value.is_floating_point() or rows * value.numel() > LARGEST_INDEX:
            dtype = getattr(model, "dtype", value.dtype) if value.is_floating_point() else value.dtype
            batch[name] = torch.empty(rows * len(value), *value.shape[1:], dtype=dtype, device="meta")
        else:
            batch[name] = value.to("cpu").repeat(rows, *[1] * (value.dim() - 1))
    return batch


def _has_token_logits(model: nn.Module) -> bool:
    """Return whether a forward pass without labels returns logits for each token, as token classifiers do."""
    model_copy = meta_copy(model).eval()
    try:
        with torch.no_grad(), MetaFloats():
            logits = model_copy(**example_inputs(model_copy, device="cpu")).logits
    except Exception:  # the simulated step raises a better error
        return False
    return isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == (BATCH, LENGTH)


def make_optimizer(parameters: list[nn.Parameter], optimizer: str, *, paged: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer with this name. Unless `paged`, its state is stored in tensors instead of pages."""
    if optimizer in _TORCH:
        return _TORCH[optimizer](parameters)
    if optimizer not in NAMES:
        raise PeftcoreError(
            f"the memory of optimizer '{optimizer}' is unknown{nearest(optimizer, OPTIMIZERS)}. "
            f"Use one of: {', '.join(OPTIMIZERS)}"
        )
    kind: Any = NAMES[optimizer]
    if issubclass(kind, PagedOptimizer) and not paged:
        kind = next(c for c in kind.__mro__ if not issubclass(c, PagedOptimizer))
    return kind(parameters)


def is_paged(optimizer: str) -> bool:
    """Return whether the optimizer keeps its state in pages."""
    return optimizer in NAMES and issubclass(NAMES[optimizer], PagedOptimizer)


def follow(following: Following, model: nn.Module, step: Step, *, on_card: bool) -> None:
    """Simulate one step of the meta model.

    The simulated step is not the first one, so the optimizer already has its state.
    """
    inputs = make_inputs(model, rows_of(step.loss, step.batch_size), step.length, step.loss, step.example)
    if step.without_logits and step.loss is None and not step.is_sharded:
        with suppress(PeftcoreError):  # an unsupported model computes its logits
            switch_on(model)
    loss = loss_of(model, step.loss)
    processes = _processes_of(model, step, on_card=on_card)
    if loss.reference is not None and step.is_sharded:
        raise NotFollowed(
            f"cannot estimate loss='{step.loss}' without adapters on a sharded model, because the trainer loads a "
            "second model. Pass a method, or omit shard"
        )
    optimizer = make_optimizer(processes.trained(), step.optimizer)
    precision = step.mixed_precision
    with ExitStack() as stack:
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(asked_of_cpu())
        if precision is not None:
            stack.enter_context(on_meta(on_card))
        stack.enter_context(tiles_in_place() if on_card else kernels_of_cpu())
        _follow(following, inputs, loss, processes, optimizer, step, precision)


def _processes_of(model: nn.Module, step: Step, *, on_card: bool) -> Alone:
    """Return the shard of the model that one of the step's processes holds."""
    if step.is_sharded:
        return Shards(model, step, on_card)
    if step.copies > 1:
        return Replicas(model, clones=not step.gradient_checkpointing)
    return Alone(model)


def _follow(
    following: Following,
    inputs: dict[str, Any],
    loss_of_batch: Own,
    processes: Alone,
    optimizer: torch.optim.Optimizer,
    step: Step,
    precision: str | None,
) -> None:
    model, parameters = processes.model, processes.trained()
    batches = step.gradient_accumulation

    def call(module: nn.Module, **arguments: Any) -> Any:
        with autocast(precision):
            outputs = module(**arguments)
        if precision is not None:
            outputs = to_single(outputs)
        return processes.after_forward(outputs)

    def loss_now() -> Any:
        loss = loss_of_batch(call, inputs)
        return (loss + peftcore.extra_loss(model) if has_adapters(model) else loss) / batches

    give_state(parameters, optimizer)
    _see_what_stays(following, processes, loss_of_batch, optimizer)
    for tensor in inputs.values():
        if isinstance(tensor, Tensor):
            following.see(tensor, Purpose.INPUTS)
    processes.start(following)
    trainable = [p for p in model.parameters() if p.requires_grad]

    def see_gradient(p: Tensor) -> None:
        if p.grad is not None:
            following.see(p.grad, Purpose.GRADIENTS)

    hooks = [p.register_post_accumulate_grad_hook(see_gradient) for p in trainable]

    with following.running(model):
        for batch in range(batches):
            following.phase = FORWARD if batches == 1 else f"{FORWARD} of batch {batch + 1}"
            loss = loss_now()
            following.phase = BACKWARD if batches == 1 else f"{BACKWARD} of batch {batch + 1}"
            loss.backward()
            del loss
            processes.after_backward()
        following.phase = UPDATE
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        _update(parameters, optimizer)
        if has_adapters(model):
            peftcore.after_step(model, 1, 1000, optimizer=optimizer)
        optimizer.zero_grad()
    following.end()
    for hook in hooks:
        hook.remove()


def _firsts(parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, nn.Parameter]:
    """Map each parameter to the first parameter with its shape and dtype, since their optimizer steps are the same."""
    first_by_kind: dict[Any, nn.Parameter] = {}
    return {p: first_by_kind.setdefault((p.shape, p.dtype, p.stride(), p.grad is None), p) for p in parameters}


def _update(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Run the optimizer's step on one parameter of each kind, while all gradients stay in memory."""
    firsts = _firsts(parameters)
    other_gradients = {p: p.grad for p in parameters if firsts[p] is not p}
    for p in other_gradients:
        p.grad = None
    optimizer.step()
    for p, grad in other_gradients.items():
        p.grad = grad


def give_state(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state as it is after the first step."""
    firsts = _firsts(parameters)
    for p in {*firsts.values()}:
        p.grad = torch.empty_like(p)
    with MetaFloats():
        optimizer.step()
        optimizer.zero_grad()
    for p, representative in firsts.items():
        if p is not representative and representative in optimizer.state:
            state = optimizer.state[representative]
            # Clone instead of `empty_like`, because Adam's step counter is a real tensor on the CPU.
            optimizer.state[p] = {n: v.clone() if isinstance(v, Tensor) else v for n, v in state.items()}


def _see_what_stays(following: Following, processes: Alone, loss: Own, optimizer: torch.optim.Optimizer) -> None:
    model = processes.model

    def local(tensor: Tensor) -> Tensor:
        return processes.shards.get(tensor, tensor) if isinstance(tensor, nn.Parameter) else tensor

    for _, module in base_modules(model):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                following.see(local(tensor), Purpose.BASE)
    for tensor in (*model.parameters(), *model.buffers()):
        following.see(local(tensor), Purpose.ADAPTERS, only_new=True)
    if loss.reference is not None:
        for tensor in (*loss.reference.parameters(), *loss.reference.buffers()):
            following.see(tensor, Purpose.BASE)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                following.see(value, Purpose.STATE)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return torch.ops.peftcore.scaled(x, g)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, g = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, dg = torch.ops.peftcore.scaled_backward(dy, x, g, needs)
        return dx if needs[0] else None, dg if needs[1] else None


@contextmanager
def kernels_of_cpu() -> Iterator[None]:
    """Make `ops.scaled` a single operator on meta tensors within the block, as on a CPU.

    On other devices, including meta, it consists of PyTorch operators that create an fp32 matrix for 16-bit inputs.
    Without the extension nothing changes, because the reference also creates this matrix.
    """
    original = ops.scaled

    def scaled(x: Tensor, g: Tensor, trailing_dims: int = 0) -> Tensor:
        if not x.is_meta or trailing_dims or x.dtype is torch.float64:
            return original(x, g, trailing_dims)
        return _Scaled.apply(x, g)  # type: ignore[no-untyped-call]

    if ops.extension is not None:
        ops.scaled = scaled
    try:
        yield
    finally:
        ops.scaled = original
