"""Compute the loss of a causal language model from its hidden states, without materializing the logits.

    model(..., labels=...)
      head(hidden)             is called with no rows; hidden states are kept
      loss_function(...)       ops.linear_cross_entropy(hidden, head's weight, labels), in pieces of rows
      output.loss              as before
      output.logits            an error that says how to get them

Between head and loss, some models scale or cap the logits; both values are read from the config and passed to the
operator. To detect anything else, loss and gradients of a small batch are compared with the original computation once,
when the feature is enabled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from peftcore import ops
from peftcore.engine.adaptation.adapted import has_forward_of_instance, is_active
from peftcore.engine.adaptation.fused_forward import LOSS_HANDLES, is_without_logits
from peftcore.engine.adaptation.modes import evaluation_mode
from peftcore.engine.state import check_model
from peftcore.errors import PeftcoreError
from peftcore.model import detect
from peftcore.model.base_modules import original_class
from peftcore.model.inputs import example_inputs
from peftcore.ops import PackedWeight
from peftcore.plugin import sharded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

M = TypeVar("M", bound=nn.Module)
# Names in configs for the operations between head and loss: the soft cap and the factor of the logits.
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}  # with its power
_SPREAD = 3.0  # standard deviation of the logits in the check, large enough to detect a soft cap of 50
# Largest differences allowed in the check, relative to the loss and to the norm of each gradient. Both computations
# round to the dtype, but sum in another order.
_LOSS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
_GRADIENT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}


@dataclass
class _Call:
    """One call of a model with labels: the input of its head, and whether the loss was computed from it."""

    head: nn.Module
    factor: float
    cap: float | None
    hidden: Tensor | None = None
    operands: tuple[Tensor | PackedWeight, Tensor | None] | None = None
    has_loss: bool = False


_CALL: ContextVar[_Call | None] = ContextVar("_CALL", default=None)
_IN_EVALUATION = ContextVar("_IN_EVALUATION", default=False)


class LogitsNotComputed(PeftcoreError, AttributeError):
    """The logits of an output were read, although its loss was computed without logits."""


class NoLogits:
    """Placeholder for the `logits` of an output whose loss was computed without them; every use raises an error."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise LogitsNotComputed(
            "the logits of this call were not computed, because peftcore.loss_without_logits computes only the loss. "
            "Call the model without labels or in evaluation mode, or call peftcore.loss_without_logits(model, "
            "enabled=False)"
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __array__ = __float__ = _refuse

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        cls()._refuse()

    def __repr__(self) -> str:
        return "logits that were not computed"


def loss_without_logits(model: M, check: Mapping[str, Any] | None = None, *, enabled: bool = True) -> M:
    """Make a causal language model compute its training loss without materializing the logits.

    In training mode, `model(..., labels=...)` returns the same loss and gradients, within rounding. The loss is
    computed from the hidden states and the head's weight in chunks of rows (`ops.linear_cross_entropy`). Using the
    `logits` of that output raises an error. Calls without labels and calls in evaluation mode return logits, as before.
    The same holds under `torch.compile`, while adapters on the head are active or other hooks are registered on the
    head, and for a sharded model and `nn.DataParallel` replicas.

    The head may be frozen, trained, tied or quantized to 4 bits, and may have a bias. Losses agree with the original
    within fp32 rounding, gradients within the rounding of the model's dtype. Double backward is not supported.

    Args:
        model: a causal language model of transformers that computes its loss by `loss_function`.
        check: arguments of a call with `labels` and a few tokens. The loss and the gradients of the head's input,
            weight and bias are compared with the original computation in evaluation mode. None: random tokens.
        enabled: False restores the loss from logits.

    Returns:
        The model.

    Raises:
        PeftcoreError: the model has no linear head for logits of tokens, the head has active adapters or its own
            `forward`, the model is sharded, or it computes another loss. The model is then unchanged.

    Examples:
        >>> peftcore.loss_without_logits(model)
        >>> model.train()
        >>> model(input_ids=tokens, labels=tokens).loss.backward()    # no logits in memory
    """
    check_model(model)
    if not enabled:
        _switch_off(model)
        return model
    switch_on(model)
    reason: str | None = "the check did not end"
    try:
        reason = _difference(model, check)
    finally:
        if reason is not None:
            _switch_off(model)
    if reason is not None:
        raise PeftcoreError(f"the loss of {original_class(model).__name__} cannot be computed without logits: {reason}")
    return model


