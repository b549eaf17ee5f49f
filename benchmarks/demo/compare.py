"""Every installed method on the demo's two tasks, next to the whole model and PEFT's runs of them.

    python benchmarks/demo/compare.py [FOLDER] [--reduced] [--task classifier|writer] [--method NAME ...]

FOLDER is the demo's (default: .demo at the top of the repository). MiniLM-L6 learns to tell kinds of movie reviews;
SmolLM2-135M learns to write them, and sentences of newspapers tell what it forgets. Each method is tried with the same
learning rates; a part of the training examples, which is not the test part, chooses (`peftcore compare --search`). Both
tasks run at once, in one thread each. A second call keeps the runs that are finished, and goes on.

In the reduced form a method has fewer steps, fewer rates and one seed, and the writer takes each method's own. --shared
leaves out times, of a machine that others use. What was found is benchmarks/demo/comparison.json; the page and the
picture, docs/comparison.md, are made from it.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from learning_rates import sentences
from run import CLASSIFIER, ROOT, WRITER, fetch

DENSE_WRITER = "models/smollm2"
RESULTS = ROOT / "benchmarks/demo/comparison.json"
# What a method cannot do without: a schedule's length, the tokens that it trains or that wake it (` movie review:`), a
# size of blocks or vectors that divides those of both models.
FIELDS = {
    "adalora": lambda steps: f"tinit={steps // 10} tfinal={steps * 2 // 5} total_step={steps}",
    "alora": lambda _: "alora_invocation_tokens=7704,2523,42",
    "c3a": lambda _: "block_size=64",
    "vblora": lambda _: "vector_length=64",
    "trainable-tokens": lambda _: "token_indices=" + ",".join(map(str, range(1000, 1100))),
}


@dataclass(frozen=True)
class Size:
    """Size of one task's runs. `rates`: learning rates of the search; None: each method has its own."""

    steps: int
    batch_size: int
    train: int
    test: int
    rates: str | None
    seeds: int


FULL = {
    "classifier": Size(150, 8, 1600, 500, "1e-4,1e-3,3e-3,3e-2", 3),
    "writer": Size(30, 4, 480, 100, "1e-4,1e-3,3e-3,3e-2", 3),
}
REDUCED = {
    "classifier": Size(40, 8, 800, 200, "3e-4,3e-3,3e-2", 1),
    "writer": Size(12, 4, 240, 24, None, 1),
}
MODELS = {"classifier": CLASSIFIER, "writer": DENSE_WRITER}
FILES = {"classifier": "classify", "writer": "write"}
OTHER_TEXTS = 24  # sentences of newspapers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".demo")
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--task", choices=list(MODELS), action="append")
    parser.add_argument("--method", action="append", help="one of those installed; default all")
    parser.add_argument("--shared", action="store_true", help="others use the machine: leave out times")
    parser.add_argument("--no-peft", action="store_true", help="leave out PEFT's runs that are not there yet")
    parser.add_argument("--page", action="store_true", help="run nothing; make the page from what was found")
    chosen = parser.parse_args()
    began = time.perf_counter()
    sizes = REDUCED if chosen.reduced else FULL
    folder = chosen.folder.resolve()
    output = folder / ("compare-reduced" if chosen.reduced else "compare")
    if not chosen.page:
        prepare(folder, sizes)
        run_tasks(folder, output, sizes, chosen)
    if chosen.page or not (chosen.method or chosen.task):
        from compare_collect import collect
        from compare_page import write_page

        if output.exists():
            found = collect(output, sizes, shared=chosen.shared)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        write_page(json.loads(RESULTS.read_text()), ROOT / "docs")
    print(f"\n{time.perf_counter() - began:.0f} s in all")


def prepare(folder: Path, sizes: dict[str, Size]) -> None:
    """Prepare models and examples; the language model in 16 bits, which is read much faster than its GGUF."""
    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder)
    if not (folder / DENSE_WRITER / "model.safetensors").exists():
        from peftcore_cli.bases import models

        written = folder / f"{DENSE_WRITER}-unfinished"
        models.load_model(str(folder / WRITER), "causal-lm", dtype="bf16", device="cpu").save_pretrained(written)
        models.load_tokenizer(str(folder / WRITER)).save_pretrained(written)
        written.rename(folder / DENSE_WRITER)
    for task, size in sizes.items():
        for part, count in (("train", size.train), ("test", size.test)):
            lines = (folder / f"data/{FILES[task]}_{part}.jsonl").read_text().splitlines(keepends=True)
            data_file(folder, task, part, size).write_text("".join(lines[:count]))
    texts = [text for _, text in sentences(folder, "news")]
    random.Random(0).shuffle(texts)
    rows = (json.dumps({"text": text}) + "\n" for text in texts[:OTHER_TEXTS])
    (folder / "data/compare_other.jsonl").write_text("".join(rows))


def data_file(folder: Path, task: str, part: str, size: Size) -> Path:
    return folder / f"data/compare_{task}_{part}_{getattr(size, part)}.jsonl"


def run_tasks(folder: Path, output: Path, sizes: dict[str, Size], chosen: argparse.Namespace) -> None:
    """Run both tasks at once, each in a process of this program."""
    tasks = chosen.task or list(MODELS)
    if len(tasks) == 1:
        run_task(folder, output / tasks[0], tasks[0], sizes[tasks[0]], chosen.method)
        if not chosen.no_peft:
            from compare_with_peft import against_peft

            against_peft(output / tasks[0])
        return
    more = [word for name in chosen.method or () for word in ("--method", name)]
    more += [option for option in ("--reduced", "--no-peft") if option in sys.argv]
    first, second = ([sys.executable, __file__, str(folder), "--task", task, *more] for task in tasks)
    with open(folder / f"compare-{tasks[1]}.log", "a") as log:
        print(f"what {tasks[1]} prints is in {log.name}")
        beside = subprocess.Popen(second, env=environment(), stdout=log, stderr=log)
        try:
            failed = subprocess.run(first, env=environment()).returncode
        finally:
            failed_beside = beside.wait()  # Ctrl-C reaches both
    if failed or failed_beside:
        sys.exit(failed or failed_beside)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_task(folder: Path, output: Path, task: str, size: Size, names: list[str] | None) -> None:
    """Run `peftcore compare` for one task."""
    import peftcore

    methods = []
    for name in names or [*peftcore.methods(), "full"]:
        methods += ["--method", " ".join([name, *(FIELDS[name](size.steps).split() if name in FIELDS else [])])]
    train, test = (str(data_file(folder, task, part, size)) for part in ("train", "test"))
    # fmt: off
    command = ["compare", "--model", str(folder / MODELS[task]), "--data", train, "--eval-data", test, *methods,
               "--no-full", "--seeds", str(size.seeds), "--steps", str(size.steps),
               "--batch-size", str(size.batch_size), "--max-length", "64", "--output", str(output), "--resume"]
    # fmt: on
    if size.rates:
        command += ["--search", f"lr={size.rates}"]
    if task == "writer":
        command += ["--other-data", str(folder / "data/compare_other.jsonl"), "--dtype", "bf16"]
    print(f"\n$ peftcore {shlex.join(command)}", flush=True)
    finished = subprocess.run([sys.executable, "-m", "peftcore_cli", *command], env=environment()).returncode
    if finished != 0:
        sys.exit(finished)


if __name__ == "__main__":
    main()
