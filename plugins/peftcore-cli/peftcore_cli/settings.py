"""Settings that determine a run, stored in the run's folder.

OUTPUT/run.json       the settings; --resume refuses different ones
OUTPUT/.train.lock    locked while a process trains or compares there
OUTPUT/run.toml       the settings as options: `peftcore train --config OUTPUT/run.toml --output OTHER` repeats it
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from filelock import FileLock, Timeout

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore_cli import config_file, option_groups, options
from peftcore_cli.data import mixture

RUN_FILE = config_file.RUN_FILE
LOCK = ".train.lock"  # locked while a process trains or compares in the folder
_OF_RANKS = ("ranks", "parallel", "grad_accum")  # settings that may change together, see `for_these_ranks`
_NOT_THE_SAME = (
    ". --resume continues an interrupted run in --output; --adapter starts a new run from an existing adapter"
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Command-line options that determine a run, as passed by the user.

    Each option is defined once, here: `train` has an option for every field, and `compare`, `plan` and `suggest` select
    fields. `run.json`, `run.toml` and `--resume` are derived from the fields. `training/trainer_arguments.py` passes
    values on to Trainer, and `training/option_checks.py` refuses options that a task ignores.
    """

    eval_data: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=option_groups.DATA, help="Examples to evaluate on, in the same formats as --data."
        ),
    ] = None
    holdout: Annotated[
        float,
        typer.Option(
            rich_help_panel=option_groups.DATA,
            help=(
                "Examples of --data to hold out for evaluation, without --eval-data: a fraction, or a number if 1 or "
                "more."
            ),
        ),
    ] = 0.1
    epochs: Annotated[float, typer.Option(help="Number of passes over the examples.")] = 3.0
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=option_groups.TRAINING,
            help="Number of optimizer steps, instead of --epochs.",
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Examples per batch and process.")] = 8
    grad_accum: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=option_groups.TRAINING,
            help=("Gradient accumulation: batches per optimizer step."),
        ),
    ] = 1
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: the method's learning rate.")] = None
    scheduler: Annotated[
        str,
        typer.Option(
            rich_help_panel=option_groups.TRAINING,
            help="Learning-rate schedule from transformers: linear, cosine, constant, ...",
        ),
    ] = "linear"
    warmup: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="X",
            rich_help_panel=option_groups.TRAINING,
            help="Warmup: a fraction of all steps, or a number of steps if 1 or more.",
        ),
    ] = 0.03
    weight_decay: Annotated[
        float,
        typer.Option(min=0, metavar="X", rich_help_panel=option_groups.TRAINING, help="Weight decay of the optimizer."),
    ] = 0.0
    max_grad_norm: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="X",
            rich_help_panel=option_groups.TRAINING,
            help="Maximum gradient norm; 0 disables clipping.",
        ),
    ] = 1.0
    max_length: Annotated[int, typer.Option(min=2, metavar="N", help="Maximum number of tokens per example.")] = 512
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            rich_help_panel=option_groups.DATA,
            help="Tokenize examples during training instead of before, for large data.",
        ),
    ] = False
    pack: Annotated[
        bool,
        typer.Option(
            "--pack",
            rich_help_panel=option_groups.DATA,
            help="Pack several examples into each row of --max-length tokens, without attention between examples.",
        ),
    ] = False
    beta: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=option_groups.TASK,
            help="Strength of the KL penalty in DPO and KTO (default: 0.1) and in GRPO (default: 0); weight of "
            "the odds-ratio loss in ORPO (default: 0.1).",
        ),
    ] = None
    desirable_weight: Annotated[
        float,
        typer.Option(
            min=0, metavar="X", rich_help_panel=option_groups.TASK, help="Weight of desirable answers in KTO's loss."
        ),
    ] = 1.0
    undesirable_weight: Annotated[
        float,
        typer.Option(
            min=0, metavar="X", rich_help_panel=option_groups.TASK, help="Weight of undesirable answers in KTO's loss."
        ),
    ] = 1.0
    language: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=option_groups.TASK,
            help="Language of the recordings (asr), such as english; required by multilingual models.",
        ),
    ] = None
    pooling: Annotated[
        str,
        typer.Option(
            rich_help_panel=option_groups.TASK,
            help="Pooling of token embeddings (pairs): auto (the base's pooling), mean, cls, or last.",
        ),
    ] = "auto"
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            rich_help_panel=option_groups.TASK,
            help="Function that scores answers (grpo). Like TRL's reward functions, it takes prompts, completions "
            "and the other columns as keyword arguments, and returns a list of numbers.",
        ),
    ] = None
    generations: Annotated[
        int,
        typer.Option(
            min=2,
            metavar="N",
            rich_help_panel=option_groups.TASK,
            help="Number of answers to sample per prompt (grpo).",
        ),
    ] = 8
    temperature: Annotated[
        float, typer.Option(rich_help_panel=option_groups.TASK, help="Sampling temperature (grpo).")
    ] = 1.0
    teacher: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=option_groups.TASK,
            help="Teacher model to distil from (causal-lm): hub id or folder. Training also matches its next-token "
            "probabilities.",
        ),
    ] = None
    teacher_weight: Annotated[
        float,
        typer.Option(
            rich_help_panel=option_groups.TASK,
            help=(
                "Weight w of the distillation loss, above 0 and at most 1; the loss on the examples has the weight 1 "
                "- w."
            ),
        ),
    ] = 0.5
    labels: options.Labels = None
    columns: options.Columns = None
    chat_template: options.ChatTemplate = None
    quantize: Annotated[
        str | None, typer.Option(help="4-bit format of the frozen base, such as nf4; default: not quantized.")
    ] = None
    trust_remote_code: options.TrustRemoteCode = False
    dtype: options.Dtype = "auto"
    precision: Annotated[
        str,
        typer.Option(
            rich_help_panel=option_groups.MEMORY,
            help="Compute dtype: auto (the base's dtype), fp32, or bf16 or fp16 (mixed precision with an fp32 base).",
        ),
    ] = "auto"
    device: options.Device = "auto"
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=option_groups.TRAINING,
            help="Random seed of the held-out split, the adapter's initialisation, shuffling and dropout.",
        ),
    ] = 0
    parallel: options.Parallel = None
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            rich_help_panel=option_groups.MEMORY,
            help="Recompute activations in the backward pass, to save memory at the cost of time.",
        ),
    ] = False
    without_logits: Annotated[
        str,
        typer.Option(
            rich_help_panel=option_groups.MEMORY,
            help="Compute the loss without materializing logits (causal-lm): auto (on if a "
            "test on a few rows gives the same loss), on, or off.",
        ),
    ] = "auto"
    fuse: Annotated[
        str,
        typer.Option(
            rich_help_panel=option_groups.MEMORY,
            help="Fuse norms, gated activations and attention: auto (on CPUs), on, or off.",
        ),
    ] = "auto"
    recompute: Annotated[
        str,
        typer.Option(
            rich_help_panel=option_groups.MEMORY,
            help=(
                "What fused operators recompute in the backward pass, to save memory: auto (the outputs of norms and "
                "activations) or none."
            ),
        ),
    ] = "auto"
    optim: Annotated[
        str,
        typer.Option(
            rich_help_panel=option_groups.TRAINING,
            help="Optimizer: a name from transformers, or peftcore's paged_adamw_8bit or paged_adamw_32bit.",
        ),
    ] = "adamw_torch"
    optim_args: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=option_groups.TRAINING,
            help="Optimizer arguments, such as betas=(0.9,0.95) or budget=256MB.",
        ),
    ] = None
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=option_groups.EVALUATION,
            help="Steps between evaluations; default: 5 evaluations per run.",
        ),
    ] = None
    save_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=option_groups.OUTPUT,
            help="Steps between checkpoints; default: 5 checkpoints per run.",
        ),
    ] = None
    keep: Annotated[
        int,
        typer.Option(min=2, metavar="N", rich_help_panel=option_groups.OUTPUT, help="Number of checkpoints to keep."),
    ] = 2
    load_best: Annotated[
        bool,
        typer.Option(
            "--load-best",
            rich_help_panel=option_groups.EVALUATION,
            help="Save the adapter of the best evaluation instead of the last one.",
        ),
    ] = False
    metric: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=option_groups.EVALUATION,
            help=(
                "Held-out metric that selects the best evaluation: loss (default), accuracy, exact_match, rouge_l, "
                "..., or FILE.py:FUNCTION, called with the answers and the expected texts."
            ),
        ),
    ] = None
    eval_answers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=option_groups.EVALUATION,
            help=(
                "Number of held-out prompts to answer in each evaluation, for exact match and ROUGE-L; default: 100 "
                "if --metric needs answers, otherwise 0."
            ),
        ),
    ] = None
    answer_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=option_groups.EVALUATION,
            help="Maximum number of tokens to generate for an evaluation answer or a GRPO sample.",
        ),
    ] = 64
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=option_groups.EVALUATION,
            help="Stop after this many evaluations without improvement; implies --load-best.",
        ),
    ] = None


