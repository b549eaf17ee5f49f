"""transformers' `Trainer` and its subclasses (TRL's `SFTTrainer`) on a model with adapters.

    trainer = Trainer(model=peftcore.apply(model, ...), args=..., train_dataset=...)
    trainer.train(resume_from_checkpoint=True)

A checkpoint is Trainer's own folder (optimizer, scheduler, RNG, trainer state) with the adapter in Hugging Face PEFT's
format instead of the model; an adapter not named `default` is in a folder of its name, as in PEFT. The file
`complete.json`, written last, lists every other file but the model card with its size: a checkpoint without it, or
whose files differ, is incomplete.

Importing this module patches `Trainer` (see `pretrained.py`). A model sharded by `peftcore.shard` is trained as it is,
with replicated adapters; for one that accelerate shards (FSDP2), accelerate saves the optimizer's state.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    trainer as transformers_trainer,
)
from transformers.trainer import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftcore import engine, ranks
from peftcore.errors import CheckpointError, PeftcoreError, warn
from peftcore.files import model_card
from peftcore.files.loading import restore
from peftcore.files.reading import adapter_folder
from peftcore.files.saving import save_each
from peftcore.integrations.patching import patch
from peftcore.integrations.reference_model import check_reference, patch_trainers, reference_of, refuse_averages
from peftcore.integrations.trainer_loss import add_extra_loss, logged
from peftcore.integrations.trainer_optimizer import PagingReport, bare_model, create_optimizer, create_scheduler
from peftcore.parallel import check_ranks, give_adapters, refuse_between_blocks

COMPLETE = "complete.json"
_QUANTIZED_WITH_ADAPTERS = "_hf_peft_config_loaded"
_CARD = "_peftcore_card"  # on a trainer: the model card that it has written


class AfterStep(TrainerCallback):
    """Callback that calls `after_step` of the active adapters' methods while gradients still exist."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if getattr(optimizer, "step_was_skipped", False):  # by a scaler, because of NaN or Inf gradients
            return
        if engine.state_of(model) is None:  # inside DDP or torch.compile; asking accelerate takes a millisecond
            model = extract_model_from_parallel(model, keep_torch_compile=False)
        engine.after_step(model, state.global_step + 1, state.max_steps, optimizer=optimizer)


def _model_of(trainer: Trainer) -> nn.Module | None:
    """Like `bare_model`, but None if the trainer has no model yet."""
    return None if getattr(trainer, "model", None) is None else bare_model(trainer)


