"""Does llama.cpp compute what we do? Logits of SmolLM2-135M-Instruct, its adapter and the merged model, side by side.

    python benchmarks/export/check.py --llama PYTHON [FOLDER]

PYTHON is that of an environment with llama-cpp-python (`make export-check` makes one). FOLDER (default .demo) gets the
demo's model and data, a short run of LoRA, and the files that `peftcore export` writes of it. For each file:

    llama.cpp    its logits against those of transformers in fp32, with the weights as they were
    rounding     the same of transformers, with the weights that the file holds: what its type alone changes

The first must be within three times the second, plus 0.005; tokens and chat template must be the same.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

os.environ["TQDM_DISABLE"] = "1"  # bars of transformers

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftcore

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))

from run import ROOT, WRITER, fetch  # noqa: E402
from run import peftcore as command  # noqa: E402

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
RUN = "export-run"
TEXTS = (
    "<|im_start|>user\nWhat is the capital of Peru?<|im_end|>\n<|im_start|>assistant\n",
    "A negative movie review: two hours, 12345 minutes\nthat I'll never\n\n  get back -- it's 3.14 times too long!!",
    "def mean(xs):\n    return sum(xs) / len(xs)\n\n# Größe, naïve, 日本語, 🙂",
)


def write_files(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """{what is compared: (GGUF file of a model, of an adapter)}."""
    # fmt: off
    if not (folder / RUN).exists():
        command(folder, "train", "--model", WRITER, "--data", "data/write_train.jsonl", "--method", "lora",
                "--set", "r=8", "--set", "lora_alpha=16", "--steps", "20", "--batch-size", "4", "--lr", "2e-3",
                "--max-length", "96", "--output", RUN)
    # fmt: on
    found: dict[str, tuple[Path, Path | None]] = {}
    exported = folder / "exported"
    for name, options in {
        "base-f32": ["--model", WRITER, "--type", "f32"],
        "adapter": ["--adapter", RUN, "--only", "adapter"],
        **{f"merged-{kind}": ["--adapter", RUN, "--only", "model", "--type", kind] for kind in TYPES},
    }.items():
        if not (exported / name).exists():
            command(folder, "export", "--to", "gguf", *options, "--output", f"exported/{name}")
    base, adapter = exported / "base-f32/model-f32.gguf", exported / "adapter/adapter.gguf"
    found["base, f32"] = base, None
    found["base, f32 + adapter"] = base, adapter
    found["base, q4_1 as fetched + adapter"] = folder / WRITER, adapter
    for kind in TYPES:
        found[f"merged, {kind}"] = exported / f"merged-{kind}/model-{kind}.gguf", None
    return found


def from_file(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, rows: list[list[int]]) -> list[np.ndarray]:
    return [model(torch.tensor([row])).logits[0].numpy() for row in rows]


class Apart(NamedTuple):
    """How far logits are from those that are exact."""

    most: float
    mean: float
    kl: float  # of the distributions, mean over positions, in nats
    same: float  # share of positions whose likeliest token is the same

    def __str__(self) -> str:
        return f"{self.most:10.5f}{self.mean:10.5f}{self.kl:10.5f}{self.same:8.1%}"


def apart(exact: list[np.ndarray], found: list[np.ndarray]) -> Apart:
    a, b = torch.from_numpy(np.concatenate(exact)), torch.from_numpy(np.concatenate(found))
    kl = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean().item()
    same = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    return Apart((a - b).abs().max().item(), (a - b).abs().mean().item(), kl, same)


def main(folder: Path, llama: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder)
    files = write_files(folder)
    tokenizer = AutoTokenizer.from_pretrained((folder / WRITER).parent, gguf_file=Path(WRITER).name)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    jobs = [
        {"model": str(model), "lora": lora and str(lora), "tokens": rows, "texts": TEXTS, "out": f"{folder}/{i}.npz"}
        for i, (model, lora) in enumerate(files.values())
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([llama, HERE / "llama_logits.py", folder / "jobs.json"], check=True)

    model = from_file(folder / WRITER)
    exact = {False: logits(model, rows)}
    peftcore.load(model, folder / RUN / "adapter", trainable=False)
    exact[True] = logits(model.eval(), rows)
    change = apart(exact[True], exact[False])
    columns = f"{'max':>10}{'mean':>10}{'KL':>10}{'argmax':>8}"
    print(f"\n{'':34}{'llama.cpp':>38}{'rounding':>40}\n{'':34}{columns}  {columns}")
    print(f"{'(the base without the adapter)':34}{change}")
    wrong = []
    for (name, (file, lora)), job in zip(files.items(), jobs, strict=True):
        adapted = not name.endswith("f32") or name.startswith("merged")
        found = np.load(job["out"])
        ours = exact[adapted]
        theirs = apart(ours, [found[f"row{i}"] for i in range(len(rows))])
        rounding = apart(ours, ours if lora or "f32" in name else logits(from_file(file), rows))
        print(f"{name:34}{theirs}  {rounding}", flush=True)
        if "q4_1" not in name and theirs.mean > 3 * rounding.mean + 0.005:
            wrong.append(name)
        tokens = [found[f"text{i}"].tolist() for i in range(len(rows))]
        if tokens != rows or str(found["template"]) != tokenizer.chat_template:
            wrong.append(f"{name}: tokens or template")
    if wrong:
        raise SystemExit(f"llama.cpp computes something else: {', '.join(wrong)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".demo")
    parser.add_argument("--llama", required=True)
    given = parser.parse_args()
    main(given.folder.resolve(), given.llama)