SWITCH = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class Display:
    """Options that change the output of a run, but not its training."""

    sample: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=option_groups.EVALUATION, help="Prompt to answer before and after training (causal-lm)."
        ),
    ] = None
    sample_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=option_groups.EVALUATION,
            help="Maximum number of tokens to generate for --sample.",
        ),
    ] = 48
    report_to: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=option_groups.OUTPUT,
            help="Services to log the training to, separated by commas: tensorboard, wandb, mlflow, ...",
        ),
    ] = None


@dataclass(frozen=True)
class Settings(RunOptions):
    """The settings that determine a run: its options with all defaults resolved.

    `data`: a path or dataset id, or a list of these. `fields`: fields of the method's config. `adapter`: folder of the
    adapter that training continues from. `labels`: labels of that adapter's classifier. `validation`: fraction of the
    training examples to set aside for choosing among runs. `other_data`: texts from another domain, whose loss before
    and after training measures forgetting.
    """

    model: str
    data: str | list[str]
    task: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    validation: float | None = None
    other_data: str | None = None
    ranks: int = 1
    lr: float = field(default=2e-4, kw_only=True)

    @classmethod
    def from_options(cls, run_options: RunOptions, **resolved_values: Any) -> Settings:
        """Return the settings of a run: the user's options, overridden by `resolved`."""
        values = {**vars(run_options), **resolved_values}
        if values["lr"] is None:  # nothing is trained
            del values["lr"]
        for name in ("eval_data", "other_data"):
            if values.get(name) and mixture.parse(values[name]).weight != 1:
                raise PeftcoreError(
                    f"--{name.replace('_', '-')} cannot be weighted, because each of its examples is measured once, "
                    f"found '{values[name]}'. Remove the weight"
                )
        for name in ("eval_data", "chat_template", "other_data"):
            if values.get(name):
                values[name] = options.absolute(values[name])
        for option in ("metric", "reward"):
            if ".py:" in (values.get(option) or ""):
                file, _, name = values[option].rpartition(":")
                values[option] = f"{options.absolute(file)}:{name}"
        return cls(**values)

    def __post_init__(self) -> None:
        """Raise a PeftcoreError unless all numbers are finite, and the learning rate and epochs are positive."""
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise PeftcoreError(f"{name} must be finite, found {value}")
        for option, choice in (("--without-logits", self.without_logits), ("--fuse", self.fuse)):
            if choice not in SWITCH:
                raise PeftcoreError(f"{option} must be one of {', '.join(SWITCH)}, found '{choice}'")
        from peftcore.training import RECOMPUTE  # imports PyTorch, which --help must not

        if self.recompute not in RECOMPUTE:
            raise PeftcoreError(f"--recompute must be one of {', '.join(RECOMPUTE)}, found '{self.recompute}'")
        if self.lr <= 0 or self.epochs <= 0:
            raise PeftcoreError(f"lr and epochs must be above 0, found lr={self.lr:g}, epochs={self.epochs:g}")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) of options that differ from their defaults, and a row that lists the other options."""
        leading = ("model", "data", "other_data", "task", "method", "adapter")
        options_to_show: dict[str, Any] = {name: getattr(self, name) for name in leading}
        options_to_show |= {f"set {name}": value for name, value in self.fields.items()}
        defaults: dict[str, Any] = {}
        for option in fields(self):
            if option.name not in (*leading, "fields"):
                value = getattr(self, option.name)
                (defaults if value == option.default and option.name != "lr" else options_to_show)[option.name] = value
        rows = [(name, _shown(value)) for name, value in options_to_show.items() if value is not None]
        default_options = (f"{name} {_shown(value)}" for name, value in defaults.items() if value is not None)
        return [*rows, ("defaults", ", ".join(default_options))]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def for_these_ranks(output: Path, settings: Settings) -> Settings:
    """Return settings that resume the run in `output` on the current number of ranks.

    `grad_accum` is changed so that the number of batches per optimizer step stays the same. The sampler draws batches
    of `batch_size` in an order that does not depend on the number of ranks, so every step takes the same examples.

    Raises:
        PeftcoreError: the ranks cannot share the batches of a step equally.
    """
    run_file = output / RUN_FILE
    if not run_file.exists():
        return settings
    saved_settings = _read(run_file)
    ranks, grad_accum = saved_settings.get("ranks", 1), saved_settings.get("grad_accum", 1)
    batches = _batches_per_step(saved_settings)
    from peftcore_cli.tasks import registered

    if ranks != settings.ranks and registered.find(settings.task).fixed_ranks:
        raise PeftcoreError(
            f"the run in '{output}' cannot be resumed on {settings.ranks} ranks, because it samples answers with one "
            f"random state per rank, on {ranks} ranks. Resume on {ranks} ranks, or start again: --overwrite"
        )
    if ranks == settings.ranks or settings.grad_accum != grad_accum:
        return settings
    if batches % settings.ranks:
        fitting = ", ".join(str(n) for n in range(1, batches + 1) if batches % n == 0)
        raise PeftcoreError(
            f"the run in '{output}' has {batches} batches per optimizer step (ranks={ranks}, "
            f"grad_accum={grad_accum}), which {settings.ranks} ranks cannot share equally. Resume on {fitting} "
            "ranks, or start again: --overwrite"
        )
    return replace(settings, grad_accum=batches // settings.ranks)


def _batches_per_step(settings: Mapping[str, Any]) -> int:
    return int(settings.get("ranks", 1)) * int(settings.get("grad_accum", 1))


def _read(run_file: Path) -> dict[str, Any]:
    from peftcore.plugin import safe_reading  # imports PyTorch, which --help must not

    try:
        settings: dict[str, Any] = safe_reading.parse_json(
            safe_reading.read_bytes(run_file, safe_reading.JSON_BYTES), run_file
        )
    except CheckpointError as error:
        raise PeftcoreError(f"{error}. Start again: --overwrite") from error
    return settings


@contextlib.contextmanager
def only_process(output: Path) -> Iterator[None]:
    """Create the folder, and lock it inside the block against other processes that train or compare in it.

    Raises:
        PeftcoreError: another process trains or compares in the folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / LOCK, timeout=0):
            yield
    except Timeout:
        raise PeftcoreError(
            f"another process is writing to '{output}'. Wait until it ends, or pass another folder: --output FOLDER"
        ) from None


