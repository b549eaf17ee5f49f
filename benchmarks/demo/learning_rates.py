"""Learning rates of each method that learn within 60 steps, on four small tasks; how the defaults were chosen.

    python benchmarks/demo/learning_rates.py [--folder FOLDER] [--task TASK ...] [--method METHOD ...] [--rate RATE ...]

FOLDER is the demo's (default: .demo at the top of the repository), whose models and data are used: MiniLM-L6 tells
kinds of movie reviews, of tweets, and where a sentence comes from (four sources); SmolLM2-135M learns to write reviews.
Each is a run of `peftcore train` with its defaults but for 60 steps in batches of 8, on 200 held-out examples. What is
finished is kept in FOLDER/learning_rates.jsonl; the table is printed from it.
"""

import argparse
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from run import CLASSIFIER, ROOT, WRITER, fetch

STEPS, HELD_OUT = 60, 200
TASKS = {"reviews": CLASSIFIER, "tweets": CLASSIFIER, "sources": CLASSIFIER, "writer": WRITER}
SOURCES = {
    "movie": "movieReviewSnippets",
    "tweet": "tweets",
    "product": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def sentences(folder: Path, source: str) -> list[tuple[float, str]]:
    """Return (mean rating, text) of one of the archive's four sources (Hutto and Gilbert, ICWSM 2014)."""
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(next((folder / "packages").glob("*.tar.gz"))) as outer:
        member = next(each for each in outer if each.name.endswith(inner))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(member).read())) as files:
            found = files.extractfile(f"hutto_ICWSM_2014/{SOURCES[source]}_GroundTruth.txt")
            text = found.read().decode("utf-8", errors="replace")
    rows = [line.split("\t") for line in text.splitlines() if line.count("\t") == 2]
    return [(float(rating), sentence.strip()) for _, rating, sentence in rows]


def examples(folder: Path, task: str) -> list[dict[str, str]]:
    """Return the task's examples in an order drawn from a fixed seed."""
    if task == "writer":
        files = [folder / f"data/write_{part}.jsonl" for part in ("train", "test")]
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]
    if task == "sources":
        rows = [{"text": text, "label": source} for source in SOURCES for _, text in sentences(folder, source)[:1000]]
    else:
        rated = sentences(folder, "movie" if task == "reviews" else "tweet")
        rows = [{"text": text, "label": "good" if rate > 0 else "bad"} for rate, text in rated if abs(rate) > 0.5]
    random.Random(0).shuffle(rows)
    return rows[:2000]


def write_files(folder: Path) -> None:
    for task in TASKS:
        rows = examples(folder, task)
        held = 150 if task == "writer" else HELD_OUT
        for part, chosen in (("train", rows[:-held]), ("test", rows[-held:])):
            lines = "".join(json.dumps(row) + "\n" for row in chosen)
            (folder / f"data/rates_{task}_{part}.jsonl").write_text(lines)


def train(folder: Path, task: str, method: str, rate: float) -> dict:
    """Return the held-out metrics before and after one run."""
    from peftcore_cli import console, settings
    from peftcore_cli.bases import base_files
    from peftcore_cli.training import training_data, training_run

    from peftcore.errors import PeftcoreError

    console.out.quiet = True
    base_files.quiet_transformers()
    is_writer = task == "writer"
    made = settings.Settings(
        model=str(folder / TASKS[task]),
        data=str(folder / f"data/rates_{task}_train.jsonl"),
        eval_data=str(folder / f"data/rates_{task}_test.jsonl"),
        task="causal-lm" if is_writer else "classification",
        method=method,
        lr=rate,
        steps=STEPS,
        max_length=64,
        dtype="bf16" if is_writer else "fp32",
        eval_every=sys.maxsize,
        save_every=sys.maxsize,
    )
    output = Path(tempfile.mkdtemp())
    try:
        result = training_run.run(made, output, training_data.read(made), resume=False)
    except PeftcoreError as error:
        return {"error": str(error)}
    finally:
        shutil.rmtree(output)
    return {"before": result.before.as_dict(), "after": result.after.as_dict()}


def shown(run: dict) -> str:
    if "error" in run:
        return "diverged" if "diverged" in run["error"] else "refused"
    metric = "accuracy" if "accuracy" in run["after"] else "loss"
    before, after = run["before"][metric], run["after"][metric]
    return f"{100 * before:.0f} → {100 * after:.0f} %" if metric == "accuracy" else f"{before:.2f} → {after:.2f}"


def main() -> None:
    import peftcore

    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo")
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--method", action="append")
    parser.add_argument("--rate", action="append", type=float)
    chosen = parser.parse_args()
    fetch(chosen.folder)
    write_files(chosen.folder)
    kept = chosen.folder / "learning_rates.jsonl"
    runs = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(run["task"], run["method"], run["rate"]): run for run in runs}
    for task in chosen.task or TASKS:
        for method in chosen.method or peftcore.methods():
            for rate in chosen.rate or RATES:
                if (task, method, rate) not in done:
                    run = {"task": task, "method": method, "rate": rate, **train(chosen.folder, task, method, rate)}
                    done[task, method, rate] = run
                    with open(kept, "a") as file:
                        file.write(json.dumps(run) + "\n")
    rates = sorted({rate for _, _, rate in done})
    for task in TASKS:
        print(f"\n| {task} | " + " | ".join(f"{rate:g}" for rate in rates) + " |\n|" + "---|" * (len(rates) + 1))
        for method in sorted({name for where, name, _ in done if where == task}):
            cells = [shown(done[task, method, rate]) if (task, method, rate) in done else "" for rate in rates]
            print(f"| `{method}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
