"""Support transformers' `Trainer` and its subclasses (TRL's `SFTTrainer`) for models with adapters.

    trainer = Trainer(model=peftcore.apply(model, ...), args=..., train_dataset=...)
    trainer.train(resume_from_checkpoint=True)

A checkpoint is Trainer's usual folder (optimizer, scheduler, RNG, trainer state) with the adapter in Hugging Face
PEFT's format instead of the model; an adapter not named `default` is in a folder with its name, as in PEFT. The file
`complete.json` is written last and lists the sizes of all files except the model card. A checkpoint without
`complete.json`, or with missing or different files, is incomplete.

`AdapterTrainer`, a mixin for subclasses of Trainer, implements all of this. Importing this module patches
`Trainer.__init__` and `Trainer.train`, so that a trainer whose model has adapters becomes an instance of its class with
the mixin. A model sharded by `peftcore.shard` is trained with replicated adapters. If accelerate shards the model
(FSDP2), accelerate saves the optimizer's state.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    trainer as transformers_trainer,
)
from transformers.trainer import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftcore import engine
from peftcore.engine.replicas import broadcast_adapters, check_ranks, refuse_between_blocks
from peftcore.engine.training_hooks import NOTHING_TRAINS
from peftcore.errors import CheckpointError, PeftcoreError, warn
from peftcore.files import model_card
from peftcore.files.loading import restore
from peftcore.files.reading import adapter_folder
from peftcore.files.saving import save_each
from peftcore.plugin import ranks, safe_reading, sharded
from peftcore.training.integrations.trainer_loss import add_extra_loss, logged
from peftcore.training.integrations.trainer_optimizer import (
    PagingReport,
    bare_model,
    create_optimizer,
    create_scheduler,
)
from peftcore.training.integrations.trl_checks import refuse_arguments, refuse_before_training

COMPLETE = "complete.json"
OLDEST = "5.20"  # version of transformers, as in pyproject.toml
_QUANTIZED_WITH_ADAPTERS = "_hf_peft_config_loaded"
_BEST = ("best_metric", "best_global_step", "best_model_checkpoint")  # of TrainerState
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# `torch.save` reports a failed write by these words, without errno.
_TORCH_WRITE_ERRORS = ("iostream error", "inline_container.cc")


class AfterStep(TrainerCallback):
    """Callback that calls the `after_step` of the active adapters' methods while gradients still exist."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if getattr(
            optimizer, "step_was_skipped", False
        ):  # skipped by the gradient scaler, because of NaN or Inf gradients
            return
        if engine.state_of(model) is None:  # unwraps DDP and torch.compile; accelerate's function takes a millisecond
            model = extract_model_from_parallel(model, keep_torch_compile=False)
        engine.after_step(model, state.global_step + 1, state.max_steps, optimizer=optimizer)


_Base: Any = Trainer if TYPE_CHECKING else object  # a mixin before `Trainer` or one of its subclasses


