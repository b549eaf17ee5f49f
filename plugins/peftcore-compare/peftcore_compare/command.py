"""`peftcore compare`: train several methods on the same model and examples.

OUTPUT/report.json, table.md, compare.png    the results; the first two are rewritten after every run
OUTPUT/compare.toml                          the options, for `peftcore compare --config` to repeat the comparison
OUTPUT/runs/METHOD/seed-N/                   one run, in its own process
OUTPUT/runs/METHOD/lr-RATE/seed-N/           one run with --search
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from peftcore_cli import completion, config_file, options
from peftcore_cli.console import command, out, require, say, warn
from peftcore_cli.settings import LOCK, RunOptions, Settings, only_process
from rich.markup import escape

import peftcore
from peftcore import PeftcoreError

if TYPE_CHECKING:
    from peftcore_compare.report import ComparisonReport

EXAMPLES = (
    'peftcore compare -m MODEL -d chat.jsonl -o both --method METHOD --method "OTHER FIELD=VALUE lr=1e-3" --seeds 3',
    "peftcore compare -m MODEL -d chat.jsonl -o all --search lr=3e-4,3e-3,3e-2",
)

FULL_LEARNING_RATE = 5e-5
# Options of the runs that the user may set.
_OPTIONS = (
    "columns",
    "chat_template",
    "eval_data",
    "other_data",
    "holdout",
    "epochs",
    "steps",
    "batch_size",
    "max_length",
    "dtype",
    "device",
    "trust_remote_code",
)


@dataclass(frozen=True, kw_only=True)
class ComparedOptions(RunOptions):
    """Options of the compared runs."""

    other_data: Annotated[
        str | None,
        typer.Option(
            help=("Texts from another domain; the increase of the loss on them measures forgetting (causal-lm).")
        ),
    ] = None
    dtype: options.WrittenDtype = "auto"


@dataclass(frozen=True)
class Candidate:
    """A method with its settings; `label` is the user's text, without lr unless two labels would be equal."""

    label: str
    method: str
    lr: float
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the candidate's folder under `runs`, at most 255 bytes."""
        name = re.sub(r"[^\w=.,-]+", " ", self.label)
        return name if len(name) <= 60 else f"{name[:50]} {hashlib.sha256(name.encode()).hexdigest()[:8]}"


def compare(
    context: typer.Context,
    model: options.Model,
    data: options.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and the runs.")],
    *,
    config: options.Config = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'NAME FIELD=VALUE ...'",
            autocompletion=completion.methods,
            help=(
                "Method to compare, with fields of its config and lr=RATE. Repeatable; default: every installed method."
            ),
        ),
    ] = None,
    full: Annotated[bool, typer.Option(help="Also run full fine-tuning if it fits into memory.")] = True,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each method, with seeds 0, 1, ...")] = 3,
    search: Annotated[
        str | None,
        typer.Option(
            metavar="lr=RATE,RATE,...",
            help=(
                "Learning rates to try for each method, with the first seed. The rate with the lowest loss on a "
                "validation split of the training examples (--holdout) is used."
            ),
        ),
    ] = None,
    task: options.Task = None,
    run_options: Annotated[ComparedOptions, _OPTIONS],
    resume: Annotated[
        bool, typer.Option("--resume", help=("Continue the comparison in --output, keeping finished runs."))
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the comparison in --output and start again.")
    ] = False,
) -> None:
    """Compare methods: held-out accuracy or loss, parameters, size on disk, peak memory and time per step.

    Each method is trained with `peftcore train`. Its learning rate is the method's default, lr=RATE, or the best rate
    of --search, which tries the same rates for all methods. Failed runs are listed with the reason. `--method full` is
    full fine-tuning.
    """
    from peftcore_cli import base_files, data_files, registered, row_reading

    run_options = config_file.in_force(context, run_options)
    names = data_files.parse_columns(run_options.columns)
    task, _ = row_reading.read(data, task, names)  # reports wrong lines before anything is loaded
    if run_options.eval_data is not None:
        row_reading.read_rows(run_options.eval_data, task, names)
    if run_options.epochs <= 0:
        raise PeftcoreError(f"--epochs must be above 0, found {run_options.epochs:g}")
    if run_options.other_data is not None and not registered.find(task).learns_texts:
        tasks = registered.names_with("learns_texts")
        raise PeftcoreError(f"--other-data only works with {tasks} (the task is {task}). Remove --other-data")
    if run_options.other_data is not None:
        row_reading.read_rows(run_options.other_data, task)
    rates = parse_search(search, method)
    candidates = parse_candidates(method, full)
    require("transformers", "accelerate", "matplotlib", "psutil")
    base_files.quiet_transformers()

    common = Settings.from_options(
        run_options,
        model=base_files.resolve(model),
        data=options.absolute_data(data),
        task=task,
        method="",
        validation=run_options.holdout if rates else None,
        eval_every=sys.maxsize,  # once, at the end
    )
    _check_folder(output, resume, overwrite)  # before a lock is written into an unrelated folder
    run_settings = {name: getattr(common, name) for name in ("model", "data", "task", *_OPTIONS)}
    own_settings = {"method": method, "full": full, "seeds": seeds, "search": search, "output": str(output.resolve())}
    dtype = _common_dtype(run_options.dtype, run_options.device)
    with only_process(output):
        if not resume:
            shutil.rmtree(output / "runs", ignore_errors=True)
        (output / "runs").mkdir(exist_ok=True)
        config_file.write(output / "compare.toml", {**run_settings, **own_settings})
        _run_all(replace(common, dtype=dtype), candidates, seeds, rates, output)


