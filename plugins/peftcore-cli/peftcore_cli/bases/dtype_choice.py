"""Choose the dtype of a base model from `--dtype`, and explain the choice to the user.

`choose` has the rule. Training calls it through `choose_for_run`, and commands that only run a model through
`choose_for_inference`; both read the checkpoint's dtype first. `--dtype auto` means:

    CUDA   bf16 if the GPU supports it, otherwise fp32
    CPU    the dtype in `config.json`, or bf16 for a .gguf file with fewer bits. A 16-bit dtype is replaced by fp32 if
           - it is fp16, whose gradients underflow without loss scaling,
           - this processor has no instructions for it, or
           - parameters of the base are trained, because bf16 would round away small updates

If auto replaces the checkpoint's dtype, a message gives the reason. If the user names a dtype for which the processor
has no instructions, a warning gives the cost. Commands that write weights (`merge`, `export`) or compare methods use
fp32 for auto on a CPU.
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
    """The dtype of a base, and a message about it.

    Args:
        dtype: the dtype as in `--dtype`, never auto.
        replaced_dtype: the checkpoint's 16-bit dtype that auto replaced by fp32, or None if auto replaced nothing.
        message: explains the choice; None if there is nothing to explain.
        is_warning: whether the message warns about a dtype that the user named.
    """

    dtype: str
    replaced_dtype: str | None = None
    message: str | None = None
    is_warning: bool = False

    def report(self) -> str:
        """Print the message, if there is one, and return the dtype."""
        if self.message is not None:
            print_message = warn if self.is_warning else note
            print_message(self.message)
        return self.dtype


def choose(dtype: str, device: str, checkpoint_dtype: str | None, *, needs_fp32: str | None = None) -> Choice:
    """Choose the dtype of a base.

    Args:
        dtype: value of `--dtype`.
        device: device of the base.
        checkpoint_dtype: the checkpoint's dtype as in `--dtype`; None means fp32.
        needs_fp32: reason why auto must be fp32, or None; `{dtype}` is replaced by `checkpoint_dtype`.

    Raises:
        PeftcoreError: dtype or device is unknown.
    """
    uses_16_bits = device_choice.torch_dtype(dtype, device).itemsize == 2  # raises if `dtype` is unknown
    if device_choice.torch_device(device).type != "cpu":
        return Choice("bf16" if uses_16_bits else WIDE)
    if dtype == WIDE or (dtype == AUTO and checkpoint_dtype in (None, WIDE)):
        return Choice(WIDE)
    if dtype != AUTO:
        return Choice(dtype, message=slow_dtype_message(dtype), is_warning=True)
    return _choose_for_16_bit_checkpoint(str(checkpoint_dtype), needs_fp32)


def _choose_for_16_bit_checkpoint(checkpoint_dtype: str, needs_fp32: str | None) -> Choice:
    """Apply the rule of auto on a CPU: keep the checkpoint's dtype unless there is a reason to use fp32."""
    if checkpoint_dtype == "fp16":
        reason: str | None = "gradients underflow in {dtype} without loss scaling, which PyTorch only supports on CUDA"
    else:
        reason = device_choice.without_instructions(checkpoint_dtype) or needs_fp32
    if reason is None:
        return Choice(checkpoint_dtype)
    message = (
        f"--dtype auto: fp32, not {checkpoint_dtype}: {reason.format(dtype=checkpoint_dtype)}. "
        f"Dense weights take twice the memory of {checkpoint_dtype}"
    )
    return Choice(WIDE, checkpoint_dtype, message)


def slow_dtype_message(dtype: str, alternative: str = "--dtype auto") -> str | None:
    """Return a warning if products in `dtype` are slow on this processor, or None.

    Args:
        dtype: the dtype that the user named.
        alternative: the options with which the command would choose fp32.
    """
    reason = device_choice.without_instructions(dtype)
    if reason is None:
        return None
    if device_choice.torch_dtype(dtype, "cpu") in ops.WIDENED:
        reason += "; peftcore's linear layers are not affected"
    return f"{reason}. {alternative} would choose fp32"


