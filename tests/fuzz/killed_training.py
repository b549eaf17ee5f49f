"""`peftcore train --optim paged_adamw_8bit`, killed at random times and resumed: COUNT kills in FOLDER.

    python -m fuzz.killed_training FOLDER COUNT SEED

A run is killed and resumed until it ends, then another begins. Of each its adapter must be that of a run that nothing
stopped, bit for bit; a line says after how many kills it ended, and from which steps it went on. Processes are forks of
this one, which has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from support.commands import SPECIAL, WORDS, save_tokenizer, write_jsonl

# The state is 23 pages of 4 KiB, of which 4 are resident, so that pages leave and come at each step.
OPTIONS = ["--method", "lora", "--set", "r=32", "--set", "lora_dropout=0.2", "--batch-size", 2, "--grad-accum", 2]
OPTIONS += ["--optim", "paged_adamw_8bit", "--optim-args", "budget=16384,page_bytes=4096", "--lr", "0.02"]
OPTIONS += ["--steps", 60, "--save-every", 3, "--eval-every", 30, "--device", "cpu", "--dtype", "fp32", "--force"]

_TRAINS = "before training|resuming from"  # what is printed last before the first step


def prepare(folder: Path) -> list[Any]:
    """Write a tiny model and examples; the arguments of `train` without the output."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(SPECIAL + WORDS), **sizes, **special)).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    rows = [
        {"prompt": f"the film is {word} {more}", "completion": answer}
        for word, answer in (("good", "much fun with heart"), ("bad", "no story and dull"))
        for more in ("", "very", "a", "it was", "and", "not", "the film")
    ]
    data = write_jsonl(folder / "data.jsonl", rows)
    return ["train", "-m", folder / "model", "-d", data, *OPTIONS]


def begin(arguments: list[Any], log: Path) -> int:
    """Run the command in a fork; its process id."""
    log.write_text("")
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            from peftcore_cli.app import build

            words = [str(argument) for argument in arguments]
            build(words)(words, standalone_mode=False)
            status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        with open(log, "a") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(status)


class Watched(NamedTuple):
    """How long it took; the status of the process, None while it runs."""

    seconds: float
    status: int | None


def until(child: int, log: Path, text: str | None, seconds: float) -> Watched:
    """Wait until the process has ended, has printed `text` to its log, or the time is over."""
    began = time.monotonic()
    status = None
    while status is None and time.monotonic() < began + seconds:
        found, code = os.waitpid(child, os.WNOHANG)
        status = code if found else None
        if text is not None and re.search(text, log.read_text()):
            break
        time.sleep(0.002)
    return Watched(time.monotonic() - began, status)


def adapter(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses(run: Path) -> list[Any]:
    state = json.loads((run / "checkpoints" / "checkpoint-60" / "trainer_state.json").read_text())
    return [(entry["step"], entry.get("loss"), entry.get("eval_loss")) for entry in state["log_history"]]


def main(folder: Path, count: int, seed: int) -> None:
    import peftcore_cli.app
    import peftcore_cli.training.training_run  # noqa: F401
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments, rng = prepare(folder), random.Random(seed)
    child = begin([*arguments, "-o", folder / "whole"], folder / "log")
    startup = until(child, folder / "log", _TRAINS, 600)
    training = until(child, folder / "log", None, 600)
    assert training.status == 0, _tail(folder / "log")
    wanted = adapter(folder / "whole")
    killed = runs = 0
    while killed < count:
        output, steps, here = folder / f"run-{runs}", [], 0
        resume: list[Any] = []
        while True:
            child = begin([*arguments, "-o", output, *resume], folder / "log")
            early = rng.random() < 0.1  # else while it trains and saves
            status = None
            if killed == count:
                status = until(child, folder / "log", None, 600).status
            elif early:
                status = until(child, folder / "log", None, rng.uniform(0, startup.seconds)).status
            elif (status := until(child, folder / "log", _TRAINS, 600).status) is None:
                status = until(child, folder / "log", None, rng.uniform(0, 1.1) * training.seconds).status
            if status is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                killed, here = killed + 1, here + 1
            shown = (folder / "log").read_text()
            if resume:
                at = re.search(r"checkpoint-(\d+)", shown)
                steps.append(int(at[1]) if at else 0)
            output.mkdir(exist_ok=True)  # it may be killed before it has made the folder
            resume = ["--resume"]
            if status is not None:
                assert status == 0, f"run {runs} ended with {status} after {here} kills:\n{_tail(folder / 'log')}"
                break
        found = adapter(output)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), f"run {runs}: other tensors"
        assert losses(output) == losses(folder / "whole"), f"run {runs}: other losses"
        print(f"run {runs}: {here} kills, went on from {steps}", flush=True)
        shutil.rmtree(output)
        runs += 1
    print(f"done: {killed} kills in {runs} runs of {startup.seconds:.1f} and {training.seconds:.1f} s")


def _tail(log: Path) -> str:
    return log.read_text()[-3000:]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
