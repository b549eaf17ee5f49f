"""The quick start as someone new follows it: the commands of docs/quickstart.md in their order, timed.

    python benchmarks/export/quickstart.py --llama PYTHON [FOLDER]

PYTHON is that of an environment with llama-cpp-python (`make export-check` makes one). FOLDER (default: a new one in
.demo) gets examples/chat.jsonl and SmolLM2-135M-Instruct, which comes from the demo's package and lies under the hub's
name, so that no hub is needed. What is asked in the chat is answered as in the examples, and by llama.cpp so, too.
"""

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))

from run import ROOT, WRITER, fetch  # noqa: E402

PAGE = ROOT / "docs/quickstart.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ASK = "When do you open?"


def main(folder: Path, llama: str) -> None:
    prepare(folder)
    commands, code = of_page(PAGE.read_text(encoding="utf-8"))
    answers, times = {}, {}
    for command in [*commands, "llama.cpp"]:
        words = shlex.split(command) if command != "llama.cpp" else [llama, "-c", code]
        print(f"\n$ {command}", flush=True)
        start = clocks()
        answers[command] = run(words, folder, asked=command.startswith("peftcore chat"))
        times[command] = [after - before for before, after in zip(start, clocks(), strict=True)]
    times["in all"] = [sum(each) for each in zip(*times.values(), strict=True)]
    print("  seconds  of processors")
    for command, (seconds, busy) in times.items():
        print(f"{seconds:9.0f}{busy:15.0f}  {command}")
    check(folder, next(answers[c] for c in commands if c.startswith("peftcore chat")), answers["llama.cpp"])


def prepare(folder: Path) -> None:
    """Write the examples, and the model under its name."""
    demo = ROOT / ".demo"
    demo.mkdir(exist_ok=True)
    fetch(demo)
    (folder / "examples").mkdir(parents=True)
    shutil.copy(ROOT / "examples/chat.jsonl", folder / "examples")
    from peftcore_cli.bases import models

    for load in (models.load_tokenizer, lambda path: models.load_model(path, "causal-lm", dtype="bf16")):
        load(str(demo / WRITER)).save_pretrained(folder / MODEL)


def of_page(text: str) -> tuple[list[str], str]:
    """Return (the commands of peftcore, the program for llama.cpp)."""
    blocks = re.findall(r"```(sh|python)\n(.*?)```", text, re.DOTALL)
    lines = "".join(code for language, code in blocks if language == "sh").replace("\\\n", " ").splitlines()
    (code,) = (code for language, code in blocks if language == "python" and "llama_cpp" in code)
    return [" ".join(line.split()) for line in lines if line.startswith("peftcore ")], code


def run(words: list[str], folder: Path, asked: bool) -> str:
    """Return what a command prints; in a chat one question is asked."""
    if words[0] == "peftcore":
        words = [str(Path(sys.executable).with_name("peftcore")), *words[1:]]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    found: list[str] = []
    with subprocess.Popen(
        words, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdin.write(f"{ASK}\n" if asked else "")
        process.stdin.close()
        for line in process.stdout:
            print(line, end="", flush=True)
            found.append(line)
    if process.returncode != 0:
        raise SystemExit(f"it ended with {process.returncode}: {shlex.join(words)}")
    return "".join(found)


def clocks() -> tuple[float, float]:
    """Return (time, processor time of the programs that have ended), in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def check(folder: Path, talk: str, answer: str) -> None:
    taught = [json.loads(line)["messages"] for line in (folder / "examples/chat.jsonl").read_text().splitlines()]
    right = next(turns[1]["content"] for turns in taught if turns[0]["content"] == ASK)
    if right not in talk or answer.strip() != right:
        raise SystemExit(f"to {ASK!r} it was taught {right!r}; llama.cpp answers {answer!r}, and the chat was {talk!r}")
    print(f"both answer as they were taught: {right}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".demo" / f"quickstart-{os.getpid()}")
    parser.add_argument("--llama", required=True)
    given = parser.parse_args()
    main(given.folder.resolve(), os.path.abspath(given.llama))  # it runs in the folder; a link stays one
