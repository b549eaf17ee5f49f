"""`peftcore train`: train an adapter for a model on a file of examples."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore_cli import config_file, option_groups, options
from peftcore_cli.console import command, out, require, say, table
from peftcore_cli.settings import (
    RUN_FILE,
    Display,
    RunOptions,
    Settings,
    check_folder,
    for_these_ranks,
    only_process,
    prepare_folder,
    write_options,
)
from peftcore_cli.start import Clock

if TYPE_CHECKING:
    from peftcore_cli.data.disk_list import DiskList
    from peftcore_cli.data.row import Row
    from peftcore_cli.training.run_result import Result
    from peftcore_cli.training.warm_start import Start

EXAMPLES = (
    "peftcore train -m HuggingFaceTB/SmolLM2-135M-Instruct -d chat.jsonl --method METHOD -o run",
    "peftcore train -m MODEL -d reviews.csv --columns text=review,label=stars --method METHOD --set FIELD=VALUE -o run",
    "peftcore train -o run --resume",
    "peftcore train --adapter run -d more.jsonl -o further",
)


def train(
    context: typer.Context,
    data: options.Data,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            is_eager=True,
            callback=config_file.use_of_run,
            help="Folder for the run and its adapter.",
        ),
    ],
    *,
    model: options.MaybeModel = None,
    config: options.Config = None,
    adapter: options.ContinuedAdapter = None,
    task: options.Task = None,
    method: options.MethodName = None,
    fields: options.Fields = None,
    run_options: RunOptions,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            is_eager=True,
            callback=config_file.use_of_run,
            rich_help_panel=option_groups.OUTPUT,
            help="Resume the run in --output from its latest complete checkpoint, with the run's options as defaults.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", rich_help_panel=option_groups.OUTPUT, help="Replace the run in --output and start again."
        ),
    ] = False,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            rich_help_panel=option_groups.MEMORY,
            help="Choose batch size, gradient checkpointing and optimizer so that training fits into free memory.",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            rich_help_panel=option_groups.MEMORY,
            help="Train even if the predicted memory exceeds the free memory.",
        ),
    ] = False,
    display: Display,
) -> None:
    """Fine-tune a model on a file of examples.

    The columns of the examples determine the task: {"messages": [...]} trains a chat model, {"prompt": ...,
    "completion": ...} or {"text": ...} a language model, {"text": ..., "label": ...} a classifier, and {"prompt": ...,
    "chosen": ..., "rejected": ...} preferences. docs/data.md describes all formats, including images and audio.

    With --adapter, training continues from an existing adapter, with its base and method. Results are compared with
    that adapter, which is also the reference model for training on preferences.
    """
    from peftcore_cli.training import fitting, torchrun, trainer_arguments

    clock = Clock()
    run_options = config_file.in_force(context, run_options)
    start = _start(run_options, adapter, output, model=model, method=method)
    rows = _read(run_options, data, task if start is None else start.task_of(task), clock)
    if start is not None:
        start.check_task(rows.task, f"{', '.join(map(repr, data))} is for {rows.task}")
        run_options = start.completed(run_options)
    run_options = _check_options(run_options, display, rows, continues=start is not None)
    torchrun.join(run_options.parallel, run_options.device)
    given_method, adapter_fields = (method, None) if start is None else (start.method, start.fields)
    name, method_fields = options.resolve_method(
        given_method, config_file.fields(context, fields), adapter_fields=adapter_fields
    )
    _check_quantize(run_options, start, name)
    settings = _settings(run_options, start, model=model, rows=rows, method=name, fields=method_fields)
    if fit:
        settings = fitting.fit(settings, rows.read)
    if resume:
        settings = _resumed_settings(settings, output)
    trainer_arguments.check(settings, output)
    _run(settings, output, rows, display, clock=clock, resume=resume, overwrite=overwrite, force=force)
    torchrun.leave()


def _start(
    run_options: RunOptions, adapter: Path | None, output: Path, *, model: str | None, method: str | None
) -> Start | None:
    """Return the adapter to continue from, or None to train a new one."""
    from peftcore_cli.training import warm_start

    if adapter is not None:
        return warm_start.start_of(adapter, output, model=model, method=method, labels=run_options.labels)
    if model is None:
        raise PeftcoreError(
            "nothing to train. Pass a model (--model MODEL), or an adapter to continue from (--adapter FOLDER)"
        )
    if run_options.labels is not None:
        raise PeftcoreError(
            "--labels only works with an existing adapter (--adapter), because a new adapter takes its labels from "
            "the examples. Remove --labels"
        )
    return None


@dataclass
class _Rows:
    """The examples of a run and their task.

    Attributes:
        paths: values of --data.
        task: name of the task.
        read: the training examples.
        held_out: the examples of --eval-data, or None to hold out some of `read`.
    """

    paths: list[str]
    task: str
    read: DiskList[Row]
    held_out: DiskList[Row] | None


def _read(run_options: RunOptions, data: list[str], task: str | None, clock: Clock) -> _Rows:
    """Read the examples, so that invalid lines are reported before a model is loaded."""
    from peftcore_cli.data import row_reading
    from peftcore_cli.data.data_files import parse_columns

    names = parse_columns(run_options.columns)
    with clock.part("data"):
        task, rows = row_reading.read(data, task, names)
        held_out = None if run_options.eval_data is None else row_reading.read(run_options.eval_data, task, names)[1]
    return _Rows(data, task, rows, held_out)


def _check_options(run_options: RunOptions, display: Display, rows: _Rows, *, continues: bool) -> RunOptions:
    """Check the options, and resolve the teacher's path.

    Raises:
        PeftcoreError: an option contradicts another option or the task, or a library is not installed.
    """
    from peftcore_cli.bases import base_files, precision as precisions
    from peftcore_cli.tasks import registered
    from peftcore_cli.training import option_checks

    option_checks.check(run_options, display, rows.task, rows.paths, continues=continues)
    if run_options.teacher is not None:
        require("transformers", "accelerate")
        from peftcore_cli.training import distillation

        run_options = replace(run_options, teacher=distillation.check_teacher(run_options, rows.task))
    precisions.check(run_options.precision, run_options.dtype, run_options.device)
    require("transformers", "accelerate", "matplotlib", "psutil")
    for package, extra in registered.find(rows.task).requires:
        require(package, extra=extra)
    base_files.quiet_transformers()
    from peftcore_cli.training import best_checkpoint, reporting

    best_checkpoint.check(run_options, rows.task)
    reporting.services(display.report_to)
    return run_options


def _check_quantize(run_options: RunOptions, start: Start | None, method: str) -> None:
    """Raise a PeftcoreError if --quantize contradicts the adapter to continue from, or the method."""
    import peftcore
    from peftcore.quantization import find_type
    from peftcore_cli.bases import base_quantization

    if run_options.quantize is None:
        return
    if start is not None and start.task.quantized is not None:
        base_quantization.refuse_other(run_options.quantize, start.task.quantized, str(start.folder))
        return
    find_type(run_options.quantize)
    if peftcore.method(method).prepare is not None:
        raise PeftcoreError(
            f"--method {method} prepares the base itself, so it cannot be combined with --quantize "
            f"{run_options.quantize}. Remove --quantize, or pass another method"
        )


def _settings(
    run_options: RunOptions, start: Start | None, *, model: str | None, rows: _Rows, method: str, fields: dict[str, Any]
) -> Settings:
    """Return the settings that determine the run."""
    import peftcore
    from peftcore.plugin import ranks
    from peftcore_cli.bases import base_files

    return Settings.from_options(
        run_options,
        model=base_files.resolve(start.base if start else str(model)),
        data=options.absolute_data(rows.paths),
        task=rows.task,
        method=method,
        fields=fields,
        adapter=str(start.folder) if start else None,
        quantize=run_options.quantize or (start.quantize if start else None),
        chat_template=run_options.chat_template or (start.task.chat_template if start else None),
        lr=peftcore.method(method).learning_rate if run_options.lr is None else run_options.lr,
        ranks=ranks.count(),
    )


def _resumed_settings(settings: Settings, output: Path) -> Settings:
    """Return the settings of a resumed run, adjusted if the number of ranks has changed."""
    from peftcore.plugin import ranks

    adjusted_settings = list[Settings]()
    ranks.once(lambda: adjusted_settings.append(for_these_ranks(output, settings)), together=True)
    (resumed_settings,) = ranks.of_first(adjusted_settings)
    if resumed_settings.grad_accum != settings.grad_accum:
        say(
            f"resuming on {resumed_settings.ranks} ranks with --grad-accum {resumed_settings.grad_accum}, which keeps "
            "the number of examples per step"
        )
    return resumed_settings


def _run(
    settings: Settings,
    output: Path,
    rows: _Rows,
    display: Display,
    *,
    clock: Clock,
    resume: bool,
    overwrite: bool,
    force: bool,
) -> None:
    """Lock the run's folder, train, and show the result."""
    from peftcore.plugin import ranks
    from peftcore.training import latest_checkpoint
    from peftcore_cli.data import holdout
    from peftcore_cli.training import run_result, torchrun, training_data, training_run

    def prepare() -> None:
        if not (resume and (output / RUN_FILE).exists()):
            check_folder(output, overwrite=overwrite)  # before a lock file is written into a folder that is not a run
        locks.enter_context(only_process(output))
        prepare_folder(output, settings, resume=resume, overwrite=overwrite)
        write_options(output, settings, display)

    with contextlib.ExitStack() as locks:
        ranks.once(prepare, together=True)
        examples = training_data.split(settings, rows.read, rows.held_out)
        if rows.held_out is None:
            held_out = holdout.describe(examples.held_out, len(rows.read))
            say(f"holding out {held_out}, drawn at random with --seed {settings.seed}")
        try:
            result = training_run.run(
                settings, output, examples, resume=resume, clock=clock, display=display, force=force
            )
        except run_result.Stopped as stopped:
            if ranks.rank() == 0:
                newest = latest_checkpoint(output / "checkpoints")
                checkpoint = "no checkpoint was written" if newest is None else f"the newest checkpoint is {newest}"
                say(f"{stopped}; {checkpoint}. To continue:\n  {command(resume=True)}", "bold")
            torchrun.leave()
            raise typer.Exit(130) from None
        if ranks.rank() == 0:
            _show(settings, result, output, display.sample)


