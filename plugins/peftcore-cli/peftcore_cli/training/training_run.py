"""One training run, from settings to an adapter folder and the figures of the report.

`run` is the entry, and `_Run` has a method for each step of a run, in order. `commands/train.py` writes the report.

OUTPUT/checkpoints/   adapter, optimizer, scheduler, RNG and trainer state
OUTPUT/adapter/       the trained adapter, in Hugging Face PEFT's format
OUTPUT/report.html
"""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PrinterCallback, set_seed

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.plugin import ranks, takes_batches
from peftcore.training import latest_checkpoint
from peftcore_cli.bases import adapter_folders, base_quantization, models, precision
from peftcore_cli.bases.adapter_folders import AdapterTask
from peftcore_cli.console import number, say, warn
from peftcore_cli.options import FULL
from peftcore_cli.settings import Display, Settings
from peftcore_cli.start import Clock
from peftcore_cli.tasks import (
    conversations,
    encoded_examples,
    generations,
    packing,
    registered,
    row_labels,
)
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.training import (
    best_checkpoint,
    distillation,
    forecast as forecasts,
    light_step,
    progress,
    reporting,
    trainer_arguments,
    training_data,
    warm_start,
)
from peftcore_cli.training.measuring import EvaluationResults, Evaluator
from peftcore_cli.training.memory_trace import MemoryTrace
from peftcore_cli.training.run_result import Result, Stopped
from peftcore_cli.training.sampler import LengthGroupedSampler
from peftcore_cli.training.trainers import Measuring
from peftcore_cli.training.training_data import Examples


def run(
    settings: Settings,
    output: Path,
    rows: training_data.Rows,
    *,
    resume: bool,
    clock: Clock | None = None,
    display: Display | None = None,
    force: bool = False,
) -> Result:
    """Train, evaluate before and after, and save the adapter.

    Args:
        settings: settings of the run.
        output: folder of the run.
        rows: examples of the run, from `training_data.read` or `training_data.split`.
        resume: whether to continue from the latest checkpoint.
        clock: clock with the time of previous work, such as reading data.
        display: options about what the run prints and logs.
        force: whether to run even if the predicted memory exceeds the free memory.

    Raises:
        PeftcoreError: the data, the model or a setting is invalid, or there is not enough memory.
        Stopped: the user pressed Ctrl-C, and a checkpoint has been written.
    """
    training = _Run(settings, output, rows, clock or Clock(), display or Display())
    training.encode()
    training.predict_memory(force=force)
    training.load()
    training.evaluate_before()
    training.optimize()
    training.train(resume=resume)
    training.save()
    return training.result()


