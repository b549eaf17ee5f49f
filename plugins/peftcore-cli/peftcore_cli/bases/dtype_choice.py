"""`--dtype`: choose the dtype of a base, and explain the choice.

    CUDA   auto is bf16 if the GPU supports it, otherwise fp32
    CPU    auto is the dtype in `config.json`, or bf16 for a .gguf file in fewer bits. It is fp32 instead of 16 bits if
           this processor has no instructions for the dtype, or if parameters of the base are trained, because bf16
           would round away small updates. It is also fp32 instead of fp16, because gradients underflow without loss
           scaling

A message names the dtype that auto uses instead of the checkpoint's, and the cost of a dtype that the processor has no
instructions for. Commands that write weights (`merge`, `export`) or compare methods use fp32 for auto on a CPU.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcore import ops
from peftcore.errors import PeftcoreError
from peftcore.estimating import MIXED
from peftcore.plugin import ranks
from peftcore_cli.bases import adapter_folders, device_choice, gguf_file, models
from peftcore_cli.bases.precision import base_dtype
from peftcore_cli.console import note, warn
from peftcore_cli.options import FULL
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import registered

AUTO, WIDE = "auto", "fp32"
_TRAINS_BASE = "the run trains parameters of the base, and {dtype} would round away small updates"
_TRAINED_IN_FP32 = "the adapter was trained with the base in fp32"


@dataclass(frozen=True)
class Choice:
    """The dtype of a base.

    Args:
        dtype: the dtype as in `--dtype`, never auto.
        instead_of: the checkpoint's 16-bit dtype that auto replaced, or None if auto replaced nothing.
        line: message about the choice, or None.
        is_warning: whether the message is a warning about the user's choice.
    """

    dtype: str
    instead_of: str | None = None
    line: str | None = None
    is_warning: bool = False

    def say(self) -> str:
        """Print the message and return the dtype."""
        if self.line is not None:
            (warn if self.is_warning else note)(self.line)
        return self.dtype


def choose(dtype: str, device: str, checkpoint_dtype: str | None, *, needs_fp32: str | None = None) -> Choice:
    """Choose the dtype of a base.

    Args:
        dtype: value of `--dtype`.
        device: device of the base.
        checkpoint_dtype: the checkpoint's dtype, see `stored_dtype`; None means fp32.
        needs_fp32: reason why auto must be fp32, or None; `{dtype}` is replaced by `checkpoint_dtype`.

    Raises:
        PeftcoreError: dtype or device is unknown.
    """
    dtype_name = "bf16" if device_choice.torch_dtype(dtype, device).itemsize == 2 else WIDE
    if device_choice.torch_device(device).type != "cpu":
        return Choice(dtype_name)
    if dtype != AUTO:
        return (
            Choice(dtype_name, None, slow_line(dtype_name), is_warning=True)
            if dtype_name != WIDE
            else Choice(dtype_name)
        )
    if checkpoint_dtype in (None, WIDE):
        return Choice(WIDE)
    if checkpoint_dtype == "fp16":
        reason: str | None = "gradients underflow in {dtype} without loss scaling, which PyTorch only supports on CUDA"
    else:
        reason = device_choice.without_instructions(str(checkpoint_dtype)) or needs_fp32
    if reason is None:
        return Choice(str(checkpoint_dtype))
    line = f"--dtype auto: fp32, not {checkpoint_dtype}: {reason.format(dtype=checkpoint_dtype)}. "
    return Choice(WIDE, checkpoint_dtype, f"{line}Dense weights take twice the memory of {checkpoint_dtype}")


def slow_line(dtype: str, otherwise: str = "--dtype auto") -> str | None:
    """Return a message if the user's dtype is slow on this processor, or None."""
    reason = device_choice.without_instructions(dtype)
    if reason is None:
        return None
    exception = (
        "; peftcore's linear layers are not affected" if device_choice.torch_dtype(dtype, "cpu") in ops.WIDENED else ""
    )
    return f"{reason}{exception}. {otherwise} would choose fp32"


