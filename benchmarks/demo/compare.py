"""Every method on the demo's classifier, three seeds each, and peft beside those it has, with the same settings.

    python benchmarks/demo/compare.py [FOLDER] [METHOD ...]

FOLDER is the demo's (default: .demo at the top of the repository), METHOD names those to be run (default: all).
MiniLM-L6 learns from 1,600 movie-review snippets, one pass in batches of 8, and is measured on 500 others. A second
call keeps the runs that are finished. The learning rates are the best of those tried with one or two seeds (BitFit
fails to learn above 3e-3, prompt tuning at 0.3).
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from run import CLASSIFIER, ROOT, fetch, peftcore

SEEDS = 3
METHODS = (
    "lora r=8 lora_alpha=16 lr=1e-3",
    "qlora r=8 lora_alpha=16 lr=1e-3",
    "adapter lr=1e-3",
    "adapter is_parallel=true scaling=4 lr=3e-4",
    "prefix-tuning lr=2e-2",
    "prompt-tuning lr=0.1",
    "bitfit lr=1e-3",
    "dora r=8 lora_alpha=16 lr=1e-3",
    "vera r=256 lr=3e-2",
    "ia3 lr=1e-2",
    "adalora lora_alpha=32 tinit=20 tfinal=80 total_step=200 lr=5e-3",
    "full lr=1e-4",
)
SCHEDULE = {"lora_alpha": 32, "tinit": 20, "tfinal": 80, "total_step": 200}
# What peft has; its settings are read off our runs.
PEERS = {
    "lora r=8 lora_alpha=16": ("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "prefix-tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 20}),
    "prompt-tuning": ("PromptTuningConfig", {"num_virtual_tokens": 20}),
    "dora r=8 lora_alpha=16": (
        "LoraConfig",
        {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True},
    ),
    "vera r=256": ("VeraConfig", {"r": 256, "target_modules": "all-linear"}),
    "ia3": ("IA3Config", {"target_modules": "all-linear", "feedforward_modules": [".output.dense"]}),
    "adalora lora_alpha=32 tinit=20 tfinal=80 total_step=200": (
        "AdaLoraConfig",
        {"target_modules": "all-linear", **SCHEDULE},
    ),
}


def main(folder: Path, chosen: list[str]) -> None:
    methods = [text for text in METHODS if not chosen or text.split()[0] in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder)
    for name, count in (("train", 1600), ("test", 500)):
        lines = (folder / f"data/classify_{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"data/compare_{name}.jsonl").write_text("".join(lines[:count]))
    # fmt: off
    peftcore(folder, "compare", "--model", CLASSIFIER, "--data", "data/compare_train.jsonl",
             "--eval-data", "data/compare_test.jsonl", *(word for text in methods for word in ("--method", text)),
             "--full" if any(text.startswith("full") for text in methods) else "--no-full",
             "--seeds", str(SEEDS), "--epochs", "1", "--batch-size", "8", "--max-length", "64",
             "--output", "-".join(["compare", *chosen]), "--resume")
    # fmt: on
    beside_peft(folder / "-".join(["compare", *chosen]), [text.rpartition(" lr=")[0] for text in methods])


def beside_peft(output: Path, labels: list[str]) -> None:
    """Run peft, and peftcore from peft's initial values, each time in a process of its own, and print all."""
    print(f"\n{'held-out accuracy, %':28}{'peftcore':>16}{'from its start':>16}{'peft':>16}{'step, ms':>12}{'peft':>8}")
    for label in (label for label in PEERS if label in labels):
        ours, same, theirs = [], [], []
        for seed in range(SEEDS):
            run = output / "runs" / label / f"seed-{seed}"
            ours.append(json.loads((run / "result.json").read_text()))
            for library, found in (("peft", theirs), ("peftcore", same)):
                result = run / f"beside-{library}.json"
                if not result.exists():
                    command = [sys.executable, __file__, "--beside", library, label, run]
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                found.append(json.loads(result.read_text()))
        if "error" in theirs[0]:
            print(f"{label:28}{shown(ours):>16}   peft: {theirs[0]['error']}")
            continue
        assert ours[0]["trainable_parameters"] == theirs[0]["trainable_parameters"], label
        steps = [1e3 * statistics.median(run["step_seconds"] for run in runs) for runs in (ours, theirs)]
        print(f"{label:28}{shown(ours):>16}{shown(same):>16}{shown(theirs):>16}{steps[0]:12.0f}{steps[1]:8.0f}")
        for seed, runs in enumerate(zip(ours, same, theirs, strict=True)):
            accuracies = "".join(f"{100 * run['after']['accuracy']:16.1f}" for run in runs)
            print(f"{f'  seed {seed}':28}{accuracies}")


def shown(runs: list[dict]) -> str:
    values = [100 * run["after"]["accuracy"] for run in runs]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def train_beside(library: str, label: str, run: Path) -> dict:
    """The run in the folder `run` with peft in place of peftcore, or with peftcore from peft's initial values."""
    import warnings

    import peft
    from transformers import PrinterCallback, set_seed

    import peftcore
    from peftcore.cli import data, models, progress, tasks, trainers, training
    from peftcore.cli import settings as run_settings

    warnings.simplefilter("ignore")
    settings = run_settings.Settings(**json.loads((run / run_settings.RUN_FILE).read_text()))
    train_rows, eval_rows = training.read_splits(settings)
    labels = tuple(data.labels_of(train_rows))
    tokenizer = models.load_tokenizer(settings.model)
    train, held_out = (
        training.encode_examples(what, rows, settings, tokenizer, labels)
        for what, rows in (("training", train_rows), ("held-out", eval_rows))
    )

    def fresh():
        set_seed(settings.seed)
        return models.load_model(settings.model, settings.task, device="cpu", labels=labels)

    config, fields = PEERS[label]
    model = peft.get_peft_model(fresh(), getattr(peft, config)(task_type="SEQ_CLS", **fields))
    if library == "peftcore":
        model.save_pretrained(run / "start")
        model = fresh()
        peftcore.load(model, run / "start")
    meter = progress.Meter()
    arguments = training.training_arguments(settings, run / f"beside-{library}", len(train))
    arguments.save_strategy = "no"
    trainer = trainers.MeasuringTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=tasks.collator(tokenizer),
        callbacks=[meter],
        measure=lambda model: tasks.measure(model, held_out, tokenizer),
        lengths=[len(example["input_ids"]) for example in train],
    )
    trainer.remove_callback(PrinterCallback)
    if library == "peft" and hasattr(model.base_model, "update_and_allocate"):
        trainer.add_callback(allocating(model.base_model))
    trainer.train()
    return {
        "after": tasks.measure(model, held_out, tokenizer).as_dict(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_seconds": meter.step_seconds,
        "peak": progress.peak_memory(),
    }


def allocating(tuner: object) -> object:
    """What PEFT's documentation lets a loop do for AdaLoRA; steps count from 1."""
    from transformers import TrainerCallback

    class Allocating(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            tuner.update_and_allocate(state.global_step + 1)

    return Allocating()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--beside"]:
        library, label, run = *sys.argv[2:4], Path(sys.argv[4])
        try:
            result = train_beside(library, label, run)
        except ValueError as error:  # peft 0.21 cannot run every method on every model
            result = {"error": str(error)}
        (run / f"beside-{library}.json").write_text(json.dumps(result, indent=2) + "\n")
    else:
        began = time.perf_counter()
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".demo", sys.argv[2:])
        print(f"\n{time.perf_counter() - began:.0f} s in all")