def check_folder(output: Path, *, overwrite: bool) -> None:
    """Raise a PeftcoreError unless the folder is empty, or has a run that is to be overwritten."""
    if output.exists() and not output.is_dir():
        raise PeftcoreError(f"'{output}' is a file. Pass a folder: --output FOLDER")
    # A run that failed before it wrote anything leaves a folder that only contains settings.
    files_of_new_run = {RUN_FILE, config_file.NAME, LOCK}
    if not output.is_dir() or all(path.name in files_of_new_run for path in output.iterdir()):
        return
    if not (output / RUN_FILE).exists():
        raise PeftcoreError(f"'{output}' contains files that do not belong to a run. Pass another folder")
    if not overwrite:
        raise PeftcoreError(
            f"'{output}' already contains a run. Use --resume to continue it, or --overwrite to start again"
        )


def prepare_folder(output: Path, settings: Settings, *, resume: bool, overwrite: bool) -> None:
    """Create the run's folder and write the settings.

    Raises:
        PeftcoreError: the folder is not empty, or the run to resume has different settings.
    """
    run_file = output / RUN_FILE
    if resume and run_file.exists():
        saved, current = _read(run_file), settings.to_json()
        defaults = {option.name: option.default for option in fields(settings) if option.default is not MISSING}
        saved = {
            **defaults,
            "fuse": "off",
            **saved,
        }  # an option that did not exist when the run started has its default
        if _batches_per_step(saved) == _batches_per_step(current):
            current |= {name: saved[name] for name in _OF_RANKS}
        for name in sorted(saved.keys() | current.keys(), key=lambda name: (name != "adapter", name)):
            if saved.get(name) != current.get(name):
                hint = _NOT_THE_SAME if name == "adapter" else ""
                raise PeftcoreError(
                    f"the run in '{output}' has {name}={saved.get(name)!r}, but this command has "
                    f"{name}={current.get(name)!r}. Resume with the same settings, or start again: --overwrite{hint}"
                )
        return
    check_folder(output, overwrite=overwrite)
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    run_file.unlink(missing_ok=True)  # writing into a pipe would block
    run_file.write_text(json.dumps(settings.to_json(), indent=2) + "\n", encoding="utf-8")


def write_options(output: Path, settings: Settings, display: Display) -> None:
    """Write `run.toml`."""
    names = ("model", "data", "task", "method", "adapter", *(option_field.name for option_field in fields(RunOptions)))
    values = {name: getattr(settings, name) for name in names}
    further = {"set": settings.fields, "output": str(output.resolve()), **vars(display)}
    config_file.write(output / config_file.NAME, {**values, **further})