def _show(settings: Settings, result: Result, output: Path, prompt: str | None) -> None:
    """Print the result, with answers to `prompt`, and write `report.html` and `result.json`."""
    from peftcore_cli import versions
    from peftcore_cli.tasks import metrics
    from peftcore_cli.training import memory_picture, training_data, training_report

    prediction = result.predicted
    facts = _facts(result)
    uses = _commands(settings, result)
    confusion: list[tuple[str, Any]] = []
    if result.after.confusion is not None:
        cells = metrics.confusion_rows(result.after.confusion, result.labels)
        confusion = [("True labels (rows) and predicted labels (columns), after training", cells)]
    (output / "result.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    rows = metrics.rows(result.before, result.after)
    sets = [data_set.cells() for data_set in result.data_sets]
    training_report.write(
        output / "report.html",
        title=f"{settings.method} on {'/'.join(Path(settings.model).parts[-2:])}",
        note=f"{settings.task}, {result.steps:,} steps; held out: {result.eval_rows:,} examples",
        history=result.history,
        before=result.before,
        sections=[
            ("Held out", [("", "before", "after"), *rows]),
            *([("Data sets", [training_data.TITLES, *sets])] if sets else []),
            *confusion,
            ("The run", facts),
            *([("A sample", [("prompt", prompt), *result.samples])] if result.samples else []),
            ("Settings", settings.rows()),
            ("Made with", [*versions.versions(), *versions.machine(), ("command", command())]),
        ],
        commands=uses,
        memory=None if prediction is None else lambda width: memory_picture.picture(prediction, result.trace, width),
    )
    if settings.method != options.FULL:
        _add_to_card(settings, result, rows)
    out.print()
    table(rows, ("held out", "before", "after"))
    if sets:
        out.print()
        table(sets, training_data.TITLES)
    out.print()
    table(facts)
    for writer, text in result.samples:
        say(f"\n{writer} writes:", "bold")
        say(text.strip())
    say(f"\nreport: {output / 'report.html'}\nuse it:", "bold")
    for use in uses:
        say(f"  {use}")


def _add_to_card(settings: Settings, result: Result, rows: list[tuple[str, str, str]]) -> None:
    """Add the data, metrics and command to the adapter's model card, with file names instead of paths."""
    from peftcore.files import add_to_card, code_span

    files = [settings.data] if isinstance(settings.data, str) else settings.data
    details = [
        ("task", settings.task),
        ("data", ", ".join(code_span(Path(file).name) for file in files)),
        ("examples", f"{result.train_rows:,} for training, {result.eval_rows:,} held out"),
        ("steps", f"{result.steps:,}"),
        *(
            (f"held-out {name}", f"{base_value} before, {adapter_value} after")
            for name, base_value, adapter_value in rows
        ),
    ]
    try:
        add_to_card(result.adapter, "Training", details, shlex.join(map(_without_folders, shlex.split(command()))))
    except CheckpointError as error:  # the adapter and the report have been written
        say(str(error))


def _without_folders(word: str) -> str:
    """Replace a path in a command-line argument by the name of its file or folder."""
    starts = [0, *(match.end() for match in re.finditer("=", word))]  # a path may contain `=` as well
    for start in starts:
        path = word[start:]
        if path.startswith(("/", "~", "./", "../")) or os.path.isabs(path) or ("/" in path and os.path.lexists(path)):
            return word[:start] + Path(path).name
    return word


def _facts(result: Result) -> list[tuple[str, str]]:
    from peftcore_cli.amounts import format_counts, gigabytes, megabytes, share

    trainable, base = result.summary.trainable_parameters, result.summary.base_parameters
    examples = f"{result.examples_per_second:,.1f} examples/s"
    return [
        ("trainable parameters", f"{trainable:,} of {base:,} ({share(trainable, base)})"),
        ("adapter", f"{result.adapter} ({megabytes(result.adapter_bytes)})"),
        ("examples", f"{result.train_rows:,} for training, {result.eval_rows:,} held out"),
        ("steps", f"{result.steps:,}"),
        *([] if result.best is None else [("saved", str(result.best))]),
        ("time", _time(result.spent)),
        ("speed", f"{result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second else examples),
        *((f"peak {name}", gigabytes(count)) for name, count in result.peak.items()),
        *_prediction_rows(result),
        *([("loss", "without the logits of a batch")] if result.summary.without_logits else []),
        *([("fused", format_counts(result.summary.fused))] if result.summary.fused else []),
    ]


def _time(spent: dict[str, float]) -> str:
    """Format the duration of a run and of its parts, longest first: `53 s: 20 s imports, 6 s training, ...`."""
    parts = sorted(spent.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{seconds:.0f} s {part}" for part, seconds in parts if seconds >= 0.5)
    return f"{sum(spent.values()):.0f} s: {shown}" if shown else f"{sum(spent.values()):.0f} s"


def _prediction_rows(result: Result) -> list[tuple[str, str]]:
    from peftcore_cli.amounts import gigabytes

    if result.predicted is None:
        return []
    rows = [] if result.trace is None else [("peak in a step", gigabytes(result.trace.peak))]
    return [*rows, ("predicted peak", str(result.predicted.peak))]


def _commands(settings: Settings, result: Result) -> list[str]:
    adapter = shlex.quote(str(result.adapter)) + (" --trust-remote-code" if settings.trust_remote_code else "")
    from peftcore_cli.data import row_reading
    from peftcore_cli.tasks import registered

    task = registered.find(settings.task)
    files = (
        [settings.eval_data] if settings.eval_data else [source.path for source in row_reading.sources(settings.data)]
    )
    evaluation = " --data ".join(map(shlex.quote, files))
    if settings.columns:
        evaluation += f" --columns {shlex.quote(settings.columns)}"
    return [
        *([f"peftcore chat {adapter}"] if result.is_chat and task.answers_texts else []),
        *([f'peftcore generate {adapter} --prompt "..."'] if task.generates else []),
        *([f"peftcore predict {adapter} --data NEW"] if task.predicts else []),
        f"peftcore eval {adapter} --data {evaluation}",
        *([f"peftcore merge {adapter} --output MERGED"] if result.merges else []),
    ]