class AdapterTrainer(_Base):
    """Mixin for subclasses of `Trainer` that train a model with adapters: checkpoints, optimizers and losses.

    A trainer gets the mixin automatically if its model has adapters. Without adapters its methods behave like
    `Trainer`'s.
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if not _has_adapters(self):
            return super().create_optimizer(*args, **kwargs)
        return create_optimizer(self, super().create_optimizer, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if not _has_adapters(self):
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        return create_scheduler(self, super().create_scheduler, num_training_steps, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs:
            logs.update(logged(self))
        return super().log(logs, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model = bare_model(self)
        if not _has_adapters(self):
            return super()._prepare_for_training(*args, **kwargs)
        if not sharded.is_sharded(model):
            check_ranks(model)  # DDP's own message does not name the adapter
            if self.is_fsdp_enabled and ranks.count() > 1:  # DDP sets them itself
                refuse_between_blocks(model)
                broadcast_adapters(model)
        add_extra_loss(self, model)
        return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # In a resumed run with several ranks, Trainer and accelerate do not reach the innermost sampler. It would
        # repeat the order of the first epoch, so that some rows would be repeated and others skipped.
        sampler: Any = kwargs.get("train_dataloader")
        while getattr(sampler, "batch_sampler", None) is not None:
            sampler = sampler.batch_sampler
        sampler = getattr(sampler, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _has_adapters(self) or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir)  # the original would gather the full model first
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder, model = output_dir or self.args.output_dir, bare_model(self)
        if not _has_adapters(self) or engine.require_state(model).merged is not None:
            return super()._save(output_dir, state_dict)
        if not self.args.should_save and not sharded.is_sharded(model):
            return None
        save_adapters(model, folder)
        if self.args.should_save:
            processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if processor is not None:
                processor.save_pretrained(folder)
            torch.save(self.args, Path(folder) / transformers_trainer.TRAINING_ARGS_NAME)
        return None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self._best_before = {name: getattr(self.state, name) for name in _BEST}
        return bool(super()._determine_best_metric(metrics, trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint.

        If the disk is full, remove the checkpoint and warn; with several ranks, raise the error.
        """
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            self._write_checkpoint(model, trial, run, folder)
        except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
            if self.args.world_size > 1 or not is_disk_full(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            if self.state.best_global_step == self.state.global_step:
                for name, value in self._best_before.items():
                    setattr(self.state, name, value)
            warn(
                f"checkpoint '{folder}' was not written, because the disk seems to be full: {error}. Training "
                "continues without it. Free space before the run ends and saves the adapter"
            )

    def _write_checkpoint(self, model: nn.Module, trial: Any, run: Path, folder: Path) -> None:
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)
        # Older checkpoints are deleted only after this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each rank writes its RNG state
        if self.args.should_save:
            mark_complete(folder)
            transformers_trainer.rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not _has_adapters(self) or not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        from accelerate.utils import save_fsdp_optimizer  # the original would also save the full model

        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / transformers_trainer.SCHEDULER_NAME)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not _has_adapters(self):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        reason = _why_incomplete(Path(resume_from_checkpoint))
        if reason is not None:
            raise CheckpointError(
                f"checkpoint '{resume_from_checkpoint}' is incomplete ({reason}). To resume from the newest complete "
                "checkpoint, call train(resume_from_checkpoint=True)"
            )
        return restore_adapters(bare_model(self), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not _has_adapters(self):
            return super()._load_best_model()
        return restore_adapters(bare_model(self), self.state.best_model_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write Trainer's model card with metadata that tells hubs that the files are an adapter."""
        if not _has_adapters(self) or not self.is_world_process_zero():
            return super().create_model_card(*args, **kwargs)
        file, model = Path(self.args.output_dir) / model_card.FILE, bare_model(self)
        file.unlink(missing_ok=True)  # Trainer would set library_name to peft, and ask the model for its card
        super().create_model_card(*args, **kwargs)
        head, body = model_card.split(file.read_text(encoding="utf-8"))
        metadata, *_ = model_card.card(model, _training(model), None)
        file.write_text(f"---\n{model_card.update_header(head, metadata)}---\n{body}", encoding="utf-8")
        return None


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed because the disk is full, even if a library has wrapped the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
            return True
        words = (*_TORCH_WRITE_ERRORS, *map(os.strerror, _DISK_FULL))  # safetensors quotes strerror
        if isinstance(cause, (RuntimeError, SafetensorError)) and any(word in str(cause) for word in words):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _has_adapters(trainer: Trainer) -> bool:
    model = None if getattr(trainer, "model", None) is None else bare_model(trainer)
    return model is not None and engine.state_of(model) is not None


_classes: dict[type[Trainer], type[Trainer]] = {}  # {class without the mixin: class with it}


def _with_mixin(cls: type[Trainer]) -> type[Trainer]:
    if cls not in _classes:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _classes[cls] = types.new_class(cls.__name__, (AdapterTrainer, cls), exec_body=lambda ns: ns.update(names))
    return _classes[cls]


def _adopt(trainer: Trainer) -> None:
    """Add the mixin and its callbacks to a trainer whose model has adapters."""
    if not _has_adapters(trainer):
        return
    if Version(transformers.__version__) < Version(OLDEST):
        raise PeftcoreError(
            f"cannot train adapters with the Trainer of transformers {transformers.__version__}, because peftcore "
            f"needs transformers {OLDEST} or later. Run: pip install 'transformers>={OLDEST}'"
        )
    refuse_arguments(trainer)
    callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
    for callback in (AfterStep, PagingReport):
        if callback not in callbacks:
            trainer.add_callback(callback())
    if not isinstance(trainer, AdapterTrainer):
        trainer.__class__ = _with_mixin(type(trainer))
    model = bare_model(trainer)
    if any(map(sharded.is_dtensor, model.parameters())):
        if any(sharded.is_dtensor(p) for p in model.parameters() if p.requires_grad):
            raise PeftcoreError(
                "Trainer saves the optimizer's state on rank 0, which does not work for sharded adapters. Replicate "
                "them: peftcore.shard(model, adapter_placement='replicate'). Adapters on sharded experts (ep_size) "
                "need a custom training loop"
            )
        # Trainer neither wraps nor moves models that transformers shards, and it can save the state of replicated
        # adapters.
        trainer.is_distributed_loading_by_transformers = True


@contextlib.contextmanager
def _adapters_on_quantized(model: nn.Module) -> Iterator[None]:
    """Mark the model as having adapters, since Trainer refuses a quantized model without PEFT's attribute."""
    old_value = model.__dict__.get(_QUANTIZED_WITH_ADAPTERS)
    model.__dict__[_QUANTIZED_WITH_ADAPTERS] = True
    try:
        yield
    finally:
        del model.__dict__[_QUANTIZED_WITH_ADAPTERS]
        if old_value is not None:
            model.__dict__[_QUANTIZED_WITH_ADAPTERS] = old_value


@contextlib.contextmanager
def _divided_by_plan(model: nn.Module, arguments: TrainingArguments | None) -> Iterator[None]:
    """Allow Trainer to save checkpoints if transformers has sharded the base and only adapters are trained.

    Raises:
        PeftcoreError: accelerate has no tensor parallelism on this device.
    """
    is_divided = getattr(model, "is_distributed_loading_by_transformers", False)
    changed = arguments if is_divided else None
    saved_only_model = changed is not None and changed.save_only_model
    if changed is not None:  # otherwise Trainer refuses to save, because of the state of DTensors
        changed.save_only_model = True
    try:
        yield
    except ValueError as error:
        if "MULTI_CPU" not in str(error):
            raise
        raise PeftcoreError(
            "Trainer distributes batches by accelerate's ParallelismConfig, which does not support tensor "
            "parallelism on CPUs. Train on GPUs, or in a custom training loop"
        ) from error
    finally:
        if changed is not None:
            changed.save_only_model = saved_only_model


def _patch_trainer() -> None:
    """Patch Trainer to add the mixin if the model has adapters: on creation, or with `model_init` in `train`."""
    own_init, own_train = Trainer.__init__, Trainer.train

    @functools.wraps(own_init)
    def init(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        with contextlib.ExitStack() as stack:
            if isinstance(model, nn.Module) and engine.state_of(model) is not None:
                stack.enter_context(_adapters_on_quantized(model))
                stack.enter_context(_divided_by_plan(model, kwargs.get("args", args[1] if len(args) > 1 else None)))
            own_init(trainer, *args, **kwargs)
        _adopt(trainer)

    @functools.wraps(own_train)
    def train(trainer: Trainer, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        _adopt(trainer)
        if _has_adapters(trainer):
            model = bare_model(trainer)
            if not any(p.requires_grad for p in model.parameters()):
                raise PeftcoreError(NOTHING_TRAINS)
            refuse_before_training(trainer, model)
            if resume_from_checkpoint is True:
                resume_from_checkpoint = latest_checkpoint(trainer.args.output_dir)
                if resume_from_checkpoint is None:
                    raise CheckpointError(f"'{trainer.args.output_dir}' has no complete checkpoint to resume from")
        return own_train(trainer, resume_from_checkpoint, *args, **kwargs)

    Trainer.__init__, Trainer.train = init, train


def save_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save every trainable adapter: `default` to `folder`, all others to `folder/NAME`."""
    save_each(model, folder, _training(model))


def restore_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load the values that `save_adapters` wrote into every trainable adapter.

    Raises:
        CheckpointError: an adapter is missing or does not fit the model.
    """
    for name in _training(model):
        restore(model, adapter_folder(Path(folder), name), adapter=name)


def mark_complete(folder: Path) -> None:
    """Write `complete.json` after all other files of the checkpoint have reached the disk."""
    sizes, unlisted = {}, (COMPLETE, model_card.FILE)  # users may edit the card
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in unlisted):
        with open(file, "rb") as content:
            os.fsync(content.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    partial = folder / f".{COMPLETE}.tmp"
    partial.write_text(json.dumps(sizes, indent=2) + "\n")
    os.replace(partial, folder / COMPLETE)


def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint in `folder`, or None. A warning names newer incomplete checkpoints."""
    checkpoints = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal()
    }
    for _, path in sorted(checkpoints.items(), reverse=True):
        reason = _why_incomplete(path)
        if reason is None:
            return str(path)
        warn(f"checkpoint '{path}' is incomplete ({reason}) and was skipped")
    return None


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Return whether a checkpoint has all its files with the recorded sizes."""
    return _why_incomplete(Path(folder)) is None


def _why_incomplete(folder: Path) -> str | None:
    file = folder / COMPLETE
    try:
        sizes = safe_reading.parse_json(safe_reading.read_bytes(file, safe_reading.JSON_BYTES), file)
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except CheckpointError:
        sizes = None
    if not isinstance(sizes, dict):
        return f"{COMPLETE} is damaged"
    for name, size in sizes.items():
        bytes_there = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if bytes_there != size:
            return f"{name} has {bytes_there:,} instead of {size:,} bytes"
    return None


def _training(model: nn.Module) -> list[str]:
    state = engine.state_of(model)
    return [name for name in state.active if state.applied[name].trainable] if state else []


_patch_trainer()