@contextmanager
def evaluated_without_logits(model: nn.Module) -> Iterator[None]:
    """Within the block, compute the loss without logits in evaluation mode too, if possible."""
    was_on = is_without_logits(model)
    try:
        if not was_on:
            loss_without_logits(model)
    except PeftcoreError:  # the logits are computed
        yield
        return
    try:
        with _in_evaluation():
            yield
    finally:
        if not was_on:
            _switch_off(model)


@contextmanager
def _in_evaluation() -> Iterator[None]:
    token = _IN_EVALUATION.set(True)
    try:
        yield
    finally:
        _IN_EVALUATION.reset(token)


def switch_on(model: PreTrainedModel) -> None:
    """Enable the loss without logits unchecked, for a copy of a model on the meta device, which has lost its hooks.

    Raises:
        PeftcoreError: the kind of model or head is not supported.
    """
    _switch_off(model)
    path = detect(model).output_head
    if path is None:
        raise PeftcoreError(f"{original_class(model).__name__} has no linear head for logits of tokens")
    head = model.get_submodule(path)
    reason = _why_not(model, head)
    if reason is not None:
        raise PeftcoreError(f"the loss of {original_class(model).__name__} cannot be computed without logits: {reason}")
    model.loss_function = _loss
    model.__dict__[LOSS_HANDLES] = (
        model.register_forward_pre_hook(_begin, with_kwargs=True),
        model.register_forward_hook(_finish, always_call=True),
        head.register_forward_pre_hook(_keep),
    )


def _switch_off(model: PreTrainedModel) -> None:
    for handle in model.__dict__.pop(LOSS_HANDLES, ()):
        handle.remove()
    if getattr(model, "loss_function", None) is _loss:  # also finds a copy that has lost its hooks
        model.loss_function = _loss_of_logits()


def _why_not(model: PreTrainedModel, head: nn.Module) -> str | None:
    """Return the reason why the loss needs logits, or None."""
    if getattr(model.config, "is_encoder_decoder", False) or not hasattr(model, "loss_function"):
        return "the model does not compute its loss by a loss_function"
    if model.loss_function is not _loss_of_logits():
        name = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
        return f"its loss_function is {name}, not ForCausalLMLoss"
    if original_class(head).forward is not nn.Linear.forward and not hasattr(head, "linear_operands"):
        return f"its head is a {original_class(head).__name__}, not a linear layer"
    if has_forward_of_instance(head):
        return "its head has its own forward on the instance"
    if is_active(head):
        return "adapters of its head are active"
    if _is_sharded(model, head):
        return "the model is sharded, and the full weight of the head is not available after the head's forward"
    return None


def _loss_of_logits() -> Callable[..., Tensor]:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss


def _is_sharded(model: nn.Module, head: nn.Module) -> bool:
    # FSDP2 gathers the full parameters for the forward pass of the module that has `unshard`.
    return hasattr(model, "unshard") or hasattr(head, "unshard") or sharded.is_sharded(model)


# --- a call ----------------------------------------------------------------------------------------------------------


