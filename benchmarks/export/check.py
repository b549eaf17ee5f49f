"""Comparison with llama.cpp: logits of SmolLM2-135M-Instruct, its adapter and the merged model, side by side.

    python benchmarks/export/check.py --llama PYTHON [FOLDER]

PYTHON is that of an environment with llama-cpp-python (`make export-check` makes one). FOLDER (default .demo) gets the
demo's model and data, a short run of LoRA, and the files that `peftcore export` writes of it. For each file:

    llama.cpp    its logits against those of transformers in fp32, with the weights as they were
    rounding     the same of transformers, with the weights that the file holds: what its type alone changes

The first must be within three times the second, plus 0.005; tokens and chat template must be the same, and what the
merged model in fp32 answers in a chat. Each way to cut texts that is written is tried on SmolLM2's merges, too, and
SentencePiece's BPE on a vocabulary of the reviews, as Llama 2's tokenizer.json and Gemma's have it.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TQDM_DISABLE"] = "1"  # bars of transformers

import numpy as np
import torch
from peftcore_gguf.tokenizer import PRE_TOKENIZERS, WHOLE_WORDS_FIRST
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

import peftcore

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))

from run import (  # noqa: E402
    ROOT,
    WRITER,
    fetch,
    peftcore as command,
)

ANSWER, ANSWERS, ASK = 24, "merged, f32", "What is the capital of Peru?"
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
RUN = "export-run"
TEXTS = (
    "<|im_start|>user\nWhat is the capital of Peru?<|im_end|>\n<|im_start|>assistant\n",
    "A negative movie review: two hours, 12345 minutes\nthat I'll never\n\n  get back -- it's 3.14 times too long!!",
    "  two spaces 12 345 6789\t\ttabs\r\n\r\nHE'LL SAY I'VE WE'D, y'all'd've -- f(x)[0] != 'a'; $1,234.50 50% e\u0301",
    "def mean(xs):\n    return sum(xs) / len(xs)\n\n# Größe, naïve, 日本語, 🙂",
)
PARTS = (
    " a film",
    "</s>",
    "<eos>",
    "<unk>",
    "<end_of_turn>",
    "\n\n\n",
    "▁▁",
    "<0x0A>",
    "<s",
    "\u200d🏳️",
    "ǅ",
    "=" * 9,
    "\t ",
)


def write_files(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Return {what is compared: (GGUF file of a model, of an adapter or None)}."""
    # fmt: off
    if not (folder / RUN).exists():
        command(folder, "train", "--model", WRITER, "--data", "data/write_train.jsonl", "--method", "lora",
                "--set", "r=8", "--set", "lora_alpha=16", "--steps", "20", "--batch-size", "4", "--lr", "2e-3",
                "--max-length", "96", "--output", RUN)
    # fmt: on
    found: dict[str, tuple[Path, Path | None]] = {}
    exported = folder / "exported"
    for name, options in {
        "base-f32": ["--model", WRITER, "--set", "gguf_type=f32"],
        "adapter": [RUN, "--only", "adapter"],
        **{f"merged-{kind}": [RUN, "--only", "model", "--set", f"gguf_type={kind}"] for kind in TYPES},
    }.items():
        if not (exported / name).exists():
            command(folder, "export", "--format", "gguf", *options, "--output", f"exported/{name}")
    base, adapter = exported / "base-f32/model-f32.gguf", exported / "adapter/adapter.gguf"
    found["base, f32"] = base, None
    found["base, f32 + adapter"] = base, adapter
    found["base, q4_1 as fetched + adapter"] = folder / WRITER, adapter
    for kind in TYPES:
        found[f"merged, {kind}"] = exported / f"merged-{kind}/model-{kind}.gguf", None
    return found


def write_tokenizers(folder: Path, tokenizer: Any) -> dict[str, tuple[Path, Any]]:
    """Return {how texts are cut: (GGUF file of a tiny model, transformers' tokenizer)}."""
    made: dict[str, tuple[Path, Any]] = {}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    for name, cut in {**byte_level(tokenizer), **sentencepiece(folder)}.items():
        file = folder / "exported/cuts" / f"{name}.gguf"
        made[name] = peftcore.export(model, file, format="gguf", tokenizer=cut), cut
    return made


def byte_level(tokenizer: Any) -> dict[str, Any]:
    """Return tokenizers with the merges of one, for each way to cut a text."""
    made = {}
    for name, steps in PRE_TOKENIZERS.items():
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        whole = [{"add_prefix_space": False, "trim_offsets": True, **step} for step in steps]
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": whole}
        parts["model"]["ignore_merges"] = name in WHOLE_WORDS_FIRST
        backend = Tokenizer.from_str(json.dumps(parts))
        made[name] = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)
    return made


