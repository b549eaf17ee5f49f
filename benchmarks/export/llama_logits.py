"""Logits and answers of llama.cpp, for check.py: run by a Python that has llama-cpp-python and no PyTorch.

    python llama_logits.py JOBS    # JSON: [{"model", "lora" or null, "tokens": [[...]], "texts": [...], "ask", "out"}]

For each job `out`.npz gets the logits of each row of tokens, `[length, vocabulary]`, the tokens of each text, and the
answer to what is asked, by the file's chat template and the likeliest tokens.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

ANSWER = 24  # tokens at most


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
        answer = ""
        if job["ask"]:
            said = [{"role": "user", "content": job["ask"]}]
            whole = llama.create_chat_completion(said, temperature=0, max_tokens=ANSWER)
            answer = whole["choices"][0]["message"]["content"]
        np.savez(job["out"], template=llama.metadata.get("tokenizer.chat_template", ""), answer=answer, **logits)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