def _init(own: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    model = kwargs.get("model", args[0] if args else None)
    with contextlib.ExitStack() as stack:
        if isinstance(model, nn.Module) and engine.state_of(model) is not None:
            stack.enter_context(_adapters_on_quantized(model))
            stack.enter_context(_divided_by_plan(model, kwargs.get("args", args[1] if len(args) > 1 else None)))
        own(trainer, *args, **kwargs)
    model = _model_of(trainer)  # `model_init` may have made it
    if model is None or engine.state_of(model) is None:
        return
    check_reference(trainer, model)
    _add_callbacks(trainer)
    if any(map(ranks.is_dtensor, model.parameters())):
        if any(ranks.is_dtensor(p) for p in model.parameters() if p.requires_grad):
            raise PeftcoreError(
                "Trainer keeps the optimizer's state on rank 0 and cannot keep that of sharded adapters. "
                "Replicate them: peftcore.shard(model, adapter_placement='replicate'). Adapters on experts that ranks "
                "share out (ep_size) train in a loop of your own"
            )
        # Models that transformers shards are neither wrapped nor moved; replicated adapters' state can be saved.
        trainer.is_distributed_loading_by_transformers = True


def _add_callbacks(trainer: Trainer) -> None:
    there = [type(callback) for callback in trainer.callback_handler.callbacks]
    for callback in (AfterStep, PagingReport):
        if callback not in there:
            trainer.add_callback(callback())


@contextlib.contextmanager
def _adapters_on_quantized(model: nn.Module) -> Iterator[None]:
    """Mark the model as having adapters: Trainer refuses a quantized model unless it has PEFT's attribute."""
    before = model.__dict__.get(_QUANTIZED_WITH_ADAPTERS)
    model.__dict__[_QUANTIZED_WITH_ADAPTERS] = True
    try:
        yield
    finally:
        del model.__dict__[_QUANTIZED_WITH_ADAPTERS]
        if before is not None:
            model.__dict__[_QUANTIZED_WITH_ADAPTERS] = before


@contextlib.contextmanager
def _divided_by_plan(model: nn.Module, arguments: Any) -> Iterator[None]:
    """Let Trainer keep checkpoints of a base that transformers has divided, of which the adapters alone are trained.

    Raises:
        PeftcoreError: accelerate has no tensor parallelism on this device.
    """
    keeps = arguments is not None and getattr(model, "is_distributed_loading_by_transformers", False)
    before = arguments.save_only_model if keeps else None
    if keeps:  # else Trainer raises an error: it would save the state of DTensors
        arguments.save_only_model = True
    try:
        yield
    except ValueError as error:
        if "MULTI_CPU" not in str(error):
            raise
        raise PeftcoreError(
            "Trainer divides batches by accelerate's ParallelismConfig, which has no tensor parallelism on CPUs. Train "
            "on GPUs, or in a loop of your own"
        ) from error
    finally:
        if keeps:
            arguments.save_only_model = before


def _prepare_for_training(trainer: Trainer, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not ranks.is_sharded(bare_model(trainer)):
        check_ranks(bare_model(trainer))  # DDP's own message does not name the adapter
        if trainer.is_fsdp_enabled and ranks.count() > 1:  # DDP sets them itself
            refuse_between_blocks(bare_model(trainer))
            give_adapters(bare_model(trainer))
    add_extra_loss(trainer, bare_model(trainer))
    return own(*args, **kwargs)


def _log(trainer: Trainer, own: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
    if "loss" in logs:
        logs.update(logged(trainer))
    return own(logs, *args, **kwargs)


def _train(
    trainer: Trainer, own: Callable[..., Any], resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if not any(p.requires_grad for p in bare_model(trainer).parameters()):
        raise PeftcoreError(
            "no parameter of the model trains: its adapters are frozen, inactive, or merged. Activate one: "
            "peftcore.unmerge(model), peftcore.activate(model, 'NAME')"
        )
    refuse_averages(trainer)  # callbacks may have been added since the trainer was made
    _add_callbacks(trainer)  # Trainer was not patched yet if `model_init` applied the first adapter of this process
    if resume_from_checkpoint is True:
        resume_from_checkpoint = latest_checkpoint(trainer.args.output_dir)
        if resume_from_checkpoint is None:
            raise CheckpointError(f"'{trainer.args.output_dir}' has no complete checkpoint to resume from")
    return own(resume_from_checkpoint, *args, **kwargs)


def _run_epoch(trainer: Trainer, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Set the epoch of the innermost sampler, which Trainer and accelerate do not reach in a resumed run of ranks.

    The order would be the first epoch's: rows would be repeated and left out, and the run would not be resumed exactly.
    """
    found: Any = kwargs.get("train_dataloader")
    while getattr(found, "batch_sampler", None) is not None:
        found = found.batch_sampler
    sampler = getattr(found, "sampler", None)
    if sampler is not None and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(kwargs["epoch"])
    return own(*args, **kwargs)


def _save_model(
    trainer: Trainer, own: Callable[..., Any], output_dir: str | None = None, _internal_call: bool = False
) -> None:
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return own(output_dir, _internal_call)
    trainer._save(output_dir)  # the original would gather the whole model first
    if trainer.args.push_to_hub and not _internal_call:
        trainer.push_to_hub(commit_message="Model save")
    return None


def _save(trainer: Trainer, own: Callable[..., Any], output_dir: str | None = None, state_dict: Any = None) -> None:
    folder = output_dir or trainer.args.output_dir
    if engine.require_state(bare_model(trainer)).merged is not None:
        return own(output_dir, state_dict)
    if not trainer.args.should_save and not ranks.is_sharded(bare_model(trainer)):
        return None
    save_adapters(bare_model(trainer), folder)
    if trainer.args.should_save:
        reader = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        if reader is not None:
            reader.save_pretrained(folder)
        torch.save(trainer.args, Path(folder) / transformers_trainer.TRAINING_ARGS_NAME)
    return None


def _save_checkpoint(trainer: Trainer, own: Callable[..., Any], model: nn.Module, trial: Any) -> None:
    run = Path(trainer._get_output_dir(trial=trial))
    folder = run / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    if trainer.args.should_save:
        (folder / COMPLETE).unlink(missing_ok=True)
    # Older checkpoints are deleted after this one is complete.
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    try:
        own(model, trial)
    finally:
        trainer.args.save_total_limit = limit
    reference = reference_of(trainer)
    if trainer.args.should_save and reference is not None:
        reference.save(folder)
    trainer.accelerator.wait_for_everyone()  # each rank writes its RNG state
    if trainer.args.should_save:
        mark_complete(folder)
        transformers_trainer.rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )


def _save_optimizer_and_scheduler(trainer: Trainer, own: Callable[..., Any], output_dir: str) -> None:
    if not trainer.is_fsdp_enabled:
        return own(output_dir)
    from accelerate.utils import save_fsdp_optimizer  # the original would also save the whole model

    accelerator = trainer.accelerator
    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, trainer.optimizer, trainer.model, output_dir)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir) / transformers_trainer.SCHEDULER_NAME)
    return None


def _load_from_checkpoint(
    trainer: Trainer, own: Callable[..., Any], resume_from_checkpoint: str, model: nn.Module | None = None
) -> None:
    wrong = _what_is_wrong(Path(resume_from_checkpoint))
    if wrong is not None:
        raise CheckpointError(
            f"checkpoint '{resume_from_checkpoint}' is incomplete ({wrong}). train(resume_from_checkpoint=True) "
            "uses the newest complete one"
        )
    restore_adapters(bare_model(trainer), resume_from_checkpoint)
    reference = reference_of(trainer)
    if reference is None:
        return
    was_another = reference.restore(resume_from_checkpoint)
    if was_another and getattr(trainer.args, "precompute_ref_log_probs", False):
        raise CheckpointError(
            "the reference's log-probabilities were precomputed with other adapters than the run of "
            f"'{resume_from_checkpoint}' started with. Pass the model as it was then, from the same seed or "
            "files, or set precompute_ref_log_probs=False"
        )


def _load_best_model(trainer: Trainer, own: Callable[..., Any]) -> None:
    restore_adapters(bare_model(trainer), trainer.state.best_model_checkpoint)


def _create_model_card(trainer: Trainer, own: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Write Trainer's model card with the metadata of the adapters.

    A card that this trainer has not written is somebody's: it is only updated, between its marks.
    """
    if not trainer.is_world_process_zero():
        return
    file = Path(trainer.args.output_dir) / model_card.FILE
    model = bare_model(trainer)
    card = model_card.card(model, _training(model), None)
    there = file.read_text(encoding="utf-8") if file.is_file() else None
    if there is None or there == trainer.__dict__.get(_CARD):
        file.unlink(missing_ok=True)  # with `peft` Trainer would ask the model for PEFT's own card
        own(*args, **kwargs)
        head, body = model_card.split(file.read_text(encoding="utf-8"))
        text = f"---\n{model_card.updated(head, card[0])}---\n{body}"
        trainer.__dict__[_CARD] = text
        file.write_text(text, encoding="utf-8")
    else:
        model_card.write(file.parent, *card)


def save_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save every trainable adapter: `default` to `folder`, others to `folder/NAME`."""
    save_each(model, folder, _training(model))


def restore_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load into every trainable adapter the values that `save_adapters` wrote.

    Raises:
        CheckpointError: an adapter is missing or does not fit.
    """
    for name in _training(model):
        restore(model, adapter_folder(Path(folder), name), adapter=name)


def mark_complete(folder: Path) -> None:
    """Write `complete.json`, after every other file of the checkpoint has reached the disk."""
    sizes, unlisted = {}, (COMPLETE, model_card.FILE)  # people edit the card
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in unlisted):
        with open(file, "rb") as content:
            os.fsync(content.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    partial = folder / f".{COMPLETE}.tmp"
    partial.write_text(json.dumps(sizes, indent=2) + "\n")
    os.replace(partial, folder / COMPLETE)


def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint in `folder`, or None. Newer incomplete ones are named in a warning."""
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal()
    }
    for _, path in sorted(found.items(), reverse=True):
        wrong = _what_is_wrong(path)
        if wrong is None:
            return str(path)
        warn(f"checkpoint '{path}' is incomplete ({wrong}) and was skipped")
    return None


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Return whether a checkpoint has all its files, in the sizes that were written."""
    return _what_is_wrong(Path(folder)) is None


def _what_is_wrong(folder: Path) -> str | None:
    try:
        sizes = json.loads((folder / COMPLETE).read_text())
    except OSError:
        return f"{COMPLETE} is missing"
    except ValueError:
        sizes = None
    if not isinstance(sizes, dict):
        return f"{COMPLETE} is damaged"
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            return f"{name} has {found:,} of {size:,} bytes"
    return None


def _training(model: nn.Module) -> list[str]:
    state = engine.state_of(model)
    return [name for name in state.active if state.applied[name].trainable] if state else []


def _patch_trainer() -> None:
    own = Trainer.__init__

    @functools.wraps(own)
    def init(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        _init(own, trainer, *args, **kwargs)

    Trainer.__init__ = init
    for ours in (
        create_optimizer,
        create_scheduler,
        _prepare_for_training,
        _train,
        _run_epoch,
        _save_model,
        _save,
        _save_checkpoint,
        _save_optimizer_and_scheduler,
        _load_from_checkpoint,
        _load_best_model,
        _create_model_card,
        _log,
    ):
        name = ours.__name__ if hasattr(Trainer, ours.__name__) else ours.__name__[1:]
        patch(Trainer, name, ours, _model_of)
    patch_trainers(Trainer)


_patch_trainer()
