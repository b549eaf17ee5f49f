"""Times of three ways from data to answers.

    python benchmarks/journeys.py preferences --llama PYTHON [--steps 30]
    python benchmarks/journeys.py images [--steps 240]
    python benchmarks/journeys.py serving [--adapters 100]

`preferences`: own pairs of answers, DPO, a GGUF file, and an answer of llama.cpp next to peftcore's. PYTHON is that of
an environment with llama-cpp-python (`make export-check` makes one). `images`: a folder of labelled images (discs and
squares of any colour, drawn here), a classifier of ViT-tiny's shape with random weights, since no hub is asked, and
answers to new images. `serving`: many adapters behind one port, each of which answers. Every command is a program of
its own, as for a user; a line has the seconds elapsed, and those of processors.
"""

import argparse
import json
import os
import random
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "demo"))

from run import ROOT, WRITER, fetch  # noqa: E402

TOKENS = 16
LLAMA = """
import sys
from llama_cpp import Llama
path, prompt, tokens = sys.argv[1:]
model = Llama(path, n_ctx=512, verbose=False)
print(model.create_completion(prompt, max_tokens=int(tokens), temperature=0)["choices"][0]["text"])
"""
PROGRAM = str(Path(sys.executable).with_name("peftcore"))


class Clock:
    """Runs programs and prints what each took."""

    def __init__(self) -> None:
        self.began, self.used = time.perf_counter(), self._used()

    @staticmethod
    def _used() -> float:
        both = resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF)
        return sum(each.ru_utime + each.ru_stime for each in both)

    def run(self, *words: str) -> str:
        began, used = time.perf_counter(), self._used()
        found = subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE)
        name = shlex.join([Path(words[0]).name, *words[1:]])
        print(f"{time.perf_counter() - began:7.0f} {self._used() - used:7.0f}   {name:.110s}", flush=True)
        return found.stdout

    def end(self) -> None:
        print(f"{time.perf_counter() - self.began:7.0f} {self._used() - self.used:7.0f}   in all")


def preferences(folder: Path, llama: str, steps: int) -> None:
    demo = ROOT / ".demo"
    demo.mkdir(exist_ok=True)
    fetch(demo)
    base = str(demo / WRITER)
    lines = (ROOT / "examples/chat.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    pairs = [
        {"prompt": chat[:-1], "chosen": [chat[-1]], "rejected": [{"role": "assistant", "content": "I do not know."}]}
        for chat in turns
        if len(chat) == 2
    ]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    clock = Clock()
    options = ("--steps", str(steps), "--batch-size", "2", "--holdout", "2", "--lr", "2e-4", "--eval-every", str(steps))
    clock.run(
        PROGRAM, "train", "-m", base, "-d", "pairs.jsonl", "--task", "dpo", "--method", "lora", *options, "-o", "run"
    )
    clock.run(PROGRAM, "export", "run", "--format", "gguf", "--only", "model", "-o", "gguf")
    question = "When do you open?"
    ours = clock.run(PROGRAM, "generate", "run", "--prompt", question, "--max-new-tokens", str(TOKENS))
    from peftcore_cli.bases import models
    from peftcore_cli.tasks import conversations

    asked = [{"role": "user", "content": question}]
    prompt = conversations.render(models.load_tokenizer(base), asked, begins_answer=True)
    theirs = clock.run(llama, "-c", LLAMA, "gguf/model-f16.gguf", prompt, str(TOKENS))
    clock.end()
    after = json.loads(Path("run/result.json").read_text())["after"]
    print(f"held out: {after}\npeftcore: {ours.strip()!r}\nllama.cpp: {theirs.strip()!r}")


def images(folder: Path, steps: int) -> None:
    from PIL import Image, ImageDraw
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    draws = random.Random(0)
    for part, count in (("train", 60), ("test", 20), ("new", 3)):
        for label in ("disc", "square"):
            where = folder / part / (label if part != "new" else "")
            where.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = Image.new("RGB", (96, 96), tuple(draws.randrange(100) for _ in range(3)))
                left, top, size = draws.randrange(20), draws.randrange(20), draws.randrange(40, 70)
                paint = getattr(ImageDraw.Draw(image), "ellipse" if label == "disc" else "rectangle")
                paint((left, top, left + size, top + size), fill=tuple(draws.randrange(150, 256) for _ in range(3)))
                image.save(where / f"{label}{i}.png")
    sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    ViTForImageClassification(ViTConfig(image_size=96, patch_size=16, **sizes)).save_pretrained("vit")
    ViTImageProcessorPil(size={"height": 96, "width": 96}).save_pretrained("vit")
    clock = Clock()
    options = ("--steps", str(steps), "--batch-size", "16", "--lr", "1e-3", "--eval-every", str(max(1, steps // 2)))
    data = ("-d", "train", "--eval-data", "test", "--task", "image")
    clock.run(PROGRAM, "train", "-m", "vit", *data, "--method", "lora", "--set", "r=16", *options, "-o", "run")
    clock.run(PROGRAM, "eval", "run", "-d", "test")
    clock.run(PROGRAM, "predict", "run", "-d", "new", "-o", "answers.jsonl")
    clock.end()
    print("held out:", json.loads(Path("run/result.json").read_text())["after"])
    print(Path("answers.jsonl").read_text())


def serving(folder: Path, adapters: int) -> None:
    clock = Clock()
    print(clock.run(sys.executable, str(HERE / "serve.py"), "--adapters", str(adapters), "--tokens", "16"))
    clock.end()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("journey", choices=["preferences", "images", "serving"])
    parser.add_argument("--llama", metavar="PYTHON", help="for `preferences`")
    parser.add_argument("--steps", type=int, help="of training; default: 30 for `preferences`, 240 for `images`")
    parser.add_argument("--adapters", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        print("elapsed  of processors, seconds")
        if given.journey == "preferences":
            preferences(Path(folder), given.llama, given.steps or 30)
        elif given.journey == "images":
            images(Path(folder), given.steps or 240)
        else:
            serving(Path(folder), given.adapters)


if __name__ == "__main__":
    main()