def stored_dtype(config: Any) -> str | None:
    """Return the dtype in a checkpoint's transformers config, as in `--dtype`, or None."""
    from peftcore.plugin import text_config

    dtype = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    names = {WIDE: "float32", **device_choice.HALVES}
    return next((name for name, full in names.items() if str(dtype).removeprefix("torch.") == full), None)


def of_base(
    model: str, task: str, dtype: str, device: str, labels: tuple[str, ...] = (), trained_in: str | None = None
) -> Choice:
    """Choose the dtype of a base for generation or evaluation.

    Args:
        model: folder or hub id.
        task: its task.
        dtype: value of `--dtype`.
        device: device of the base.
        labels: a classifier's labels.
        trained_in: the base's dtype in training, if the adapter's task file records it.
    """
    needs_fp32 = (
        _TRAINED_IN_FP32 if trained_in == WIDE or (trained_in is None and registered.find(task).new_head) else None
    )
    return _of_model(model, dtype, device, _stored(model, task, labels, dtype), needs_fp32)


def of_run(settings: Settings, labels: tuple[str, ...]) -> Choice:
    """Choose the dtype of a training run's base. Rank 0 chooses for all processes. Collective."""
    choices: list[Choice] = []
    ranks.once(lambda: choices.append(_of_run(settings, labels)), together=True)
    (choice,) = ranks.of_first(choices)
    return choice


def _of_run(settings: Settings, labels: tuple[str, ...]) -> Choice:
    dtype, device = base_dtype(settings.precision, settings.dtype), settings.device
    on_cpu = device_choice.torch_device(device).type == "cpu"
    if on_cpu and settings.precision in MIXED:
        line = slow_line(settings.precision, "--precision auto with --dtype auto")
        return Choice(choose(dtype, device, None).dtype, None, line, is_warning=True)
    checkpoint_dtype = _stored(settings.model, settings.task, labels, dtype)
    needs_fp32 = None
    if on_cpu and checkpoint_dtype == "bf16" and settings.adapter is not None:
        task = adapter_folders.adapter_task(Path(settings.adapter), settings.labels)
        needs_fp32 = _TRAINED_IN_FP32 if task.dtype == WIDE or registered.find(settings.task).new_head else None
    elif on_cpu and checkpoint_dtype == "bf16":
        needs_fp32 = _TRAINS_BASE if _trains_base(settings, labels) else None
    return _of_model(settings.model, dtype, device, checkpoint_dtype, needs_fp32)


def _of_model(model: str, dtype: str, device: str, checkpoint_dtype: str | None, needs_fp32: str | None) -> Choice:
    """Choose the dtype of a base. For a .gguf file, which names no dtype, the choice is always printed."""
    choice = choose(dtype, device, checkpoint_dtype, needs_fp32=needs_fp32)
    if dtype != AUTO or not model.endswith(".gguf") or choice.line is not None:
        return choice
    return replace(choice, line=f"--dtype auto: {choice.dtype} for the weights of '{Path(model).name}'")


def _trains_base(settings: Settings, labels: tuple[str, ...]) -> bool:
    """Return whether the run trains parameters of the base, such as biases or a head."""
    import peftcore

    if settings.method == FULL or registered.find(settings.task).new_head:
        return True
    if not settings.method:  # `suggest` tries several
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `apply` raises them
        try:
            method_plan = peftcore.plan(
                models.empty_model(settings.model, settings.task, labels), settings.method, **settings.fields
            )
        except PeftcoreError:
            return False  # the run itself reports the error
    return any(kind == "trained parameter" for _, kind, _, _ in method_plan.rows)


def _stored(model: str, task: str, labels: tuple[str, ...], dtype: str) -> str | None:
    """Return the checkpoint's dtype, or None if --dtype is not auto."""
    if dtype != AUTO:
        return None
    if model.endswith(".gguf"):
        return gguf_file.stored_dtype(model)
    return stored_dtype(models.load_config(model, task, labels))
