"""PEFT's run for each of ours: the first seed at the rate that was found, from the initial values of ours.

Our adapter is saved before its first step, and PEFT trains what it reads there: what both end with is then the same
arithmetic, or not. Prompts begin with PEFT's own values, since it reads them only to use them. Each run is a process of
its own; what is finished is kept.
"""

import json
import traceback
from pathlib import Path

from compare_collect import PEFT_RESULT, rows_of

KINDS = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def against_peft(output: Path) -> None:
    """Run PEFT for every row of a comparison whose method it has."""
    from peftcore_compare import training_process

    for row in rows_of(output):
        if (
            not row.finished_runs
            or (row.first / PEFT_RESULT).exists()
            or not peft_has(row.first, row.settings["method"])
        ):
            continue
        status = training_process.in_process(main, row.first, lambda line: None)
        if status != 0:
            (row.first / PEFT_RESULT).write_text(json.dumps({"error": f"it ended with status {status}"}))
        found = json.loads((row.first / PEFT_RESULT).read_text())
        print(f"peft {row.settings['method']}: {found.get('error') or found['after']}", flush=True)


def peft_has(run: Path, method: str) -> bool:
    """Return whether PEFT has this method. It has QLoRA as LoRA over a base that another library has packed."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import peftcore

    saved = run / "adapter" / "adapter_config.json"
    known = saved.exists() and json.loads(saved.read_text())["peft_type"] in PEFT_TYPE_TO_CONFIG_MAPPING
    return known and peftcore.method(method).recorded_as is None


def main(run: Path) -> int:
    try:
        found = train(run)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    (run / PEFT_RESULT).write_text(json.dumps(found, indent=2) + "\n")
    return 0


def train(run: Path) -> dict:
    """Train the run in the folder `run` with PEFT in place of peftcore."""
    import gc
    import warnings

    import peft
    import torch
    from peftcore_cli import settings
    from peftcore_cli.bases import models
    from peftcore_cli.tasks import registered
    from peftcore_cli.training import measuring, progress, trainer_arguments, trainers, training_data, training_run
    from transformers import PrinterCallback, set_seed

    import peftcore

    warnings.simplefilter("ignore")
    chosen = settings.Settings(**json.loads((run / settings.RUN_FILE).read_text()))
    split = training_data.read(chosen)
    task = registered.find(chosen.task)
    tokenizer, about = training_run.prepare(chosen, split)
    labels = about.labels
    how = measuring.evaluation_of(chosen, tokenizer, about, split.held_out, batch_size=min(16, chosen.batch_size))
    rows, held_out = (
        training_data.encode_sets(what, part, chosen, tokenizer, labels).examples
        for what, part in (("training", split.train), ("held-out", split.held_out))
    )

    def fresh():
        set_seed(chosen.seed)
        return models.load_model(chosen.model, chosen.task, dtype=chosen.dtype, device="cpu", labels=labels)

    base = fresh()
    batches = training_run.first_batches(chosen, rows, tokenizer, base)
    ours = peftcore.apply(base, chosen.method, batches=batches, **chosen.fields)
    trainable = peftcore.summary(ours).trainable_parameters
    peftcore.save(ours, run / "start")
    del ours, base
    gc.collect()
    config = peft.PeftConfig.from_pretrained(run / "start")
    config.task_type, config.inference_mode = KINDS[chosen.task], False
    if config.is_prompt_learning:  # which PEFT loads for inference alone: it begins with values of its own
        model = peft.get_peft_model(fresh(), config)
    else:
        model = peft.PeftModel.from_pretrained(fresh(), run / "start", config=config, is_trainable=True)
    meter = progress.Meter()
    arguments = trainer_arguments.of_run(chosen, run / "peft", len(rows))
    arguments.save_strategy = "no"
    trainer = trainers.MeasuringTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=task.collator(tokenizer),
        callbacks=[meter],
        measure=lambda model: task.measure(model, held_out, how),
        lengths=[len(example["input_ids"]) for example in rows],
    )
    trainer.remove_callback(PrinterCallback)
    if hasattr(model.base_model, "update_and_allocate"):
        trainer.add_callback(allocating(model.base_model))
    trainer.train()
    return {
        "after": task.measure(model, held_out, how).as_dict(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "ours_trainable_parameters": trainable,
        "step_seconds": meter.step_seconds,
        "peak": progress.peak_memory(),
        "torch": torch.__version__,
    }


def allocating(tuner: object) -> object:
    """Return a callback with what PEFT's documentation does after each step of AdaLoRA; steps count from 1."""
    from transformers import TrainerCallback

    class Allocating(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            tuner.update_and_allocate(state.global_step + 1)

    return Allocating()
