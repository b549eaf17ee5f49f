"""`peftcore train`: an adapter from a model and a file of examples."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcore.cli import config_file, options
from peftcore.cli.console import command, out, require, say, table
from peftcore.errors import PeftcoreError

if TYPE_CHECKING:
    from peftcore.cli.settings import Settings
    from peftcore.cli.training import Result

EXAMPLES = (
    "peftcore train -m HuggingFaceTB/SmolLM2-135M-Instruct -d chat.jsonl --method METHOD -o run",
    "peftcore train -m MODEL -d reviews.csv --columns text=review,label=stars --method METHOD --set FIELD=VALUE -o run",
    "peftcore train -m MODEL -d chat.jsonl --method METHOD -o run --resume",
    "peftcore train --adapter run -d more.jsonl -o further",
)


def train(
    context: typer.Context,
    data: options.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run; the adapter lies in it.")],
    model: options.MaybeModel = None,
    config: options.Config = None,
    adapter: options.Continued = None,
    task: options.Task = None,
    method: options.MethodName = None,
    fields: options.Fields = None,
    eval_data: options.EvalData = None,
    holdout: options.Holdout = 0.1,
    epochs: options.Epochs = 3.0,
    steps: options.Steps = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at once, in each process.")] = 8,
    grad_accum: Annotated[int, typer.Option(min=1, help="Batches that make one step.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default the method's.")] = None,
    scheduler: Annotated[
        str, typer.Option(help="Trainer's lr_scheduler_type: linear, cosine, constant, ...")
    ] = "linear",
    warmup: Annotated[float, typer.Option(min=0, help="Share of the steps, or from 1 up their number.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.0,
    max_length: options.MaxLength = 512,
    pack: Annotated[
        bool,
        typer.Option("--pack", help="Several examples in a row of --max-length tokens, which do not see each other."),
    ] = False,
    beta: Annotated[
        float | None, typer.Option(help="Of --task dpo: how much it costs to leave the base; default 0.1.")
    ] = None,
    labels: options.Labels = None,
    columns: options.Columns = None,
    chat_template: options.ChatTemplate = None,
    dtype: options.Dtype = "auto",
    precision: options.Precision = "auto",
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the split, the adapter's start, the order and dropout.")] = 0,
    parallel: Annotated[
        str | None, typer.Option(help="Under torchrun: ddp (a copy of the base per process) or fsdp2 (shards of it).")
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    optim: Annotated[
        str, typer.Option(help="Trainer's optim; paged_adamw_8bit and _32bit are peftcore's own.")
    ] = "adamw_torch",
    optim_args: Annotated[
        str | None, typer.Option(help="Its arguments, such as betas=(0.9,0.95) or budget=256MB.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps between evaluations; default 5 in all.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints; default 5 in all.")] = None,
    keep: Annotated[int, typer.Option(min=2, help="Checkpoints kept.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on exactly from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew where a run lies.")] = False,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Choose batch, checkpointing and optimizer so that it fits into what is free."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on where memory will not be enough, as it is predicted.")
    ] = False,
    sample: Annotated[str | None, typer.Option(help="A prompt to answer before and after (causal-lm).")] = None,
    sample_tokens: Annotated[int, typer.Option(min=1, help="Tokens of that answer at most.")] = 48,
    report_to: Annotated[
        str | None, typer.Option(help="Where Trainer's log goes, too: tensorboard, wandb, mlflow, ... (commas).")
    ] = None,
) -> None:
    """Fine-tune a model on a file of examples.

    Language modelling learns from {"text": ...}, from {"prompt": ..., "completion": ...} (only the completion is
    learned) or from conversations {"messages": [{"role": ..., "content": ...}, ...]} (only the assistant's turns are,
    through the tokenizer's chat template). {"text": ..., "label": ...} is classification, regression where labels are
    numbers that are not all whole, and multi-label where they are lists. {"prompt": ..., "chosen": ..., "rejected":
    ...}, texts or messages, is learned by DPO, with the frozen base as the reference.

    With --adapter training goes on from an adapter that is there, of this or another library, on its base and with its
    method; what it is compared with, before and in DPO, is that adapter as it was.
    """
    from peftcore.cli import continuing, models
    from peftcore.cli import data as examples
    from peftcore.cli import precision as precisions
    from peftcore.cli.data_files import parsed_columns

    overruled = config_file.overruled(context)
    steps = None if "steps" in overruled else steps
    eval_data = None if "eval_data" in overruled else eval_data
    precisions.check(precision, dtype, device)
    names = parsed_columns(columns)
    if adapter is None:
        if model is None:
            raise PeftcoreError("name a model (--model MODEL), or an adapter to go on from (--adapter FOLDER)")
        if labels is not None:
            raise PeftcoreError("--labels names those of an adapter's outputs (--adapter); a new one has the examples'")
        start, task = None, task or examples.guess_task(data, names)
    else:
        start = continuing.start_of(adapter, output, model=model, method=method, labels=labels)
        task = start.task_of(task, data, names)
    examples.check_task(task)
    if sample is not None and task in examples.LABELLED:
        raise PeftcoreError("--sample is a prompt for a language model; a classifier writes nothing")
    if pack and task != examples.LANGUAGE_MODEL:
        raise PeftcoreError(f"--pack is for causal-lm; {task} has one answer for a whole row")
    if beta is not None and (task != examples.PREFERENCES or beta <= 0):
        raise PeftcoreError(f"--beta is of --task dpo, and above 0; found {beta:g} for {task}")
    if epochs <= 0 or (lr is not None and lr <= 0):
        raise PeftcoreError(f"--lr and --epochs must be above 0, found {lr} and {epochs:g}")
    for file in filter(None, (data, eval_data)):
        examples.read_rows(file, task, names)  # wrong lines show before anything is loaded
    require("transformers", "accelerate", "matplotlib", "psutil")
    if task == examples.PREFERENCES:
        require("trl", extra="dpo")
    models.quiet_transformers()
    from peftcore import ranks
    from peftcore.cli import reporting, torchrun, training
    from peftcore.cli import settings as run_settings
    from peftcore.registry import registry

    services = reporting.services(report_to)
    torchrun.join(parallel, device)
    name, chosen = options.resolve_method(start.method if start else method, config_file.fields(context, fields))
    if start is not None:
        chosen = {**start.fields, **chosen}
    template = start.task.chat_template if start is not None else None
    settings = run_settings.Settings(
        model=models.resolve(start.base if start else str(model)),
        data=options.absolute_data(data),
        task=task,
        method=name,
        fields=chosen,
        adapter=str(start.folder) if start else None,
        labels=labels,
        columns=columns,
        chat_template=options.absolute(chat_template) if chat_template else template,
        eval_data=options.absolute(eval_data) if eval_data else None,
        holdout=holdout,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        grad_accum=grad_accum,
        lr=registry.method(name).learning_rate if lr is None else lr,
        scheduler=scheduler,
        warmup=warmup,
        weight_decay=weight_decay,
        max_length=max_length,
        pack=pack,
        beta=beta,
        dtype=dtype,
        precision=precision,
        device=device,
        seed=seed,
        gradient_checkpointing=gradient_checkpointing,
        parallel=parallel,
        ranks=ranks.count(),
        optim=optim,
        optim_args=optim_args,
        eval_every=eval_every,
        save_every=save_every,
        keep=keep,
    )
    if fit:
        from peftcore.cli import forecast

        settings = forecast.fitted(settings)
    more = {"sample": sample, "sample_tokens": sample_tokens, "report_to": report_to}

    def prepare() -> None:
        run_settings.prepare_folder(output, settings, resume=resume, overwrite=overwrite)
        run_settings.write_options(output, settings, more)

    ranks.once(prepare, together=True)
    try:
        result = training.run(
            settings,
            output,
            resume=resume,
            sample=sample,
            sample_tokens=sample_tokens,
            report_to=services,
            force=force,
        )
    except training.Stopped as stopped:
        say(f"{stopped}; a checkpoint is in {output / 'checkpoints'}. To go on:\n  {command(resume=True)}", "bold")
        torchrun.leave()
        raise typer.Exit(130) from None
    if ranks.rank() == 0:
        _show(settings, result, output)
    torchrun.leave()


def _show(settings: Settings, result: Result, output: Path) -> None:
    """Print the result, and write `report.html` and, for programs, `result.json`."""
    from peftcore.cli import memory_picture, metrics, training_report, versions

    said = result.predicted
    facts = _facts(result)
    uses = _commands(settings, result)
    confusion: list[tuple[str, Any]] = []
    if result.after.confusion is not None:
        cells = metrics.confusion_rows(result.after.confusion, result.labels)
        confusion = [("Answers (across) to each label (down), after training", cells)]
    (output / "result.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    rows = metrics.rows(result.before, result.after)
    training_report.write(
        output / "report.html",
        title=f"{settings.method} on {'/'.join(Path(settings.model).parts[-2:])}",
        note=f"{settings.task}, {result.steps:,} steps; held out: {result.eval_rows:,} examples",
        history=result.history,
        before=result.before,
        sections=[
            ("Held out", [("", "before", "after"), *rows]),
            *confusion,
            ("The run", facts),
            *([("A sample", result.samples)] if result.samples else []),
            ("Settings", [(name, value) for name, value in settings.to_json().items() if value is not None]),
            ("Made with", [*versions.versions(), *versions.machine(), ("command", command())]),
        ],
        commands=uses,
        memory=None if said is None else lambda width: memory_picture.picture(said, result.trace, width),
    )
    out.print()
    table(rows, ("held out", "before", "after"))
    out.print()
    table(facts)
    for writer, text in result.samples:
        say(f"\n{writer} writes:", "bold")
        say(text.strip())
    say(f"\nreport: {output / 'report.html'}\nuse it:", "bold")
    for use in uses:
        say(f"  {use}")


def _facts(result: Result) -> list[tuple[str, str]]:
    from peftcore.cli.progress import gigabytes
    from peftcore.engine.summary import megabytes, share

    trainable, base = result.summary.trainable_parameters, result.summary.base_parameters
    return [
        ("trainable parameters", f"{trainable:,} of {base:,} ({share(trainable, base)})"),
        ("adapter", f"{result.adapter} ({megabytes(result.adapter_bytes)})"),
        ("examples", f"{result.train_rows:,} to train, {result.eval_rows:,} held out"),
        ("steps", f"{result.steps:,}"),
        ("time", f"{result.seconds:.0f} s, of it {result.training_seconds:.0f} s in training steps"),
        ("speed", f"{result.tokens_per_second:,.0f} tokens/s"),
        *((f"peak {name}", gigabytes(count)) for name, count in result.peak.items()),
        *_predicted(result),
    ]


def _predicted(result: Result) -> list[tuple[str, str]]:
    from peftcore.cli.progress import gigabytes

    if result.predicted is None:
        return []
    said, was, where = result.predicted.peak, result.peak.get("CUDA memory", result.peak["memory"]), "was"
    rows = []
    if result.trace is not None:
        was, where = result.trace.peak, "was in a step"
        rows = [("peak in a step", gigabytes(was))]
    return [*rows, ("predicted peak", f"{gigabytes(said)} ({said / was - 1:+.1%} of what it {where})")]


def _commands(settings: Settings, result: Result) -> list[str]:
    adapter = shlex.quote(str(result.adapter))
    if result.quantize is not None:
        adapter += f" --quantize {result.quantize}"
    files = settings.eval_data or settings.data
    evaluation = " --data ".join(map(shlex.quote, [files] if isinstance(files, str) else files))
    if settings.columns:
        evaluation += f" --columns {shlex.quote(settings.columns)}"
    return [
        *([f"peftcore chat --adapter {adapter}"] if result.is_chat else []),
        f'peftcore generate --adapter {adapter} --prompt "..."',
        f"peftcore eval --adapter {adapter} --data {evaluation}",
        f"peftcore merge --adapter {adapter} --output MERGED",
    ]
