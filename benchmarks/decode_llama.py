"""llama.cpp's part of decode.py, for a Python that has llama-cpp-python and no PyTorch.

python decode_llama.py JOBS
    # JSON: {"model" (in q4_0), "lora", "kinds": [q4_0, q4_K_M], "prompts", "batches", "count", "rounds", "threads",
    #        "processor_time"}

All sequences of a batch have one prompt, which is read once and copied in the cache; their tokens are computed
together. Other kinds are made of the file in q4_0 by llama.cpp itself: the weights are random, and no value of theirs
is looked at.
"""

import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

FILE_TYPES = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


@llama_cpp.llama_log_callback
def silent(_level, _text, _data):
    pass


def of_kind(path, kind):
    if kind == "q4_0":
        return path
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = FILE_TYPES[kind], True
    found = path.with_name(f"{kind}.gguf")
    if llama_cpp.llama_model_quantize(str(path).encode(), str(found).encode(), parameters):
        raise RuntimeError(f"llama.cpp could not make {kind} of {path}")
    return found


class Decoder:
    """`batch` sequences of at most `length` tokens."""

    def __init__(self, model, adapter, batch, length, threads):
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_seq_max = batch * -(-length // 256) * 256, 512, batch
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, parameters)
        if adapter is not None:
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
            if llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, (llama_cpp.ctypes.c_float * 1)(1.0)):
                raise RuntimeError("llama.cpp takes no LoRA")
        self.rows = llama_cpp.llama_n_vocab(llama_cpp.llama_model_get_vocab(model))
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch, self.room = batch, llama_cpp.llama_batch_init(512, 0, 1)

    def decode(self, tokens):
        """tokens: (token, position, sequence, whether its logits are wanted). The likeliest next ones."""
        self.room.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            self.room.token[i], self.room.pos[i], self.room.logits[i] = token, position, wanted
            self.room.n_seq_id[i], self.room.seq_id[i][0] = 1, sequence
        if llama_cpp.llama_decode(self.context, self.room):
            raise RuntimeError("llama.cpp could not decode")
        wanted = [i for i, token in enumerate(tokens) if token[3]]
        logits = (llama_cpp.llama_get_logits_ith(self.context, i) for i in wanted)
        return [int(np.ctypeslib.as_array(each, (self.rows,)).argmax()) for each in logits]

    def times(self, prompt, count, now):
        """Seconds of the prompt, of one sequence, and of `count` tokens of each, by the clock `now`."""
        llama_cpp.llama_memory_clear(self.memory, True)
        start, last = now(), len(prompt) - 1
        next_ones = self.decode([(token, i, 0, i == last) for i, token in enumerate(prompt)])
        middle = now()
        for sequence in range(1, self.batch):
            llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        next_ones, copied = next_ones * self.batch, now()
        for position in range(len(prompt), len(prompt) + count):
            next_ones = self.decode([(token, position, i, True) for i, token in enumerate(next_ones)])
        return middle - start, now() - copied

    def free(self):
        llama_cpp.llama_batch_free(self.room)
        llama_cpp.llama_free(self.context)


def main(jobs):
    llama_cpp.llama_log_set(silent, llama_cpp.ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    now = time.process_time if jobs["processor_time"] else time.perf_counter
    count, parameters = jobs["count"], llama_cpp.llama_model_default_params()
    print(f"\n{'llama.cpp':44}{'prefill/s':>10}{'decode/s':>10}{'median':>10}")
    for kind in jobs["kinds"]:
        model = llama_cpp.llama_model_load_from_file(str(of_kind(Path(jobs["model"]), kind)).encode(), parameters)
        lora = llama_cpp.llama_adapter_lora_init(model, jobs["lora"].encode())
        for length in jobs["prompts"]:
            prompt = np.random.default_rng(1).integers(5, 30000, length).tolist()
            for batch in jobs["batches"]:
                for name, adapter in ((kind, None), (f"{kind}, LoRA", lora)):
                    decoder = Decoder(model, adapter, batch, length + count, jobs["threads"])
                    times = [decoder.times(prompt, count, now) for _ in range(jobs["rounds"] + 1)][
                        1:
                    ]  # the first one reads
                    decoder.free()
                    first, rest = (sorted(each) for each in zip(*times, strict=True))
                    rates = length / first[0], *(batch * count / t for t in (rest[0], rest[len(rest) // 2]))
                    label = f"{name}, prompt of {length}, batch {batch}"
                    print(f"{label:44}{rates[0]:10.0f}{rates[1]:10.1f}{rates[2]:10.1f}", flush=True)
        llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
