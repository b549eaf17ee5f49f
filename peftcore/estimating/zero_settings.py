"""Settings of DeepSpeed's ZeRO that change the memory of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from peftcore.architecture import text_config
from peftcore.errors import PeftcoreError, nearest

NAMES = {"zero1": 1, "zero2": 2, "zero3": 3}
DEFAULTS = {  # of DeepSpeed
    "reduce_bucket_size": 5 * 10**8,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_param_persistence_threshold": 10**5,
}


@dataclass(frozen=True)
class Zero:
    """Stage of ZeRO and fields of DeepSpeed's `zero_optimization` that change memory, by their names there.

    Args:
        reduce_bucket_size, stage3_prefetch_bucket_size, stage3_param_persistence_threshold: Elements; None: as
            transformers fills in `"auto"`, hidden_size², 0.9 hidden_size² and 10 hidden_size, or DeepSpeed's default
            where the model's config has no hidden size.
        overlap_comm: None: DeepSpeed's default, which is True for stage 3.
    """

    stage: int
    reduce_bucket_size: int | None = None
    stage3_prefetch_bucket_size: int | None = None
    stage3_param_persistence_threshold: int | None = None
    stage3_max_live_parameters: int = 10**9
    stage3_max_reuse_distance: int = 10**9
    overlap_comm: bool | None = None

    def filled(self, model: Any) -> Zero:
        """Return the settings with the values that `"auto"` has for this model."""
        config = getattr(model, "config", None)
        hidden = getattr(text_config(config), "hidden_size", None) if config is not None else None
        auto: dict[str, Any] = dict(DEFAULTS)
        if isinstance(hidden, int):
            auto = dict(zip(DEFAULTS, (hidden**2, int(0.9 * hidden**2), 10 * hidden), strict=True))
        return replace(self, **{name: value for name, value in auto.items() if getattr(self, name) is None})


def zero_of(shard: bool | str | Mapping[str, Any]) -> Zero | None:
    """Return the settings of ZeRO that `shard` names: `zero3`, or a dict with DeepSpeed's `stage`; None: no ZeRO.

    Raises:
        PeftcoreError: A name or value is unknown.
    """
    if isinstance(shard, str):
        if shard not in NAMES:
            raise PeftcoreError(
                f"shard must be True (FSDP2), False (DDP), {', '.join(NAMES)}, or a dict, found {shard!r}"
                f"{nearest(shard, NAMES)}"
            )
        return Zero(NAMES[shard])
    if isinstance(shard, bool) or not isinstance(shard, Mapping) or "stage" not in shard:
        return None
    known = [field.name for field in fields(Zero)]
    for name, value in shard.items():
        if name not in known:
            raise PeftcoreError(f"shard: '{name}' is not followed{nearest(name, known)}. Use only: {', '.join(known)}")
        least = 1 if name in ("stage", "reduce_bucket_size") else 0
        if name == "overlap_comm" or value == "auto":
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value != int(value) or value < least:
            raise PeftcoreError(f"shard: {name} must be a whole number from {least} or 'auto', found {value!r}")
    if shard["stage"] not in NAMES.values():
        raise PeftcoreError(f"shard: stage must be 1, 2 or 3, found {shard['stage']!r}")
    given: dict[str, Any] = {name: value for name, value in shard.items() if value != "auto"}
    whole: dict[str, Any] = {name: value if name == "overlap_comm" else int(value) for name, value in given.items()}
    return Zero(**whole)
