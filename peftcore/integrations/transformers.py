"""transformers' `Trainer` for a model with adapters: checkpoints hold the adapters only, and resuming is exact.

    trainer = AdapterTrainer(model=peftcore.apply(model, ...), args=..., train_dataset=...)
    trainer.train(resume_from_checkpoint=latest_checkpoint(folder))

A checkpoint is Trainer's own folder (optimizer, scheduler, RNG, trainer state) with the adapter in
Hugging Face PEFT's format in place of the model; an adapter that is not named `default` lies in a
folder of its name, as in PEFT. The file `complete.json`, written last, lists every other file with
its size: a checkpoint without it, or whose files differ, was cut off.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from peftcore import checkpoint, engine

COMPLETE = "complete.json"


class AfterStep(TrainerCallback):
    """Tells the methods of the active adapters that an optimizer step is done, while gradients still stand."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        engine.after_step(kwargs["model"], state.global_step + 1, state.max_steps)


class AdapterTrainer(Trainer):
    """`Trainer` that writes and reads the trainable adapters in place of the whole model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(AfterStep())

    def _bare_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            save_adapters(self._bare_model(), output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            mark_complete(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_adapters(self._bare_model(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        restore_adapters(self._bare_model(), self.state.best_model_checkpoint)


def save_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write every adapter that trains: `default` into `folder` itself, others into `folder/NAME`."""
    for name in _training(model):
        checkpoint.save(model, checkpoint.place(Path(folder), name), adapter=name)


def restore_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Give every adapter that trains the values that `save_adapters` wrote.

    Raises:
        CheckpointError: one is not there, or does not fit.
    """
    for name in _training(model):
        checkpoint.restore(model, checkpoint.place(Path(folder), name), adapter=name)


def mark_complete(folder: Path) -> None:
    """Write `complete.json`, once every other file of the checkpoint has reached the disk."""
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE):
        with open(file, "rb") as content:
            os.fsync(content.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    beside = folder / f".{COMPLETE}.tmp"
    beside.write_text(json.dumps(sizes, indent=2) + "\n")
    os.replace(beside, folder / COMPLETE)


def latest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint in `folder`, or None; newer ones that were cut off are named in a warning."""
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal()
    }
    for _, path in sorted(found.items(), reverse=True):
        wrong = _what_is_wrong(path)
        if wrong is None:
            return str(path)
        warnings.warn(f"the checkpoint '{path}' was cut off while it was written ({wrong}); skipped", stacklevel=2)
    return None


def _what_is_wrong(folder: Path) -> str | None:
    try:
        sizes = json.loads((folder / COMPLETE).read_text())
    except (OSError, ValueError):
        return f"{COMPLETE} is missing"
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            return f"{name} has {found:,} of {size:,} bytes"
    return None


def _training(model: nn.Module) -> list[str]:
    state = engine.state_of(model)
    return [name for name in state.active if state.applied[name].trainable] if state else []