class _Run:
    """The state of a run. Call the methods in the order of `run`: each sets attributes that later methods read."""

    processor: Any
    task_record: AdapterTask
    examples: Examples
    predicted: forecasts.Forecast | None
    unpredicted: str | None
    model: Any
    teacher: Any
    summary: peftcore.Summary
    evaluate: Evaluator
    before: EvaluationResults
    trainer: Measuring
    best: best_checkpoint.Best | None
    after: EvaluationResults
    validation: Metrics | None

    def __init__(
        self, settings: Settings, output: Path, rows: training_data.Rows, clock: Clock, display: Display
    ) -> None:
        self.began, self.clock = time.perf_counter(), clock
        clock.parts["imports"] = clock.remaining_seconds()
        self.settings, self.output, self.rows, self.display = settings, output, rows, display
        self.task, self.adapter = registered.find(settings.task), output / "adapter"
        self.samples: list[tuple[str, str]] = []

    def encode(self) -> None:
        """Load the processor and encode the rows."""
        with self.clock.part("data"):
            self.settings = training_data.fit_max_length(self.settings)
            self.processor, self.task_record = prepare(self.settings, self.rows)
            self.examples = training_data.encode(self.rows, self.settings, self.processor, self.task_record.labels)
        self.task.check_examples(self.examples.train, "training", self.settings.batch_size)
        self.task.check_examples(self.examples.held_out, "held-out")

    def predict_memory(self, *, force: bool) -> None:
        """Choose the base's dtype, and refuse a run that does not fit into memory, unless `force` is set."""
        labels = self.task_record.labels
        with self.clock.part("forecast"):
            self.settings, self.predicted, self.unpredicted = forecasts.with_memory(
                self.settings, self.processor, labels, self.examples, force=force
            )

    def load(self) -> None:
        """Load the base with its adapter, and the teacher if there is one."""
        with self.clock.part("loading"):
            quantized = base_quantization.of_run(self.settings, self.task_record.labels)
            self.task_record = replace(self.task_record, dtype=self.settings.dtype, quantized=quantized)
            self.model = _adapted_model(self.settings, self.processor, self.task_record, self.examples)
        if self.unpredicted is not None:
            say(f"memory is not predicted: {self.unpredicted}")
        self.teacher = distillation.of_run(self.settings, self.processor, self.examples.train)
        self.summary = peftcore.summary(self.model)
        say(str(self.summary))

    def evaluate_before(self) -> None:
        """Evaluate the base or the existing adapter before training."""
        held_out, is_new = self.rows.held_out, self.settings.adapter is None
        self.evaluate = Evaluator(self.settings, self.processor, self.task_record, self.examples, held_out, self.clock)
        is_base = self.settings.method != FULL and is_new
        with peftcore.disabled(self.model) if is_base else contextlib.nullcontext():
            self.evaluate.keep_reference(self.model)
            say("evaluating held-out examples ...")
            self.before = self.evaluate.evaluate_all(self.model)
            self._answer_sample("base" if is_new else "the adapter before")
        _check_metric(self.settings, self.before.held_out)
        say(f"before training, on {number(len(held_out), 'held-out example')}: {self.before.held_out}", "bold")

    def optimize(self) -> None:
        """Fuse operators, shard the base and enable the loss without logits, as the options require."""
        light_step.fuse(self.model, self.settings)
        if self.settings.parallel == "fsdp2":
            peftcore.shard(self.model)
        light_step.use_loss_without_logits(self.model, self.settings, self.examples.rows, self.processor)
        summary = peftcore.summary(self.model)
        self.summary = replace(self.summary, fused=summary.fused, without_logits=summary.without_logits)

    def train(self, *, resume: bool) -> None:
        """Train, from the latest checkpoint if `resume` is set, and find the best step if the options ask for it."""
        self.meter, self.trace, stop = progress.Meter(), MemoryTrace(self.model), progress.OrderlyStop()
        keeper, task_writer = best_checkpoint.of_run(self.settings), progress.TaskWriter(self._saved_record)
        callbacks: list[Any] = [self.meter, stop, self.trace, task_writer]
        if keeper is not None:
            callbacks.append(keeper)
        trainer = self.trainer = self._trainer(callbacks)
        checkpoint = _checkpoint_to_resume(self.output) if resume else None
        try:
            with stop:
                trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            self.meter.close()
            self.trace.close()
        stopped_early = keeper is not None and keeper.stopped_early
        is_unfinished = trainer.state.global_step < trainer.state.max_steps and not stopped_early
        if stop.is_requested and is_unfinished:
            raise Stopped(trainer.state.global_step, trainer.state.max_steps)
        self.best = None if keeper is None else keeper.best(trainer.state)

    def save(self) -> None:
        """Save the best or last adapter, as the options require, and evaluate it."""
        held_out = _final_metrics(self.trainer, self.model, self.evaluate, self.best)
        self._answer_sample("with the adapter")
        _save(self.model, self.adapter, self.settings, self.processor, self._saved_record)
        validation = self.examples.validation
        with precision.in_model_dtype(self.model):
            self.validation = self.evaluate(self.model, validation) if validation else None
            self.after = self.evaluate.evaluate_all(self.model, held_out=held_out)

    def result(self) -> Result:
        """Return the figures of the run."""
        settings, examples, before, after = self.settings, self.examples, self.before, self.after
        step_seconds = self.meter.step_seconds
        self.clock.parts["training"] = self.meter.seconds
        return Result(
            before=before.held_out,
            after=after.held_out,
            history=self.trainer.state.log_history,
            summary=self.summary,
            steps=self.trainer.state.global_step,
            train_rows=len(self.rows.train),
            eval_rows=len(self.rows.held_out),
            seconds=time.perf_counter() - self.began,
            training_seconds=self.meter.seconds,
            spent=self.clock.all_parts(),
            step_seconds=step_seconds,
            tokens_per_second=self.meter.tokens_per_second,
            examples_per_second=settings.batch_size * settings.grad_accum * settings.ranks / (step_seconds or 1.0),
            peak=progress.peak_memory(),
            adapter=self.adapter,
            adapter_bytes=sum(file.stat().st_size for file in self.adapter.iterdir()),
            samples=self.samples,
            is_chat=bool(self.task_record.chat),
            labels=self.task_record.labels,
            predicted=self.predicted,
            trace=self.trace.largest,
            validation=self.validation,
            other=(before.other, after.other) if before.other and after.other else None,
            merges=None if settings.method == FULL else peftcore.can_merge(self.model),
            best=self.best,
            data_sets=training_data.data_set_figures(settings, self.rows.train, examples, before.sets, after.sets),
        )

    @property
    def _saved_record(self) -> AdapterTask | None:
        """The task record to save with the adapter; None for `--method full`, which saves a whole model."""
        return None if self.settings.method == FULL else self.task_record

    def _trainer(self, callbacks: list[Any]) -> Measuring:
        training, services = self.examples.training, reporting.services(self.display.report_to)
        arguments = {
            "model": self.model,
            "args": trainer_arguments.of_run(self.settings, self.output, training.rows_per_epoch, services),
            "callbacks": callbacks,
            "train_dataset": training.dataset,
            "eval_dataset": self.examples.held_out,
            "measure": self.evaluate,
            "weighted_sizes": training.weighted_sizes,
            "lengths": training.lengths,
        }
        trainer = self.task.trainer(arguments, self.settings, self.processor, self.task_record, self.teacher)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _answer_sample(self, writer: str) -> None:
        """Store the model's answer to the prompt of `--sample`, if there is one."""
        if self.display.sample is None:
            return
        with self.clock.part("samples"), precision.in_model_dtype(self.model):
            answer = self.task.answer(
                self.model.eval(),
                self.processor,
                self.display.sample,
                self.task_record,
                chat=bool(self.task_record.chat),
                max_new_tokens=self.display.sample_tokens,
            )
        self.samples.append((writer, answer))


