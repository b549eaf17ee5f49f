"""llama.cpp's part of decode.py, for a Python that has llama-cpp-python and no PyTorch.

python decode_llama.py JOBS
    # JSON: {"model" (in q4_0), "lora", "kinds": [q4_0, q4_K_M], "threads", "processor_time"}

It answers requests, a line of JSON each, so that decode.py times its tokens and ours by turns:

    ["start", kind, with LoRA, prompt, batch, count]   seconds of the prompt; up to `count` tokens follow
    ["again", kind, with LoRA]                         back to the end of the prompt
    ["token", kind, with LoRA]                         seconds of the next token of each sequence
    ["stop"]                                           frees what was started

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
    """Decoder of `batch` sequences of at most `length` tokens."""

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
        """Return the likeliest next tokens. `tokens`: (token, position, sequence, whether its logits are wanted)."""
        self.room.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            self.room.token[i], self.room.pos[i], self.room.logits[i] = token, position, wanted
            self.room.n_seq_id[i], self.room.seq_id[i][0] = 1, sequence
        if llama_cpp.llama_decode(self.context, self.room):
            raise RuntimeError("llama.cpp could not decode")
        wanted = [i for i, token in enumerate(tokens) if token[3]]
        logits = (llama_cpp.llama_get_logits_ith(self.context, i) for i in wanted)
        return [int(np.ctypeslib.as_array(each, (self.rows,)).argmax()) for each in logits]

    def start(self, prompt, now):
        """Return the seconds that the prompt of one sequence takes."""
        llama_cpp.llama_memory_clear(self.memory, True)
        start, last = now(), len(prompt) - 1
        self.first = self.decode([(token, i, 0, i == last) for i, token in enumerate(prompt)]) * self.batch
        seconds = now() - start
        for sequence in range(1, self.batch):
            llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        self.length = len(prompt)
        self.again()
        return seconds

    def again(self):
        llama_cpp.llama_memory_seq_rm(self.memory, -1, self.length, -1)
        self.next_ones, self.position = self.first, self.length

    def token(self, now):
        """Return the seconds that a token of each sequence takes."""
        start = now()
        self.next_ones = self.decode([(token, self.position, i, True) for i, token in enumerate(self.next_ones)])
        self.position += 1
        return now() - start

    def free(self):
        llama_cpp.llama_batch_free(self.room)
        llama_cpp.llama_free(self.context)


class Worker:
    """The models of a run and their decoders, by kind and whether there is a LoRA."""

    def __init__(self, jobs):
        self.now = time.process_time if jobs["processor_time"] else time.perf_counter
        self.threads, self.models, self.decoders = jobs["threads"], {}, {}
        for kind in jobs["kinds"]:
            path = str(of_kind(Path(jobs["model"]), kind)).encode()
            model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
            self.models[kind] = model, llama_cpp.llama_adapter_lora_init(model, jobs["lora"].encode())

    def start(self, kind, with_lora, length, batch, count):
        if (kind, with_lora) not in self.decoders:
            model, lora = self.models[kind]
            found = Decoder(model, lora if with_lora else None, batch, length + count, self.threads)
            self.decoders[kind, with_lora] = found
        prompt = np.random.default_rng(1).integers(5, 30000, length).tolist()
        return self.decoders[kind, with_lora].start(prompt, self.now)

    def again(self, *which):
        self.decoders[which].again()

    def token(self, *which):
        return self.decoders[which].token(self.now)

    def stop(self):
        for decoder in self.decoders.values():
            decoder.free()
        self.decoders.clear()


def main(jobs):
    llama_cpp.llama_log_set(silent, llama_cpp.ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    worker = Worker(jobs)
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, request)(*arguments)), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