def _common_dtype(dtype: str, device: str) -> str:
    """Return the dtype of all runs. For auto, this is bf16 on CUDA and fp32 otherwise, regardless of the method."""
    from peftcore_cli import dtype_choice

    return dtype_choice.choose(dtype, device, None).dtype


def parse_search(text: str | None, methods: list[str] | None) -> list[float]:
    """Return the sorted rates of `--search lr=RATE,RATE,...`; empty without --search.

    Raises:
        PeftcoreError: the text does not have this form, a rate is invalid or repeated, or a method has its own rate.
    """
    if text is None:
        return []
    name, _, values = text.partition("=")
    if name.strip() != "lr":
        raise PeftcoreError(f"--search must be learning rates such as lr=1e-4,1e-3, found '{text}'")
    try:
        rates = sorted(float(value) for value in values.split(","))
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
        raise PeftcoreError(f"--search lr=RATE,RATE,... must be different numbers above 0, found '{values}'")
    with_rate = next((method for method in methods or () if re.search(r"(^|\s)lr=", method)), None)
    if with_rate is not None:
        raise PeftcoreError(
            f"--search tries the same rates for every method. Remove the rate of --method '{with_rate}'"
        )
    return rates


def parse_candidates(texts: list[str] | None, full: bool) -> list[Candidate]:
    """Return the candidates of `--method` ('NAME FIELD=VALUE ...'), by default every installed method.

    With `full`, full fine-tuning comes last.

    Raises:
        PeftcoreError: a method is not installed, a field or rate is invalid, or two candidates are equal.
    """
    candidates = [_candidate(text) for text in (texts or peftcore.methods())]
    if full and not any(candidate.method == options.FULL for candidate in candidates):
        candidates.append(_candidate(options.FULL))
    labels = Counter(candidate.label for candidate in candidates)
    for i, candidate in enumerate(candidates):
        if labels[candidate.label] > 1:
            candidates[i] = replace(candidate, label=f"{candidate.label} lr={candidate.lr:g}")
    folders = Counter(candidate.folder for candidate in candidates)
    for candidate in candidates:
        if folders[candidate.folder] > 1:
            raise PeftcoreError(f"--method '{candidate.label}' is passed twice. Remove one of them")
    return candidates


def _candidate(text: str) -> Candidate:
    try:
        name, *settings = shlex.split(text) or [""]
    except ValueError as error:
        raise PeftcoreError(f"--method must be 'NAME FIELD=VALUE ...', found '{text}' ({error})") from None
    if not name:
        raise PeftcoreError("--method must be 'NAME FIELD=VALUE ...', found ''")
    rates = [setting.partition("=")[2] for setting in settings if setting.startswith("lr=")]
    settings = [setting for setting in settings if not setting.startswith("lr=")]
    try:
        lr = float(rates[-1]) if rates else None
    except ValueError:
        lr = 0.0
    if lr is not None and not 0 < lr < float("inf"):
        raise PeftcoreError(f"lr must be a number above 0 in --method '{text}', found '{rates[-1]}'")
    label = " ".join([name, *settings])
    if name == options.FULL:
        if settings:
            raise PeftcoreError(f"full fine-tuning only takes lr in --method '{text}', found '{settings[0]}'")
        return Candidate(label, name, lr or FULL_LEARNING_RATE)
    name, fields = options.resolve_method(name, settings)
    return Candidate(label, name, lr or peftcore.methods()[name].learning_rate, fields)


