"""`--dtype`: in what a base computes, and what is said of it.

    CUDA    auto is bf16 where the card has it, else fp32
    CPU     auto is the dtype that `config.json` names; in place of 16 bits it is fp32 where PyTorch multiplies them at
            less than half of fp32's rate on this processor, where parameters of the base are trained, whose small
            updates bf16 would round away, and in place of fp16, whose gradients underflow unless they are scaled

A line says what auto chooses in place of the checkpoint's dtype, and what a named dtype costs on a processor without
its instructions. Commands that write weights (`merge`, `export`) or compare methods take fp32 for auto on a CPU.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcore import ops, ranks
from peftcore.cli import data, models
from peftcore.cli.console import note, warn
from peftcore.cli.options import FULL
from peftcore.cli.precision import base_dtype
from peftcore.cli.settings import Settings
from peftcore.errors import PeftcoreError
from peftcore.estimating.step import MIXED

AUTO, WIDE = "auto", "fp32"
TRAINED = "parameters of the base are trained, whose small updates {dtype} would round away"
RECORDED = "its adapter was trained with the base in fp32"


@dataclass(frozen=True)
class Choice:
    """The dtype of a base.

    Args:
        dtype: as `--dtype` names it, never auto.
        instead_of: the 16 bits of the checkpoint that auto avoids; None: it has its own dtype, or the user named one.
        line: what is said of it; None: nothing. `is_warning`: of a dtype that the user named.
    """

    dtype: str
    instead_of: str | None = None
    line: str | None = None
    is_warning: bool = False

    def say(self) -> str:
        """Print the line, and return the dtype."""
        if self.line is not None:
            (warn if self.is_warning else note)(self.line)
        return self.dtype


def choose(dtype: str, device: str, stored: str | None, *, needs_fp32: str | None = None) -> Choice:
    """Choose the dtype of a base.

    Args:
        dtype: of `--dtype`.
        stored: the checkpoint's, see `stored_dtype`; None: it is not known, which counts as fp32.
        needs_fp32: why auto is fp32 all the same; `{dtype}` in it stands for `stored`.

    Raises:
        PeftcoreError: dtype or device is unknown.
    """
    named = "bf16" if models.torch_dtype(dtype, device).itemsize == 2 else WIDE
    if models.torch_device(device).type != "cpu":
        return Choice(named)
    if dtype != AUTO:
        return Choice(named, None, slow_line(named), is_warning=True) if named != WIDE else Choice(named)
    if stored in (None, WIDE):
        return Choice(WIDE)
    why = _slow(str(stored)) or needs_fp32
    if why is None and stored == "fp16":
        why = "gradients underflow in {dtype} unless they are scaled, which PyTorch does on CUDA only"
    if why is None:
        return Choice(str(stored))
    line = f"--dtype auto: fp32, not the checkpoint's {stored}: {why.format(dtype=stored)}. "
    return Choice(WIDE, stored, f"{line}Dense weights take twice the memory of {stored}")


def slow_line(dtype: str, otherwise: str = "--dtype auto") -> str | None:
    """Say what a dtype that the user named costs, where this processor multiplies it slowly; else None."""
    slow = _slow(dtype)
    if slow is None:
        return None
    spared = "; peftcore's linear layers are not affected" if models.torch_dtype(dtype, "cpu") in ops.WIDENED else ""
    return f"{slow}{spared}. {otherwise} would choose fp32"


def _slow(dtype: str) -> str | None:
    from peftcore.estimating import dtype_rates

    rates = dtype_rates.here()
    return None if rates.is_fast(dtype) else f"PyTorch multiplies {dtype} {rates.sentence(dtype)}"


def stored_dtype(config: Any) -> str | None:
    """The dtype that a transformers config says its checkpoint has, as `--dtype` names it; None: it does not."""
    from peftcore.estimating.dtype_rates import DTYPES
    from peftcore.observation.language_config import text_config

    found = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    return next((name for name, dtype in DTYPES.items() if found in (dtype, str(dtype).removeprefix("torch."))), None)


def of_base(
    model: str, task: str, dtype: str, device: str, labels: tuple[str, ...] = (), trained_in: str | None = None
) -> Choice:
    """Choose the dtype of a base that is to answer or to be measured.

    Args:
        trained_in: the dtype that it had when its adapter was trained, as the adapter's task says.
    """
    needs = RECORDED if trained_in == WIDE or (trained_in is None and task in data.LABELLED) else None
    return choose(dtype, device, _stored(model, task, labels, dtype), needs_fp32=needs)


def of_run(settings: Settings, labels: tuple[str, ...]) -> Choice:
    """Choose the dtype of a training run's base; of several processes the first one chooses. Collective."""
    chosen: list[Choice] = []
    ranks.once(lambda: chosen.append(_of_run(settings, labels)), together=True)
    (first,) = ranks.of_first(chosen)
    return first


def _of_run(settings: Settings, labels: tuple[str, ...]) -> Choice:
    dtype, device = base_dtype(settings.precision, settings.dtype), settings.device
    on_cpu = models.torch_device(device).type == "cpu"
    if on_cpu and settings.precision in MIXED:
        line = slow_line(settings.precision, "--precision auto with --dtype auto")
        return Choice(choose(dtype, device, None).dtype, None, line, is_warning=True)
    stored = _stored(settings.model, settings.task, labels, dtype)
    needs = None
    if on_cpu and stored == "bf16" and settings.adapter is not None:
        task = models.adapter_task(Path(settings.adapter), settings.labels)
        needs = RECORDED if task.dtype == WIDE or settings.task in data.LABELLED else None
    elif on_cpu and stored == "bf16":
        needs = TRAINED if _trains_base(settings, labels) else None
    return choose(dtype, device, stored, needs_fp32=needs)


def _trains_base(settings: Settings, labels: tuple[str, ...]) -> bool:
    """Whether the run trains parameters of the base themselves, such as biases or a head."""
    import peftcore

    if settings.method == FULL or settings.task in data.LABELLED:
        return True
    if not settings.method:  # several are asked about
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `apply` gives them
        try:
            planned = peftcore.plan(
                models.empty_model(settings.model, settings.task, labels), settings.method, **settings.fields
            )
        except PeftcoreError:
            return False  # what is wrong, the run itself says
    return any(kind == "trained parameter" for _, kind, _, _ in planned.rows)


def _stored(model: str, task: str, labels: tuple[str, ...], dtype: str) -> str | None:
    """What the checkpoint has, where that decides; a .gguf file's types are its own, and are read as fp32."""
    if dtype != AUTO or Path(model).suffix == ".gguf":
        return None
    return stored_dtype(models.load_config(model, task, labels))
