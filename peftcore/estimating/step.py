"""Settings of a training step: batch, precision, loss and processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peftcore.errors import PeftcoreError, nearest
from peftcore.training import RECOMPUTE

MIXED = ("bf16", "fp16")
LOSSES = ("sft", "dpo", "kto", "pairs", "triplets")
CHECKPOINTING = ("reentrant", "non-reentrant")
ZERO = (
    "peftcore does not estimate DeepSpeed's ZeRO. Use DeepSpeed's estimates: "
    "deepspeed.runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs_all_live, or "
    "deepspeed.runtime.zero.stage3.estimate_zero3_model_states_mem_needs_all_live"
)
_SHARD_ARGUMENTS = {"adapter_placement": ("replicate", "shard"), "reshard_after_forward": (True, False)}


@dataclass(frozen=True)
class Step:
    """Settings of a training step, named as in `peftcore train`, Trainer's arguments and `peftcore.shard`.

    Args:
        batch_size: Examples (pairs for `dpo` and `pairs`) per batch in each process or tensor-parallel group.
        length: Tokens per example. For `dpo`, tokens of a prompt with one answer; for `pairs`, tokens of one text.
        optimizer: Name of the optimizer, as in `peftcore train --optim`.
        gradient_accumulation: Batches per step.
        gradient_checkpointing: True, `"reentrant"` for PyTorch's older implementation, or Trainer's
            `gradient_checkpointing_kwargs`: `use_reentrant`, `every_n_layers`, and `context_fn` to keep the outputs of
            some operators (`torch.utils.checkpoint.create_selective_checkpoint_contexts`).
        mixed_precision: `bf16` or `fp16` for autocast, as with Trainer's `bf16=True`. None computes everything in the
            base's dtype.
        loss: `sft`, `dpo` or `kto` for TRL's trainers, including their reference passes; `pairs` or `triplets` for the
            contrastive loss of two or three texts per example and a model without an output head; None for the model's
            own loss.
        example: Inputs of one example from the model's processor: `input_ids` [1, length] and pixels or features.
            Batches repeat this example, and `length` becomes its number of tokens. None: texts.
        without_logits: Whether the model's own loss is computed without logits (`peftcore.loss_without_logits`). Always
            True for a model that has been switched to it.
        fused: Whether norms, gates, activations, dropout and attention are fused into one operator each
            (`peftcore.fuse`). Always True for a fused model. Estimates for GPUs assume that nothing is fused.
        recompute: `auto` or `none`, as in `peftcore.fuse`.
        ranks: Number of processes. The estimate is for one of them.
        shard: False means that each process has a full copy of the base (DDP), and True that the base is sharded
            (FSDP2) as by `peftcore.shard`. A dict contains arguments of `peftcore.shard`: `adapter_placement` and
            `reshard_after_forward`.
        tp_size: Number of ranks that share each layer by tensor parallelism, as transformers' `tp_size`. With `shard`,
            the other dimension of the mesh has `ranks / tp_size` ranks.
        per_sample: Number of adapters among the samples of a batch (`activate(..., per_sample=True)`). 0 means one
            adapter for all samples.

    Raises:
        PeftcoreError: A value is invalid.
    """

    batch_size: int = 8
    length: int = 512
    optimizer: str = "adamw_torch"
    gradient_accumulation: int = 1
    gradient_checkpointing: bool | str | Mapping[str, Any] = False
    mixed_precision: str | None = None
    loss: str | None = None
    example: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    without_logits: bool = False
    fused: bool = False
    recompute: str = "auto"
    ranks: int = 1
    shard: bool | Mapping[str, Any] = False
    tp_size: int = 1
    per_sample: int = 0

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        if self.example is not None:
            length = self._length_of_example(self.example)
            object.__setattr__(self, "length", length)  # the dataclass is frozen
        self._check_ranks()
        if not isinstance(self.shard, bool):
            self._check_shard(self.shard)

    def _check_numbers(self) -> None:
        for name in ("batch_size", "length", "gradient_accumulation", "ranks", "tp_size", "per_sample"):
            minimum = 0 if name == "per_sample" else 1
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < minimum:
                raise PeftcoreError(f"{name} must be a whole number of at least {minimum}, found {number!r}")

    def _check_choices(self) -> None:
        for name, choices in (("mixed_precision", MIXED), ("loss", LOSSES)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise PeftcoreError(
                    f"{name} must be None or one of {', '.join(choices)}, found {value!r}{nearest(str(value), choices)}"
                )
        if self.recompute not in RECOMPUTE:
            raise PeftcoreError(f"recompute must be one of {', '.join(RECOMPUTE)}, found {self.recompute!r}")
        kind = self.gradient_checkpointing
        if not isinstance(kind, (bool, Mapping)) and kind not in CHECKPOINTING:
            raise PeftcoreError(
                "gradient_checkpointing must be True, False, 'reentrant', 'non-reentrant' or a dict as in Trainer's "
                f"gradient_checkpointing_kwargs, found {kind!r}"
            )

    def _length_of_example(self, example: Mapping[str, Any]) -> int:
        """Return the number of tokens of the example, which replaces `length`."""
        ids = example.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
            shape = list(ids.shape) if isinstance(ids, Tensor) else ids
            raise PeftcoreError(f"example must be a batch of one, with input_ids [1, length], found {shape}")
        if self.loss in ("pairs", "triplets"):
            raise PeftcoreError(
                f"loss={self.loss!r} only works with texts, found an example. Omit one of the two arguments"
            )
        return ids.shape[1]

    def _check_ranks(self) -> None:
        if self.ranks % self.tp_size:
            raise PeftcoreError(f"ranks must be a multiple of tp_size ({self.tp_size}), found {self.ranks}")
        if self.ranks > self.tp_size > 1 and not self.is_sharded:
            raise PeftcoreError(
                f"ranks={self.ranks} with tp_size={self.tp_size} form several tensor-parallel groups, which need "
                f"FSDP2 to shard the base. Add shard=True, or estimate one group with ranks={self.tp_size}"
            )

    def _check_shard(self, shard: object) -> None:
        if str(shard).startswith("zero") or (isinstance(shard, Mapping) and "stage" in shard):
            raise PeftcoreError(f"shard={shard!r}: {ZERO}")
        if not isinstance(shard, Mapping):
            raise PeftcoreError(f"shard must be True (FSDP2), False (DDP) or a dict, found {shard!r}")
        for name, value in shard.items():
            if name not in _SHARD_ARGUMENTS:
                raise PeftcoreError(
                    f"shard: '{name}' is not supported{nearest(name, _SHARD_ARGUMENTS)}. Use only: "
                    f"{', '.join(_SHARD_ARGUMENTS)}"
                )
            if value not in _SHARD_ARGUMENTS[name]:
                raise PeftcoreError(f"shard: {name} must be one of {_SHARD_ARGUMENTS[name]}, found {value!r}")

    @property
    def copies(self) -> int:
        """Number of data-parallel ranks, each of which has its own batch."""
        return self.ranks // self.tp_size

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are sharded."""
        return self.shard is not False

    def _ways(self) -> str:
        """Return a description of the parallelism."""
        if self.tp_size == 1:
            return "FSDP2" if self.is_sharded else "DDP"
        fsdp = f"FSDP2 over {self.copies} x " if self.is_sharded else ""
        return f"{fsdp}tensor parallel over {self.tp_size}"

    def __str__(self) -> str:
        parts = [f"batch {self.batch_size} x {self.length}"]
        if self.per_sample:
            parts.append(f"{self.per_sample} adapters by sample")
        if self.loss is not None:
            parts.append(self.loss)
        if self.without_logits:
            parts.append("without logits")
        if self.fused:
            parts.append("fused operators" if self.recompute == "auto" else "fused operators without recomputation")
        if self.mixed_precision is not None:
            parts.append(f"mixed {self.mixed_precision}")
        if self.ranks > 1 or self.is_sharded:
            parts.append(f"one of {self.ranks} ranks ({self._ways()})")
        return ", ".join(parts)
