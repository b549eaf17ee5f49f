"""One training run: from settings to an adapter folder, checkpoints, and facts for the report.

OUTPUT/checkpoints/   adapter, optimizer, scheduler, RNG and trainer state
OUTPUT/adapter/       the result, in Hugging Face PEFT's format
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
from peftcore import ranks
from peftcore.cli import (
    adapter_folders,
    best_checkpoint,
    comparisons,
    conversations,
    data,
    dtype_choice,
    generations,
    light_step,
    models,
    packing,
    precision,
    preferences,
    progress,
    rollouts,
    row_labels,
    sentence_pairs,
    speech,
    streamed,
    tasks,
    trainer_arguments,
    trainers,
    training_data,
    transcripts,
    warm_start,
)
from peftcore.cli import forecast as forecasts
from peftcore.cli.adapter_folders import AdapterTask
from peftcore.cli.console import say, warn
from peftcore.cli.memory_trace import MemoryTrace
from peftcore.cli.metrics import Metrics
from peftcore.cli.options import FULL
from peftcore.cli.row import Row
from peftcore.cli.run_result import Result, Stopped
from peftcore.cli.sampler import LengthGroupedSampler
from peftcore.cli.settings import Settings
from peftcore.engine import takes_batches
from peftcore.engine.fusing import fused_modules
from peftcore.engine.lazy_head import has_lazy_logits
from peftcore.errors import PeftcoreError
from peftcore.integrations.transformers import latest_checkpoint
from peftcore.merging.merged_layers import mergeable
from peftcore.quantization import QuantizedLinear

_PROBED = 100  # first lines of streamed examples, on which operators are probed


def run(
    settings: Settings,
    output: Path,
    *,
    resume: bool,
    sample: str | None = None,
    sample_tokens: int = 48,
    report_to: Sequence[str] = (),
    force: bool = False,
) -> Result:
    """Train, evaluate before and after, and save the adapter.

    Args:
        settings: of the run.
        output: folder of the run.
        resume: continue from the latest checkpoint.
        sample: prompt to answer before and after, in at most `sample_tokens` tokens.
        sample_tokens: see `sample`.
        report_to: services that receive Trainer's log, see `reporting`.
        force: run even if the predicted memory is not available.

    Raises:
        PeftcoreError: the data, the model or a setting is wrong, or there is not enough memory.
        Stopped: Ctrl-C; a checkpoint has been written.
    """
    began = time.perf_counter()
    lines, kept = None, list[int]()
    if settings.streaming:
        lines, kept, eval_rows = training_data.streamed_splits(settings)
        first_lines = itertools.islice((i for i in range(len(lines)) if i not in kept), _PROBED)
        train_rows, validation_rows = [lines[i] for i in first_lines], list[Row]()
    else:
        train_rows, eval_rows, validation_rows = training_data.read_splits(settings)
    start = Path(settings.adapter) if settings.adapter is not None else None
    labels: tuple[str, ...] = ()
    if settings.task in data.HEADED:
        seen = [*train_rows, *validation_rows]
        labels = tuple(row_labels.labels_of(seen)) if start is None else warm_start.labels_of(start, settings.labels)
    tokenizer = models.load_processor(settings.model, settings.task, start)
    if settings.task == data.SPEECH:
        speech.set_language(tokenizer, settings.language, models.load_generation_config(settings.model))
    pooling = ""
    if settings.task == data.EMBEDDING:
        before_it = adapter_folders.adapter_task(start).pooling if start is not None else None
        pooling = sentence_pairs.pooling_of(settings.model, before_it or settings.pooling)
        say(f"texts become vectors by {pooling} pooling")
    of_adapter = adapter_folders.adapter_task(start).chat_template if start is not None else None
    conversations.set_template(tokenizer, settings.chat_template, of_adapter)
    is_chat = any(row.messages is not None for row in train_rows)
    of_sets = training_data.encode_parts(
        "training" if lines is None else "first", train_rows, settings, tokenizer, labels
    )
    held_out_sets = training_data.encode_parts("held-out", eval_rows, settings, tokenizer, labels)
    train, held_out = ([each for part in sets.values() for each in part] for sets in (of_sets, held_out_sets))
    validation, other = (
        training_data.encode_examples(what, rows, settings, tokenizer, labels) if rows else []
        for what, rows in (("validation", validation_rows), ("other", training_data.other_rows(settings)))
    )
    is_mixed = len(data.sources(settings.data)) > 1 and lines is None
    if not is_mixed or settings.eval_data is not None:
        held_out_sets = {}  # not held out of the data sets

    rows, parts = training_data.weighted(of_sets, settings)
    if settings.pack:
        say(f"packed {len(train):,} examples into {len(rows):,} rows of at most {settings.max_length} tokens")
    sizes = training_data.lengths(rows, settings.task)
    longest = max(sizes)
    examples: Any = rows
    if lines is not None:

        def encode(some: list[Row]) -> list[tasks.Example]:
            return tasks.encode(some, settings.task, tokenizer, settings.max_length, may_be_empty=True).examples

        examples, longest = streamed.EncodedLines(lines, encode, kept), settings.max_length
        parts = [(len(examples), 1.0)]
        say(f"{len(examples):,} lines of {len(lines.files):,} files stay there; texts are cut at {longest} tokens")
    base_in = dtype_choice.of_run(settings, labels)
    settings = replace(settings, dtype=base_in.say())
    predicted = forecasts.forecast(settings, longest, labels)
    if predicted is not None:
        if base_in.instead_of == "bf16":
            predicted = replace(predicted, lighter=("--dtype bf16",))
        say(str(predicted))
        if not force:
            said = predicted  # with several processes the first one decides, because free memory changes
            ranks.once(lambda: forecasts.refuse_if_too_large(said, settings), together=True)
    packed: Any = settings.quantize
    if settings.method != FULL and start is None and packed is None:
        packed = models.packing_by(settings.method, settings.fields, settings.model, settings.task, labels)
    set_seed(settings.seed)  # also initialises a classifier's new head
    say(f"loading {settings.model} for {settings.task}")
    model = models.load_model(
        settings.model, settings.task, dtype=settings.dtype, device=settings.device, labels=labels, quantize=packed
    )
    if settings.pack:
        packing.check(model, train, type(model).__name__)
    if settings.method == FULL:
        model.requires_grad_(True)
    elif start is not None:
        warm_start.load(model, settings)
    else:
        batches = first_batches(settings, rows, tokenizer)
        peftcore.apply(model, settings.method, batches=batches, **settings.fields)
    if settings.pack and settings.method != FULL:
        packing.check(model, train, settings.method)
    summary = peftcore.summary(model)
    say(str(summary))

    def sample_text() -> str:
        prompt: Any = [{"role": "user", "content": sample}] if is_chat else sample or ""
        with precision.own(model):
            return tasks.generate_text(model.eval(), tokenizer, prompt, max_new_tokens=sample_tokens)

    comparison = comparisons.of(settings.task) if settings.task in data.COMPARED else None
    reward = rollouts.load_reward(settings.reward) if settings.reward is not None else None
    answering = None
    answered = generations.count(settings.task, settings.metric, settings.eval_answers)
    if answered and settings.task != data.SPEECH:
        answering = generations.Answering(
            eval_rows,
            settings.task,
            tokenizer,
            settings.metric,
            count=answered,
            max_length=settings.max_length,
            max_new_tokens=settings.answer_tokens,
        )
    first: dict[int, Any] = {}  # the reference of comparisons
    weights = (settings.desirable_weight, settings.undesirable_weight)
    pairs = preferences.pairs_at_once(settings.batch_size, longest)

    def measure(model: Any, examples: list[tasks.Example] = held_out) -> Metrics:
        if reward is not None:
            return rollouts.measure(model, examples, tokenizer, reward, settings.answer_tokens)
        if comparison is not None:
            how = {"beta": settings.beta, "reference": first[id(examples)], "weights": weights}
            return comparisons.measure(settings.task, model, examples, tokenizer, pairs, **how)
        if settings.task == data.SPEECH:
            count = answered if examples is held_out else 0
            return transcripts.measure(model, examples, tokenizer, settings.batch_size, answered=count)
        if settings.task == data.EMBEDDING:
            return sentence_pairs.measure(model, examples, tokenizer, settings.batch_size, pooling=pooling)
        # Not more tokens at once than in training, so that measuring fits too.
        tag_names = labels if settings.task == data.TAGS else ()
        budget = settings.batch_size * longest
        if answering is not None and examples is held_out:
            return generations.measure(answering, model, examples, tokenizer, tokens=budget)
        return tasks.measure(model, examples, tokenizer, tokens=budget, tag_names=tag_names)

    with peftcore.disabled(model) if settings.method != FULL and start is None else contextlib.nullcontext():
        if comparison is not None:
            measured = [part for part in (held_out, validation, *held_out_sets.values()) if part]
            first |= {
                id(part): comparison.likelihoods(model, part, tokenizer, pairs) if comparison.HAS_REFERENCE else []
                for part in measured
            }
        say("measuring held-out examples ...")
        before = measure(model)
        other_before = measure(model, other) if other else None
        sets_before = training_data.losses(held_out_sets, lambda some: measure(model, some))
        name = "base" if start is None else "the adapter before"
        samples = [(name, sample_text())] if sample is not None else []
    if settings.metric is not None and generations.name_of(settings.metric) not in before.as_dict():
        raise PeftcoreError(
            f"--metric {settings.metric} is not measured on these examples, which have {', '.join(before.as_dict())}. "
            "Pass one of these"
        )
    say(f"before training, on {len(eval_rows):,} held-out examples: {before}", "bold")

    light_step.fuse(model, settings, rows, tokenizer)
    if settings.parallel == "fsdp2":
        peftcore.shard(model)
    light_step.use_lazy_logits(model, settings, rows, tokenizer)
    summary = replace(summary, fused=fused_modules(model), lazy_logits=has_lazy_logits(model))
    meter, stop, trace = progress.Meter(), progress.OrderlyStop(), MemoryTrace(model)
    keeper = None
    if best_checkpoint.is_wanted(settings):
        keeper = best_checkpoint.BestCheckpoint(generations.name_of(settings.metric or "loss"), settings.patience)
    common = {
        "model": model,
        "args": trainer_arguments.of_run(settings, output, training_data.draws(parts), report_to),
        "train_dataset": examples,
        "eval_dataset": held_out,
        "callbacks": [meter, stop, trace, *([keeper] if keeper else [])],
        "measure": measure,
        "parts": parts,
    }
    trainer: trainers.Measuring
    if comparison is not None:
        if reward is not None:
            common["reward_funcs"] = [reward]
        trainer = trainers.comparing_trainer(settings.task, **common, lengths=sizes, processing_class=tokenizer)
    elif settings.task == data.EMBEDDING:
        collate = tasks.collator(tokenizer)
        trainer = trainers.EmbeddingTrainer(**common, lengths=sizes, data_collator=collate, pooling=pooling)
    else:
        is_mean = settings.task in (data.TAGS, data.SEQ2SEQ, data.SPEECH)  # the loss of a batch, whatever the step has
        trainer = trainers.MeasuringTrainer(
            **common, lengths=sizes, data_collator=tasks.collator(tokenizer), divides_by_tokens=not is_mean
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
    if best is not None:
        say(f"saving the adapter of {best}")
        with precision.own(model):
            after = measure(model)
    elif trainer.state.global_step not in trainer.measured:
        trainer.evaluate()
    if sample is not None:
        samples.append(("with the adapter", sample_text()))
    adapter = output / "adapter"
    if settings.method == FULL:
        model.save_pretrained(adapter)
    else:
        peftcore.save(model, adapter)
        template = conversations.tokenizer_of(tokenizer).chat_template if is_chat and settings.chat_template else None
        seed = settings.seed if settings.task in data.NEW_HEAD else None
        made_for = AdapterTask(
            settings.task,
            settings.max_length,
            labels,
            chat=is_chat,
            chat_template=template,
            beta=settings.beta,
            weights=None if weights == (1.0, 1.0) else weights,
            dtype=settings.dtype,
            seed=seed,
            pooling=pooling or None,
            language=settings.language,
        )

        def write_beside() -> None:
            made_for.write(adapter)
            if start is not None and adapter_folders.has_tokenizer(start):
                conversations.tokenizer_of(tokenizer).save_pretrained(adapter)

        ranks.once(write_beside, together=True)
    with precision.own(model):
        chosen_by = measure(model, validation) if validation else None
        other_after = measure(model, other) if other else None
        sets_after = training_data.losses(held_out_sets, lambda some: measure(model, some))
    return Result(
        before=before,
        after=trainer.measured[trainer.state.global_step] if best is None else after,
        history=trainer.state.log_history,
        summary=summary,
        steps=trainer.state.global_step,
        train_rows=len(train_rows) if lines is None else len(examples),
        eval_rows=len(eval_rows),
        seconds=time.perf_counter() - began,
        training_seconds=meter.seconds,
        step_seconds=meter.step_seconds,
        tokens_per_second=meter.tokens_per_second,
        examples_per_second=settings.batch_size * settings.grad_accum * settings.ranks / (meter.step_seconds or 1.0),
        peak=progress.peak_memory(),
        adapter=adapter,
        adapter_bytes=sum(file.stat().st_size for file in adapter.iterdir()),
        samples=samples,
        quantize=next((m.quant_type for m in model.modules() if isinstance(m, QuantizedLinear)), None),
        is_chat=is_chat,
        labels=labels,
        predicted=predicted,
        trace=trace.largest,
        validation=chosen_by,
        other=(other_before, other_after) if other_before and other_after else None,
        merges=None if settings.method == FULL else mergeable(model),
        best=best,
        data_sets=training_data.facts(settings, train_rows, of_sets, held_out_sets, sets_before, sets_after)
        if is_mixed
        else [],
    )


def first_batches(settings: Settings, train: list[tasks.Example], tokenizer: Any) -> DataLoader[Any] | None:
    """Return the training batches for methods that initialise from data; None for others."""
    if not takes_batches(settings.method, settings.fields):
        return None
    if settings.task == data.EMBEDDING:
        raise PeftcoreError(
            f"--method {settings.method} initialises from the loss of batches, which --task pairs does not have. Use "
            "another method or initialisation"
        )
    if settings.task in data.COMPARED:
        train = comparisons.of(settings.task).as_texts(train)
    order = LengthGroupedSampler([tasks.length(each) for each in train], settings.batch_size, settings.seed)
    return DataLoader(train, settings.batch_size, sampler=order, collate_fn=tasks.collator(tokenizer))  # type: ignore[arg-type]


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