def prepare(settings: Settings, rows: training_data.Rows) -> tuple[Any, AdapterTask]:
    """Return the run's tokenizer or processor, and the task record of its adapter.

    Raises:
        PeftcoreError: the base has no tokenizer for the task, or a setting does not fit the task.
    """
    task = registered.find(settings.task)
    start = Path(settings.adapter) if settings.adapter is not None else None
    previous = adapter_folders.adapter_task(start) if start is not None else None
    labels = _labels(settings, rows, start) if task.has_labels else ()
    processor = task.load_processor(settings.model, start)
    is_chat = any(row.messages is not None for row in rows.train)
    weights = (settings.desirable_weight, settings.undesirable_weight)
    pooling = None if settings.pooling == "auto" else settings.pooling
    if previous is not None and previous.pooling:
        pooling = previous.pooling
    task_record = AdapterTask(
        settings.task,
        settings.max_length,
        labels,
        chat=is_chat,
        beta=settings.beta,
        weights=None if weights == (1.0, 1.0) else weights,
        seed=settings.seed if task.new_head else None,
        pooling=pooling,
        language=settings.language,
    )
    task_record = task.prepare(processor, task_record, settings.model)
    if task_record.pooling is not None:
        say(f"pooling: {task_record.pooling}")
    previous_template = None if previous is None else previous.chat_template
    conversations.set_template(processor, settings.chat_template, previous_template)
    # Without --chat-template, the tokenizer has the template when the adapter is loaded, so it is not recorded.
    has_new_template = is_chat and bool(settings.chat_template)
    template = conversations.tokenizer_of(processor).chat_template if has_new_template else None
    return processor, replace(task_record, chat_template=template)


