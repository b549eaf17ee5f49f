"""Suggest options for the names that they have in other programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peftcore_cli import completion, console
from peftcore_cli.option_groups import GroupedCommand

# Names of transformers, TRL, axolotl, LLaMA-Factory and torchtune: ours.
OPTIONS = {
    "learning-rate": "lr",
    "num-train-epochs": "epochs",
    "num-epochs": "epochs",
    "max-steps": "steps",
    "max-iters": "steps",
    "per-device-train-batch-size": "batch-size",
    "micro-batch-size": "batch-size",
    "gradient-accumulation-steps": "grad-accum",
    "gradient-clipping": "max-grad-norm",
    "predict-with-generate": "eval-answers",
    "lr-scheduler-type": "scheduler",
    "lr-scheduler": "scheduler",
    "warmup-steps": "warmup",
    "warmup-ratio": "warmup",
    "max-seq-length": "max-length",
    "sequence-len": "max-length",
    "cutoff-len": "max-length",
    "packing": "pack",
    "sample-packing": "pack",
    "model-name-or-path": "model",
    "base-model": "model",
    "dataset": "data",
    "dataset-name": "data",
    "train-file": "data",
    "validation-file": "eval-data",
    "output-dir": "output",
    "optimizer": "optim",
    "eval-steps": "eval-every",
    "save-steps": "save-every",
    "save-total-limit": "keep",
    "val-set-size": "holdout",
    "early-stopping-patience": "patience",
    "load-best-model-at-end": "load-best",
    "metric-for-best-model": "metric",
    "resume-from-checkpoint": "resume",
    "load-in-4bit": "quantize",
    "peft": "method",
    "finetuning-type": "method",
    "rank": "set",
}


def of_option(name: str, options: Iterable[str]) -> str | None:
    """Return the option that another program calls `name`, or None. Both names include the leading dashes."""
    bare_name = name.lstrip("-").replace("_", "-")
    our_name = OPTIONS.get(bare_name)
    if our_name is None and bare_name.partition("-")[0] in completion.methods(""):  # such as lora-r
        our_name = "set"
    return f"--{our_name}" if our_name is not None and f"--{our_name}" in options else None


class SuggestingCommand(GroupedCommand):
    """Command that suggests options for unknown ones, and prints errors on one rank only."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's exception; typer may bundle its own copy
            name = getattr(error, "option_name", None)
            if type(error).__name__ == "NoSuchOption" and isinstance(name, str):
                suggestion = of_option(name, [option for param in self.params for option in param.opts])
                if name in ("--adapter", "-a") and any(param.name in ("adapter", "adapters") for param in self.params):
                    example = f"peftcore {ctx.info_name} ADAPTER"  # `train` alone has the option
                    error.message = f"No such option: {name}. The adapter is an argument: {example}"  # type: ignore[attr-defined]
                    error.possibilities = None  # type: ignore[attr-defined]
                elif suggestion is not None:
                    usage = f"{suggestion} NAME=VALUE" if suggestion == "--set" else suggestion
                    error.message = f"No such option: {name}. Did you mean {usage}?"  # type: ignore[attr-defined]
                    error.possibilities = None  # type: ignore[attr-defined]
            if hasattr(error, "format_message"):  # not `--help`
                if isinstance(getattr(error, "message", None), str):  # may quote a file of `--config`
                    error.message = console.printable(error.message)  # type: ignore[attr-defined]
                console.leave_to_first_rank()
            raise