def sentencepiece(folder: Path) -> dict[str, Any]:
    """Return tokenizers like SentencePiece's, of words in the reviews; spaces are part of them."""
    lines = (folder / "data/write_train.jsonl").read_text(encoding="utf-8").replace(" ", "▁").splitlines()
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=3000, show_progress=False))
    words = dict(sorted(trained.get_vocab().items(), key=lambda each: each[1]))
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *words]
    pairs = [(word[:i], word[i:]) for word in words for i in range(len(word) - 1, 0, -1)]
    merges = [pair for pair in pairs if pair[0] in words and pair[1] in words]
    as_llama = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *tokens])}
    llama = LlamaTokenizer(vocab=as_llama, merges=merges)
    llama.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # in a file; LlamaTokenizer made here spares some
    )
    llama.backend_tokenizer.pre_tokenizer = None
    llama.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    as_gemma = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *tokens])}
    gemma = GemmaTokenizer(vocab=as_gemma, merges=merges)
    gemma.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    runs = ["\n" * i for i in range(2, 9)] + [word for word in words if set(word) == {"▁"}]
    gemma.add_tokens([AddedToken(run, normalized=False) for run in runs])
    return {"sentencepiece-llama": llama, "sentencepiece-gemma": gemma}


def answer(model: Any, tokenizer: Any) -> str:
    said = [{"role": "user", "content": ASK}]
    given = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**given, do_sample=False, max_new_tokens=ANSWER)
    return tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def from_file(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, rows: list[list[int]]) -> list[np.ndarray]:
    return [model(torch.tensor([row])).logits[0].numpy() for row in rows]


class Apart(NamedTuple):
    """Distance of logits from the exact ones."""

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


def job(
    model: Path, lora: Path | None, tokens: list[list[int]], ask: str, out: Path, texts: tuple[str, ...] = TEXTS
) -> dict[str, Any]:
    """Return a job for llama_logits.py."""
    given = {"model": str(model), "lora": lora and str(lora), "out": str(out)}
    return {**given, "tokens": tokens, "texts": texts, "ask": ask}


def cut_texts() -> tuple[str, ...]:
    """Return texts, and parts of them in random order."""
    draw = random.Random(0)
    parts = [*PARTS, *(text[i : i + 9] for text in TEXTS for i in range(0, len(text), 9))]
    return (*TEXTS, *("".join(draw.choices(parts, k=12)) for _ in range(200)))


def main(folder: Path, llama: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fetch(folder)
    files = write_files(folder)
    tokenizer = AutoTokenizer.from_pretrained((folder / WRITER).parent, gguf_file=Path(WRITER).name)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    cuts = write_tokenizers(folder, tokenizer)
    jobs = [
        job(model, lora, rows, ASK if name == ANSWERS else "", folder / f"{i}.npz")
        for i, (name, (model, lora)) in enumerate(files.items())
    ]
    jobs += [job(file, None, [], "", file.with_suffix(".npz"), cut_texts()) for file, _ in cuts.values()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([llama, HERE / "llama_logits.py", folder / "jobs.json"], check=True)

    model = from_file(folder / WRITER)
    exact = {False: logits(model, rows)}
    peftcore.load(model, folder / RUN / "adapter")
    exact[True] = logits(model.eval(), rows)
    change = apart(exact[True], exact[False])
    columns = f"{'max':>10}{'mean':>10}{'KL':>10}{'argmax':>8}"
    print(f"\n{'':34}{'llama.cpp':>38}{'rounding':>40}\n{'':34}{columns}  {columns}")
    print(f"{'(the base without the adapter)':34}{change}")
    wrong = []
    for (name, (file, lora)), done in zip(files.items(), jobs, strict=False):
        adapted = not name.endswith("f32") or name.startswith("merged")
        found = np.load(done["out"])
        ours = exact[adapted]
        theirs = apart(ours, [found[f"row{i}"] for i in range(len(rows))])
        rounding = apart(ours, ours if lora or "f32" in name else logits(from_file(file), rows))
        print(f"{name:34}{theirs}  {rounding}", flush=True)
        if "q4_1" not in name and theirs.mean > 3 * rounding.mean + 0.005:
            wrong.append(name)
        tokens = [found[f"text{i}"].tolist() for i in range(len(rows))]
        if tokens != rows or str(found["template"]) != tokenizer.chat_template:
            wrong.append(f"{name}: tokens or template")
        if name == ANSWERS and (said := answer(model, tokenizer)) != str(found["answer"]):
            wrong.append(f"{name}: {str(found['answer'])!r} where transformers says {said!r}")
    for name, (file, cut) in cuts.items():
        found = np.load(file.with_suffix(".npz"))
        other = [t for i, t in enumerate(cut_texts()) if found[f"text{i}"].tolist() != cut(t)["input_ids"]]
        if other:
            wrong.append(f"{len(other)} texts cut as {name}, as {other[0]!r}")
    if not wrong:
        print(
            f"tokens of {len(cut_texts())} texts are the same, cut as {', '.join(cuts)}; and so is an answer in a chat"
        )
    if wrong:
        raise SystemExit(f"llama.cpp computes something else: {', '.join(wrong)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".demo")
    parser.add_argument("--llama", required=True)
    given = parser.parse_args()
    main(given.folder.resolve(), given.llama)