def _labels(settings: Settings, rows: training_data.Rows, start: Path | None) -> tuple[str, ...]:
    """Return a classifier's labels, from the examples or from the adapter in `start`, and print their counts."""
    counts = row_labels.counts_of(itertools.chain(rows.train, rows.validation))
    if counts:
        say(counts)
    if start is not None:
        return warm_start.labels_of(start, settings.labels)
    return tuple(row_labels.labels_of(itertools.chain(rows.train, rows.validation)))


def _adapted_model(settings: Settings, processor: Any, task_record: AdapterTask, examples: Examples) -> Any:
    """Return the base with the adapter to train, or the base itself with `--method full`."""
    set_seed(settings.seed)  # also determines a classifier's new head
    say(f"loading {settings.model} for {settings.task}")
    model = models.load_model(
        settings.model,
        settings.task,
        dtype=settings.dtype,
        device=settings.device,
        labels=task_record.labels,
        quantize=task_record.quantized,
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
        with contextlib.nullcontext() if batches is None else task.with_loss(model, task_record):
            peftcore.apply(model, settings.method, batches=batches, **settings.fields)
    if settings.pack and settings.method != FULL:
        packing.check(model, examples.train, settings.method)
    return model


def _check_metric(settings: Settings, metrics: Metrics) -> None:
    """Raise a PeftcoreError if `--metric` is not one of the evaluated metrics."""
    names = metrics.as_dict()
    if settings.metric is not None and generations.name_of(settings.metric) not in names:
        raise PeftcoreError(
            f"--metric {settings.metric} is not available for these examples. Pass one of {', '.join(names)}"
        )


def _final_metrics(trainer: Measuring, model: Any, evaluate: Evaluator, best: best_checkpoint.Best | None) -> Metrics:
    """Return the held-out metrics of the adapter to save (the best or the last)."""
    if best is not None:
        say(f"saving the adapter of {best}")
        with precision.in_model_dtype(model):
            return evaluate(model)
    if trainer.state.global_step not in trainer.metrics_by_step:
        trainer.evaluate()
    return trainer.metrics_by_step[trainer.state.global_step]


def _save(model: Any, folder: Path, settings: Settings, processor: Any, saved_record: AdapterTask | None) -> None:
    """Save the adapter with its task record, or the whole model with `--method full`."""
    if saved_record is None:
        model.save_pretrained(folder)
        return
    peftcore.save(model, folder)

    def write_record() -> None:
        saved_record.write(folder)
        if settings.adapter is not None and adapter_folders.has_tokenizer(Path(settings.adapter)):
            conversations.tokenizer_of(processor).save_pretrained(folder)

    ranks.once(write_record, together=True)


def first_batches(settings: Settings, train: Sequence[Example], tokenizer: Any, model: Any) -> DataLoader[Any] | None:
    """Return training batches for a method that initialises from data, or None for other methods."""
    if not takes_batches(settings.method, settings.fields):
        return None
    task = registered.find(settings.task)
    train = task.as_texts(train)
    order = LengthGroupedSampler(
        [encoded_examples.length(example) for example in train], settings.batch_size, settings.seed
    )

    def batch(batch_examples: list[Example]) -> dict[str, Any]:
        return encoded_examples.in_dtype(task.collate(batch_examples, tokenizer), model)

    return DataLoader(train, settings.batch_size, sampler=order, collate_fn=batch)  # type: ignore[arg-type]


def _checkpoint_to_resume(output: Path) -> str | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = latest_checkpoint(output / "checkpoints")
    for warning in caught:
        warn(str(warning.message))
    if checkpoint is None:
        warn(f"'{output}' has no complete checkpoint, so training starts from scratch")
    else:
        say(f"resuming from {checkpoint}")
    return checkpoint
