"""One training run: from settings to an adapter folder, checkpoints, and facts for the report.

OUTPUT/checkpoints/   adapter, optimizer, scheduler, RNG and trainer state
OUTPUT/adapter/       the result, in Hugging Face PEFT's format
OUTPUT/report.html
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PrinterCallback, set_seed

import peftcore
from peftcore.cli.bases import adapter_folders, base_quantization, models, precision
from peftcore.cli.bases.adapter_folders import AdapterTask
from peftcore.cli.console import number, say, warn
from peftcore.cli.options import FULL
from peftcore.cli.settings import Settings
from peftcore.cli.start import Clock
from peftcore.cli.tasks import (
    conversations,
    encoded_examples,
    generations,
    packing,
    registered,
    row_labels,
)
from peftcore.cli.tasks.encoded_examples import Example
from peftcore.cli.tasks.metrics import Metrics
from peftcore.cli.training import (
    best_checkpoint,
    distillation,
    forecast as forecasts,
    light_step,
    progress,
    trainer_arguments,
    trainers,
    training_data,
    warm_start,
)
from peftcore.cli.training.measuring import Measure
from peftcore.cli.training.memory_trace import MemoryTrace
from peftcore.cli.training.run_result import Result, Stopped
from peftcore.cli.training.sampler import LengthGroupedSampler
from peftcore.cli.training.training_data import Examples
from peftcore.errors import PeftcoreError
from peftcore.plugin import ranks, takes_batches
from peftcore.training import latest_checkpoint


def run(
    settings: Settings,
    output: Path,
    rows: training_data.Rows,
    *,
    resume: bool,
    clock: Clock | None = None,
    sample: str | None = None,
    sample_tokens: int = 48,
    report_to: Sequence[str] = (),
    force: bool = False,
) -> Result:
    """Train, evaluate before and after, and save the adapter.

    Args:
        settings: of the run.
        output: folder of the run.
        rows: its examples, see `training_data.read` and `split`.
        resume: continue from the latest checkpoint.
        clock: has the parts of the run so far, such as reading its data.
        sample: prompt to answer before and after, in at most `sample_tokens` tokens.
        sample_tokens: see `sample`.
        report_to: services that receive Trainer's log, see `reporting`.
        force: run even if the predicted memory is not available.

    Raises:
        PeftcoreError: the data, the model or a setting is wrong, or there is not enough memory.
        Stopped: Ctrl-C; a checkpoint has been written.
    """
    began, clock, task = time.perf_counter(), clock or Clock(), registered.find(settings.task)
    clock.parts["imports"] = clock.rest()
    with clock.part("data"):
        settings = training_data.fit_max_length(settings)
        processor, about = prepared(settings, rows)
        examples = training_data.encode(rows, settings, processor, about.labels)
    task.check_examples(examples.train, "training", settings.batch_size)
    task.check_examples(examples.held_out, "held-out")
    with clock.part("forecast"):
        settings, predicted = forecasts.with_memory(settings, processor, about.labels, examples, force=force)
    with clock.part("loading"):
        quantized = base_quantization.of_run(settings, about.labels)
        about = replace(about, dtype=settings.dtype, quantized=quantized)
        model = _adapted_model(settings, processor, about, examples)
    if isinstance(predicted, str):
        say(f"memory is not predicted: {predicted}")
        predicted = None
    teacher = distillation.of_run(settings, processor, examples.train)
    summary = peftcore.summary(model)
    say(str(summary))

    measure = Measure(settings, processor, about, examples, rows.held_out, clock)
    samples: list[tuple[str, str]] = []
    with peftcore.disabled(model) if settings.method != FULL and settings.adapter is None else contextlib.nullcontext():
        measure.keep_reference(model)
        say("measuring held-out examples ...")
        before = measure.all(model)
        if sample is not None:
            name = "base" if settings.adapter is None else "the adapter before"
            with clock.part("samples"):
                samples.append((name, _answer(model, processor, about, sample, sample_tokens)))
    _check_metric(settings, before.held_out)
    say(f"before training, on {number(len(rows.held_out), 'held-out example')}: {before.held_out}", "bold")

    light_step.fuse(model, settings)
    if settings.parallel == "fsdp2":
        peftcore.shard(model)
    light_step.use_loss_without_logits(model, settings, examples.rows, processor)
    now = peftcore.summary(model)
    summary = replace(summary, fused=now.fused, without_logits=now.without_logits)
    meter, stop, trace = progress.Meter(), progress.OrderlyStop(), MemoryTrace(model)
    keeper, made_for = best_checkpoint.of_run(settings), None if settings.method == FULL else about
    trainer = task.trainer(
        {
            "model": model,
            "args": trainer_arguments.of_run(settings, output, training_data.draws(examples.parts), report_to),
            "callbacks": [meter, stop, trace, progress.TaskWriter(made_for), *([keeper] if keeper else [])],
            "train_dataset": examples.dataset,
            "eval_dataset": examples.held_out,
            "measure": measure,
            "parts": examples.parts,
            "lengths": examples.sizes,
        },
        settings,
        processor,
        about,
        teacher,
    )
    trainer.remove_callback(PrinterCallback)
    from_checkpoint = _checkpoint_to_resume(output) if resume else None
    try:
        with stop:
            trainer.train(resume_from_checkpoint=from_checkpoint)
    finally:
        meter.close()
        trace.close()
    is_over = keeper is not None and keeper.stopped
    if stop.requested and trainer.state.global_step < trainer.state.max_steps and not is_over:
        raise Stopped(trainer.state.global_step, trainer.state.max_steps)

    best = None if keeper is None else keeper.best(trainer.state)
    held_out_after = _measured_at_end(trainer, model, measure, best)
    if sample is not None:
        with clock.part("samples"):
            samples.append(("with the adapter", _answer(model, processor, about, sample, sample_tokens)))
    adapter = output / "adapter"
    _save(model, adapter, settings, processor, made_for)
    with precision.own(model):
        chosen_by = measure(model, examples.validation) if examples.validation else None
        after = measure.all(model, held_out=held_out_after)
    clock.parts["training"] = meter.seconds
    return Result(
        before=before.held_out,
        after=after.held_out,
        history=trainer.state.log_history,
        summary=summary,
        steps=trainer.state.global_step,
        train_rows=len(rows.train) if rows.lines is None else len(examples.dataset),
        eval_rows=len(rows.held_out),
        seconds=time.perf_counter() - began,
        training_seconds=meter.seconds,
        spent=clock.all(),
        step_seconds=meter.step_seconds,
        tokens_per_second=meter.tokens_per_second,
        examples_per_second=settings.batch_size * settings.grad_accum * settings.ranks / (meter.step_seconds or 1.0),
        peak=progress.peak_memory(),
        adapter=adapter,
        adapter_bytes=sum(file.stat().st_size for file in adapter.iterdir()),
        samples=samples,
        is_chat=bool(about.chat),
        labels=about.labels,
        predicted=predicted,
        trace=trace.largest,
        validation=chosen_by,
        other=(before.other, after.other) if before.other and after.other else None,
        merges=None if settings.method == FULL else peftcore.can_merge(model),
        best=best,
        data_sets=training_data.facts(settings, rows.train, examples, before.sets, after.sets)
        if examples.is_mixed
        else [],
    )


def prepared(settings: Settings, rows: training_data.Rows) -> tuple[Any, AdapterTask]:
    """Return the tokenizer or processor of a run, and what its adapter is trained for.

    Raises:
        PeftcoreError: the base has no tokenizer for the task, or a setting does not fit to it.
    """
    task = registered.find(settings.task)
    start = Path(settings.adapter) if settings.adapter is not None else None
    before = adapter_folders.adapter_task(start) if start is not None else None
    labels: tuple[str, ...] = ()
    if task.has_labels:
        seen = [*rows.train, *rows.validation]
        if counts := row_labels.counts_of(seen):
            say(counts)
        labels = tuple(row_labels.labels_of(seen)) if start is None else warm_start.labels_of(start, settings.labels)
    processor, is_chat = task.load_processor(settings.model, start), any(row.messages is not None for row in rows.train)
    weights = (settings.desirable_weight, settings.undesirable_weight)
    about = AdapterTask(
        settings.task,
        settings.max_length,
        labels,
        chat=is_chat,
        beta=settings.beta,
        weights=None if weights == (1.0, 1.0) else weights,
        seed=settings.seed if task.new_head else None,
        pooling=(before and before.pooling) or (None if settings.pooling == "auto" else settings.pooling),
        language=settings.language,
    )
    about = task.prepared(processor, about, settings.model)
    if about.pooling is not None:
        say(f"texts become vectors by {about.pooling} pooling")
    conversations.set_template(processor, settings.chat_template, before.chat_template if before is not None else None)
    template = conversations.tokenizer_of(processor).chat_template if is_chat and settings.chat_template else None
    return processor, replace(about, chat_template=template)


def _adapted_model(settings: Settings, processor: Any, about: AdapterTask, examples: Examples) -> Any:
    """Return the base with the adapter that is trained, or with `--method full` the base that is trained itself."""
    set_seed(settings.seed)  # also initialises a classifier's new head
    say(f"loading {settings.model} for {settings.task}")
    model = models.load_model(
        settings.model,
        settings.task,
        dtype=settings.dtype,
        device=settings.device,
        labels=about.labels,
        quantize=about.quantized,
    )
    training_data.check_positions(model, settings, examples)
    if settings.pack:
        packing.check(model, examples.train, type(model).__name__)
    if settings.method == FULL:
        model.requires_grad_(True)
    elif settings.adapter is not None:
        warm_start.load(model, settings)
    else:
        task, batches = registered.find(settings.task), first_batches(settings, examples.rows, processor, model)
        with contextlib.nullcontext() if batches is None else task.with_loss(model, about):
            peftcore.apply(model, settings.method, batches=batches, **settings.fields)
    if settings.pack and settings.method != FULL:
        packing.check(model, examples.train, settings.method)
    return model


def _answer(model: Any, processor: Any, about: AdapterTask, sample: str, tokens: int) -> str:
    task, is_chat = registered.find(about.task), bool(about.chat)
    with precision.own(model):
        return task.answer(model.eval(), processor, sample, about, chat=is_chat, max_new_tokens=tokens)


def _check_metric(settings: Settings, measured: Metrics) -> None:
    """Raise a PeftcoreError if `--metric` is not among the metrics that were measured."""
    names = measured.as_dict()
    if settings.metric is not None and generations.name_of(settings.metric) not in names:
        raise PeftcoreError(
            f"--metric {settings.metric} is not measured on these examples, which have {', '.join(names)}. Pass one of "
            "these"
        )


def _measured_at_end(
    trainer: trainers.Measuring, model: Any, measure: Measure, best: best_checkpoint.Best | None
) -> Metrics:
    """Return the metrics on held-out examples of the adapter that is saved: the best, or the last."""
    if best is not None:
        say(f"saving the adapter of {best}")
        with precision.own(model):
            return measure(model)
    if trainer.state.global_step not in trainer.measured:
        trainer.evaluate()
    return trainer.measured[trainer.state.global_step]


def _save(model: Any, folder: Path, settings: Settings, processor: Any, made_for: AdapterTask | None) -> None:
    """Save the adapter with the facts about its task, or the whole model of `--method full`."""
    if made_for is None:
        model.save_pretrained(folder)
        return
    peftcore.save(model, folder)

    def write_facts() -> None:
        made_for.write(folder)
        if settings.adapter is not None and adapter_folders.has_tokenizer(Path(settings.adapter)):
            conversations.tokenizer_of(processor).save_pretrained(folder)

    ranks.once(write_facts, together=True)


def first_batches(settings: Settings, train: list[Example], tokenizer: Any, model: Any) -> DataLoader[Any] | None:
    """Return the training batches of `model` for methods that initialise from data; None for others."""
    if not takes_batches(settings.method, settings.fields):
        return None
    task = registered.find(settings.task)
    train = list(task.as_texts(train))
    order = LengthGroupedSampler([encoded_examples.length(each) for each in train], settings.batch_size, settings.seed)

    def batch(some: list[Example]) -> dict[str, Any]:
        return encoded_examples.in_dtype(task.collate(some, tokenizer), model)

    return DataLoader(train, settings.batch_size, sampler=order, collate_fn=batch)  # type: ignore[arg-type]


def _checkpoint_to_resume(output: Path) -> str | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = latest_checkpoint(output / "checkpoints")
    for warning in caught:
        warn(str(warning.message))
    if checkpoint is None:
        warn(f"'{output}' has no complete checkpoint; starting from the beginning")
    else:
        say(f"resuming from {checkpoint}")
    return checkpoint