def _begin(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin a call of the model; a forward pre-hook."""
    if torch.compiler.is_compiling():
        return
    _CALL.set(None)
    if kwargs.get("labels") is None or not (model.training or _IN_EVALUATION.get()):
        return
    head = model.get_output_embeddings()
    if getattr(model, "_is_replica", False) or _is_sharded(model, head):
        return
    factor, cap = _between(model.config.get_text_config())
    _CALL.set(_Call(head, factor, cap))


def _between(config: PretrainedConfig) -> tuple[float, float | None]:
    """Return (factor, soft cap) of the logits."""
    factor = 1.0
    for name, power in _FACTORS.items():
        factor *= float(getattr(config, name, None) or 1.0) ** power
    cap = next(filter(None, (getattr(config, name, None) for name in _CAPS)), None)
    return factor, None if cap is None else float(cap)


def _keep(head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
    """Keep the hidden states of a call, and pass zero rows to the head; a forward pre-hook of the head."""
    if torch.compiler.is_compiling():
        return None
    call = _CALL.get()
    if call is None or call.head is not head or len(args) != 1 or _is_watched(head):
        return None
    (hidden_states,) = args
    operands = _operands(head, hidden_states)
    if operands is None:
        return None
    if call.hidden is not None:
        raise PeftcoreError(
            "the head was called twice for one loss. Call peftcore.loss_without_logits(model, enabled=False)"
        )
    call.hidden, call.operands = hidden_states, operands
    return (hidden_states[..., :0, :],)


def _operands(head: Any, hidden_states: Tensor) -> tuple[Tensor | PackedWeight, Tensor | None] | None:
    """Return the head's (weight, bias); None if the head computes more than a linear layer."""
    if is_active(head) or has_forward_of_instance(head):
        return None
    if original_class(head).forward is nn.Linear.forward:
        return head.weight, head.bias
    operands: tuple[PackedWeight, Tensor | None] | None = head.linear_operands(hidden_states)
    return operands


def _is_watched(head: nn.Module) -> bool:
    """Return whether other hooks read the head's input, its output or their gradients."""
    other_hooks = [
        hook for hook in head._forward_pre_hooks.values() if hook is not _keep and type(hook) is not _Enlarged
    ]
    return bool(other_hooks or head._forward_hooks or head._backward_hooks or head._backward_pre_hooks)


def _loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return the loss of a call, equal to transformers' ForCausalLMLoss on logits."""
    call = None if torch.compiler.is_compiling() else _CALL.get()
    if call is None or call.hidden is None or call.operands is None:
        loss_of_logits: Tensor = _loss_of_logits()(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
        return loss_of_logits
    hidden_states, (weight, bias) = call.hidden, call.operands
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]  # type: ignore[arg-type]
    loss = ops.linear_cross_entropy(
        hidden_states,
        weight,
        shift_labels.to(hidden_states.device),
        bias=bias,
        ignore_index=ignore_index,
        logit_scale=call.factor,
        soft_cap=call.cap,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    call.has_loss = True
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def _finish(model: nn.Module, _: tuple[Any, ...], output: Any) -> None:
    """End a call of the model; a forward hook that also runs after an error."""
    if torch.compiler.is_compiling():
        return
    call = _CALL.get()
    _CALL.set(None)
    if call is None or call.hidden is None or output is None:
        return
    off = "Call peftcore.loss_without_logits(model, enabled=False)"
    if not call.has_loss:
        raise PeftcoreError(
            f"{original_class(model).__name__} did not compute its loss by peftcore's loss function. {off}"
        )
    if not isinstance(output, dict):
        raise PeftcoreError(f"the output is a {type(output).__name__}: pass return_dict=True. Otherwise: {off}")
    output["logits"] = NoLogits()


# --- the check -------------------------------------------------------------------------------------------------------


class _Enlarged:
    """Pre-hook of the head that enlarges hidden states, so that operations after the head show, and asks for gradients.

    Attributes:
        hidden: the input of the head.
    """

    def __init__(self, factor: float) -> None:
        self.factor, self.hidden = factor, torch.empty(0)

    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        with torch.no_grad():
            hidden_states = args[0] * self.factor
        self.hidden = hidden_states.requires_grad_()
        return (self.hidden,)


def _difference(model: PreTrainedModel, check: Mapping[str, Any] | None) -> str | None:
    """Describe how loss and gradients of a call differ from the original computation; None if they agree."""
    inputs = example_inputs(model) if check is None else dict(check)
    inputs.setdefault("labels", inputs.get("input_ids"))
    with evaluation_mode(model), torch.enable_grad():
        with torch.no_grad():
            spread = float(model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.float().std())
        factor = max(1.0, _SPREAD / max(spread, 1e-3))
        expected = _loss_and_gradients(model, inputs, factor)
        try:
            with _in_evaluation():
                actual = _loss_and_gradients(model, inputs, factor)
        except Exception as error:  # a model may raise anything on logits without rows
            return f"without logits it raises {type(error).__name__}: {error}"
    device, dtype = expected[1].device.type, expected[1].dtype
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    limits = [_LOSS.get(dtype, 1e-4), *[_GRADIENT.get(dtype, 1e-3)] * (len(expected) - 1)]
    errors = [_relative_error(*pair) for pair in zip(actual, expected, strict=True)]
    if all(error <= limit for error, limit in zip(errors, limits, strict=True)):
        return None
    return (
        f"without logits, the loss of a few tokens has a relative error of {errors[0]:.1e}, and the head's gradients "
        f"of {max(errors[1:]):.1e}"
    )


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12))


def _loss_and_gradients(model: PreTrainedModel, inputs: dict[str, Any], factor: float) -> list[Tensor]:
    """Return the loss and its gradients for the head's input and trainable parameters."""
    head = model.get_output_embeddings()
    enlarged = _Enlarged(factor)
    trained = [p for p in (head._parameters.get("weight"), head._parameters.get("bias")) if p is not None]
    with head.register_forward_pre_hook(enlarged, prepend=True):
        loss = model(**inputs).loss
    sources = [enlarged.hidden, *(p for p in trained if p.requires_grad)]
    return [loss.detach(), *torch.autograd.grad(loss, sources)]