def _check_folder(output: Path, resume: bool, overwrite: bool) -> None:
    """Raise a PeftcoreError unless a comparison may start or continue in this folder."""
    if output.exists() and not output.is_dir():
        raise PeftcoreError(f"'{output}' is a file. Pass a folder: --output FOLDER")
    if (output / "runs").is_dir():
        if not (resume or overwrite):
            raise PeftcoreError(
                f"'{output}' already contains a comparison. Use --resume to keep finished runs, or --overwrite to "
                "start again"
            )
    elif output.is_dir() and any(path.name != LOCK for path in output.iterdir()):
        raise PeftcoreError(
            f"'{output}' contains files that do not belong to a comparison. Pass another folder: --output FOLDER"
        )


def _run_all(common: Settings, candidates: list[Candidate], seeds: int, rates: Sequence[float], output: Path) -> None:
    """Run all candidates with all seeds, and write the report after each run."""
    from peftcore_compare import training_process
    from peftcore_compare.report import ComparisonReport

    report = ComparisonReport(common, [(candidate.label, candidate.lr) for candidate in candidates], rates)
    too_big = {options.FULL: reason} if (reason := _does_not_fit(common)) else {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    count = len(candidates) * (max(1, len(rates)) + seeds - 1)
    with out.status("") as status:
        for number, (candidate, seed, lr) in enumerate(_runs(report, candidates, seeds, rates), 1):
            name = f"{number}/{count}  {candidate.label}, " + (f"lr {lr:g}, " if rates else "") + f"seed {seed}"
            settings = replace(common, method=candidate.method, fields=candidate.fields, lr=lr, seed=seed)
            folder = output / "runs" / candidate.folder / (f"lr-{lr:g}" if rates else "") / f"seed-{seed}"

            def show(line: str, name: str = name) -> None:
                status.update(escape(f"{name}  {line}"))

            show("starting")
            try:
                if candidate.method in too_big:
                    result = {"error": too_big[candidate.method]}
                else:
                    result = training_process.run(folder, settings, show)
            except KeyboardInterrupt:
                report.write_picture(output)
                say(f"stopped; the finished runs are in {output}. To continue:\n  {command(resume=True)}", "bold")
                raise typer.Exit(130) from None
            report.add(candidate.label, seed, result, lr)
            report.write(output)
            say(f"{name}: {report.sentence(result)}")
    report.write_picture(output)  # imported late, because the import takes a second
    out.print()
    report.show()
    for label, reason in report.failures():
        warn(f"{label}: {reason}")
    say(f"\nreport: {', '.join(str(output / name) for name in report.files)}", "bold")


def _runs(
    report: ComparisonReport, candidates: Sequence[Candidate], seeds: int, rates: Sequence[float]
) -> Iterator[tuple[Candidate, int, float]]:
    """Yield (candidate, seed, rate) of each run: all candidates with the first seed, then with the next, and so on.

    This order compares all methods as early as possible. Later seeds use the best rate of the first seed.
    """
    for seed in range(seeds):
        for candidate in candidates:
            if rates and seed == 0:
                yield from ((candidate, seed, rate) for rate in rates)
            elif not rates:
                yield candidate, seed, candidate.lr
            elif (method_runs := report.row(candidate.label)).finished_runs:
                yield candidate, seed, method_runs.lr


def _does_not_fit(common: Settings) -> str | None:
    """Return the reason why the full model does not fit into memory with its gradients and AdamW's moments, or None."""
    import psutil
    import torch
    from peftcore_cli import device_choice, models

    device = device_choice.torch_device(common.device)
    size = device_choice.torch_dtype(common.dtype, common.device).itemsize
    parameters = sum(p.numel() for p in models.empty_model(common.model, common.task).parameters())
    required_bytes = 4 * size * parameters  # weight, gradient and two moments
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if required_bytes <= free:
        return None
    return (
        f"weights, gradients and AdamW's moments need {required_bytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
    )
