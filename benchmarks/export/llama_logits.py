"""What llama.cpp computes, for check.py: run by the Python of an environment that has llama-cpp-python and no PyTorch.

    python llama_logits.py JOBS    # [{"model", "lora" or null, "tokens": [[...]], "texts": [...], "out"}] in JSON

For each job `out`.npz gets the logits of each row of tokens, `[length, vocabulary]`, and the tokens of each text.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(jobs: list[dict]) -> None:
    for job in jobs:
        lora = {"lora_path": job["lora"]} if job["lora"] else {}
        precise = {"type_k": 0, "type_v": 0}  # keys and values in fp32; llama.cpp keeps them in fp16 else
        llama = llama_cpp.Llama(job["model"], n_ctx=512, logits_all=True, n_threads=2, verbose=False, **precise, **lora)
        logits = {}
        for i, row in enumerate(job["tokens"]):
            llama.reset()
            llama.eval(row)
            logits[f"row{i}"] = np.array(llama.scores[: len(row)])
        for i, text in enumerate(job["texts"]):
            logits[f"text{i}"] = np.array(llama.tokenize(text.encode(), add_bos=True, special=True))
        np.savez(job["out"], template=llama.metadata.get("tokenizer.chat_template", ""), **logits)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
