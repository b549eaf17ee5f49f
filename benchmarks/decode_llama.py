"""llama.cpp's part of decode.py, for a Python that has llama-cpp-python and no PyTorch.

python decode_llama.py JOBS    # JSON: {"model", "lora", "prompts": [length], "count": tokens, "threads"}
"""

import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

ROUNDS = 3


def main(jobs: dict) -> None:
    print(f"\n{'llama.cpp, q4_0':32}{'prefill/s':>10}{'decode/s':>10}{'median':>10}")
    for name, lora in (("alone", {}), ("LoRA", {"lora_path": jobs["lora"]})):
        threads = {"n_threads": jobs["threads"], "n_threads_batch": jobs["threads"]}
        llama = llama_cpp.Llama(jobs["model"], n_ctx=1024, n_batch=512, verbose=False, **threads, **lora)
        for length in jobs["prompts"]:
            prompt = np.random.default_rng(1).integers(5, 30000, length).tolist()
            first, rest = [], []
            for _ in range(ROUNDS + 1):  # the first of them reads the file
                llama.reset()
                start = time.perf_counter()
                llama.eval(prompt)
                middle = time.perf_counter()
                for _ in range(jobs["count"]):
                    llama.eval([int(llama.scores[llama.n_tokens - 1].argmax())])
                first.append(middle - start)
                rest.append(time.perf_counter() - middle)
            first, rest = sorted(first[1:]), sorted(rest[1:])
            rates = length / first[0], jobs["count"] / rest[0], jobs["count"] / rest[len(rest) // 2]
            print(f"{f'{name}, prompt of {length}':32}{rates[0]:10.0f}{rates[1]:10.1f}{rates[2]:10.1f}", flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
