"""SmolLM2-135M-Instruct and the movie-review snippets of the demo, for benchmarks on a real model and real text.

The weights come from a GGUF file of 4-bit blocks (Q4_1), dequantized once to a folder of bf16 that every library
loads in its own way.
"""

import json
import logging
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "demo"))
from run import ROOT, WRITER, fetch

DEMO = ROOT / ".demo"
DENSE = DEMO / "smollm2-bf16"
QUANTIZED = ("peftcore", "bitsandbytes")  # and " + double quant" behind each of them

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")


def prepare():
    """Fetch what the demo uses, and write the dense folder; both only once."""
    DEMO.mkdir(exist_ok=True)
    fetch(DEMO)
    if (DENSE / "model.safetensors").exists():
        (DENSE / "model.safetensors").read_bytes()  # so that who loads it first does not wait for the disk
        return
    from peftcore_cli.bases import models

    gguf = str(DEMO / WRITER)
    models.load_tokenizer(gguf).save_pretrained(DENSE)
    models.load_model(gguf, "causal-lm", dtype="bf16").save_pretrained(DENSE)


def tokenizer():
    from peftcore_cli.bases import models

    return models.load_tokenizer(str(DENSE))


def windows(file, tokens, window):
    """Return int64 [count, window]: movie-review snippets of the demo's file (`classify_test`), joined by newlines."""
    rows = (DEMO / "data" / f"{file}.jsonl").read_text().splitlines()
    text = "\n".join(json.loads(row)["text"] for row in rows)
    ids = torch.tensor(tokenizer()(text)["input_ids"])
    count = min(tokens, len(ids)) // window
    return ids[: count * window].view(count, window)


def load(kind, dtype=torch.bfloat16):
    """Return (model, seconds): `dense`, `peftcore` or `bitsandbytes`, quantized as transformers reads the folder.

    `peftcore` is NF4; another format and block size may follow: `peftcore mxfp4`, `peftcore affine4 64`. ` + ` and one
    of these may follow: `double quant`; `gptq`, rounded with 8 windows of 256 tokens of the demo's training snippets,
    after the dense model was loaded; `loftq`, LoRA r=16 with LoftQ's start.
    """
    from peftcore_lora import loftq_start
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    import peftcore

    transformers_logging.disable_progress_bar()
    named, _, more = kind.partition(" + ")
    library, quant_type, blocksize = (*named.split(), *("nf4", "64")[len(named.split()) - 1 :])
    config = None
    if library == "peftcore" and more != "gptq":
        double = more == "double quant"
        config = peftcore.FourBitConfig(quant_type, double_quant=double, compute_dtype=dtype, blocksize=int(blocksize))
    elif library == "bitsandbytes":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=more == "double quant",
            bnb_4bit_compute_dtype=dtype,
        )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(DENSE, dtype=dtype, quantization_config=config)
    if more == "gptq":
        batches = [{"input_ids": ids} for ids in windows("classify_train", 2048, 256).split(4)]
        peftcore.quantize(model, quant_type, blocksize=int(blocksize), compute_dtype=dtype, batches=batches)
    elif more == "loftq":
        peftcore.apply(model, "lora", r=16, lora_alpha=16)
        loftq_start(model, AutoModelForCausalLM.from_pretrained(DENSE, dtype=dtype))
    return model, time.perf_counter() - start