def config_dtype(config: Any) -> str | None:
    """Return the dtype that a transformers config names, as in `--dtype`; None if it names none of these."""
    from peftcore.plugin import text_config

    torch_dtype = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    torch_name = str(torch_dtype).removeprefix("torch.")
    for name, name_in_torch in {WIDE: "float32", **device_choice.HALVES}.items():
        if torch_name == name_in_torch:
            return name
    return None


def choose_for_inference(
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
    # Runs that create a head train it in fp32.
    was_trained_in_fp32 = trained_in == WIDE or (trained_in is None and registered.find(task).new_head)
    needs_fp32 = _TRAINED_IN_FP32 if was_trained_in_fp32 else None
    choice = choose(dtype, device, _checkpoint_dtype(model, task, labels, dtype), needs_fp32=needs_fp32)
    return _explain_gguf(choice, model, dtype)


def choose_for_run(settings: Settings, labels: tuple[str, ...]) -> Choice:
    """Choose the dtype of a training run's base. Rank 0 chooses for all processes. Collective."""
    choices: list[Choice] = []
    ranks.once(lambda: choices.append(_choose_for_run_on_one_rank(settings, labels)), together=True)
    (choice,) = ranks.of_first(choices)
    return choice


def _choose_for_run_on_one_rank(settings: Settings, labels: tuple[str, ...]) -> Choice:
    dtype, device = base_dtype(settings.precision, settings.dtype), settings.device
    on_cpu = device_choice.torch_device(device).type == "cpu"
    if on_cpu and settings.precision in MIXED:
        # Autocast computes in 16 bits, so a warning about slow products concerns the precision, not the dtype.
        message = slow_dtype_message(settings.precision, "--precision auto with --dtype auto")
        return Choice(choose(dtype, device, None).dtype, message=message, is_warning=True)
    checkpoint_dtype = _checkpoint_dtype(settings.model, settings.task, labels, dtype)
    needs_fp32 = _why_run_needs_fp32(settings, labels) if on_cpu and checkpoint_dtype == "bf16" else None
    choice = choose(dtype, device, checkpoint_dtype, needs_fp32=needs_fp32)
    return _explain_gguf(choice, settings.model, dtype)


def _why_run_needs_fp32(settings: Settings, labels: tuple[str, ...]) -> str | None:
    """Return why a run on a bf16 checkpoint needs its base in fp32, or None."""
    if settings.adapter is None:
        return _TRAINS_BASE if _trains_base(settings, labels) else None
    # A run that continues an adapter uses the dtype in which the adapter was trained.
    task = adapter_folders.adapter_task(Path(settings.adapter), settings.labels)
    return _TRAINED_IN_FP32 if task.dtype == WIDE or registered.find(settings.task).new_head else None


def _explain_gguf(choice: Choice, model: str, dtype: str) -> Choice:
    """Add a message to the choice of auto for a .gguf file, where users cannot look up a dtype."""
    if dtype != AUTO or not model.endswith(".gguf") or choice.message is not None:
        return choice
    return replace(choice, message=f"--dtype auto: {choice.dtype} for the weights of '{Path(model).name}'")


def _trains_base(settings: Settings, labels: tuple[str, ...]) -> bool:
    """Return whether the run trains parameters of the base, such as biases or a head."""
    import peftcore

    if settings.method == FULL or registered.find(settings.task).new_head:
        return True
    if not settings.method:  # `suggest` tries several methods
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `apply` gives the same warnings later
        try:
            model = models.empty_model(settings.model, settings.task, labels)
            method_plan = peftcore.plan(model, settings.method, **settings.fields)
        except PeftcoreError:
            return False  # the run itself reports the error
    return any(kind == "trained parameter" for _, kind, _, _ in method_plan.rows)


def _checkpoint_dtype(model: str, task: str, labels: tuple[str, ...], dtype: str) -> str | None:
    """Read the checkpoint's dtype, as in `--dtype`. None if the config names none, or if --dtype is not auto."""
    if dtype != AUTO:
        return None
    if model.endswith(".gguf"):
        return gguf_file.stored_dtype(model)
    return config_dtype(models.load_config(model, task, labels))
