"""What decides the course of a run, and the run's folder, which keeps it.

OUTPUT/run.json       the settings; --resume refuses others
OUTPUT/run.toml       the same as options: `peftcore train --config OUTPUT/run.toml --output OTHER` repeats the run
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftcore.cli import config_file
from peftcore.errors import PeftcoreError

RUN_FILE = "run.json"
_NOT_THE_SAME = (
    ". --resume goes on with the run that lies in --output, where it was cut off; --adapter begins another from an "
    "adapter that is there"
)


@dataclass(frozen=True)
class Settings:
    """All that decides the course of a run. `fields` are those of the method's config.

    `data`: a path or a dataset's id, or several, whose examples are read together.
    `adapter`: the folder of the one that the run goes on with; `labels` are its classifier's.
    `validation`: share of the training examples that is kept from training, to choose among runs by.
    `other_data`: texts of another domain, whose loss before and after tells what is forgotten.
    """

    model: str
    data: str | list[str]
    task: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    labels: str | None = None
    columns: str | None = None
    chat_template: str | None = None
    eval_data: str | None = None
    holdout: float = 0.1
    validation: float | None = None
    other_data: str | None = None
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    grad_accum: int = 1
    lr: float = 2e-4
    scheduler: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_length: int = 512
    pack: bool = False
    beta: float | None = None
    dtype: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    seed: int = 0
    gradient_checkpointing: bool = False
    parallel: str | None = None
    ranks: int = 1
    optim: str = "adamw_torch"
    optim_args: str | None = None
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        """Raise a PeftcoreError unless all numbers are finite, and the rate and the number of epochs positive."""
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise PeftcoreError(f"{name} must be a finite number, found {value}")
        if self.lr <= 0 or self.epochs <= 0:
            raise PeftcoreError(f"lr and epochs must be above 0, found lr={self.lr:g}, epochs={self.epochs:g}")

    def to_json(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return json.loads(json.dumps(asdict(self)))


def prepare_folder(output: Path, settings: Settings, *, resume: bool, overwrite: bool) -> None:
    """Make the run's folder and note the settings there.

    Raises:
        PeftcoreError: it holds something already, or a run with other settings is to be resumed.
    """
    run_file = output / RUN_FILE
    if resume and run_file.exists():
        try:
            before = json.loads(run_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PeftcoreError(f"'{run_file}' cannot be read: {error}. Start anew: --overwrite") from error
        now = settings.to_json()
        for name in sorted(before.keys() | now.keys(), key=lambda name: (name != "adapter", name)):
            if before.get(name) != now.get(name):
                raise PeftcoreError(
                    f"the run in '{output}' had {name}={before.get(name)!r}, now it is {now.get(name)!r}. "
                    "To continue exactly, resume with the same settings; to start anew: --overwrite"
                    f"{_NOT_THE_SAME if name == 'adapter' else ''}"
                )
        return
    if output.exists() and not output.is_dir():
        raise PeftcoreError(f"'{output}' is a file. Give a folder: --output FOLDER")
    # Settings alone are of a run that failed before it made anything: nothing is lost.
    if output.is_dir() and any(path.name not in (RUN_FILE, config_file.NAME) for path in output.iterdir()):
        if not (overwrite and run_file.exists()):
            what = "a run" if run_file.exists() else "something else"
            hint = "--resume continues it, --overwrite starts anew" if run_file.exists() else "Give another folder"
            raise PeftcoreError(f"'{output}' holds {what} already. {hint}")
        for name in ("checkpoints", "adapter"):
            shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    run_file.write_text(json.dumps(settings.to_json(), indent=2) + "\n", encoding="utf-8")


def write_options(output: Path, settings: Settings, more: Mapping[str, Any]) -> None:
    """Write `run.toml`; `more` are options that are no settings, such as a sample's prompt."""
    options = {**settings.to_json(), "set": settings.fields, "output": str(output.resolve()), **more}
    for name in ("fields", "ranks", "validation", "other_data"):  # `set`; torchrun's; of `compare` alone
        del options[name]
    config_file.write(output / config_file.NAME, options)
