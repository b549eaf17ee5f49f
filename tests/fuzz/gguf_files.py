"""GGUF files of strangers as base models: COUNT mutated ones, read as the commands read them.

    python -m fuzz.gguf_files FOLDER COUNT [STEP] [SEED]

Each is read in a process of its own, with limits of time and memory. It is loaded, with the tensors that it has, or
refused by a PeftcoreError; everything else is printed as WRONG: another error, a time-out, a crash, weights that the
file does not have.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 60, 6 << 30
U8, U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 = 0, 4, 5, 6, 7, 8, 9, 10, 12
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMBERS = [
    0,
    1,
    -1,
    3,
    7,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]


class Content:
    """A file in parts: keys with (type, value), of arrays (type of items, items); tensors with [dims, type, offset]."""

    def __init__(self, file: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(file)
        self.keys: list[tuple[str, int, Any]] = []
        for key, field in reader.fields.items():
            if key.startswith("GGUF."):
                continue
            kind, value = int(field.types[0]), field.contents()
            self.keys.append((key, kind, (int(field.types[1]), value) if kind == ARRAY else value))
        self.tensors = []
        self.data = b""
        for each in reader.tensors:
            self.data += b"\0" * (-len(self.data) % 32)
            dims = [int(size) for size in each.shape]
            self.tensors.append((each.name, dims, int(each.tensor_type), len(self.data)))
            self.data += each.data.tobytes()
        self.magic, self.version = b"GGUF", 3
        self.counts: tuple[int | None, int | None] = (None, None)
        self.lengths: int | None = None  # of the next string, in place of its own
        self.wrong_length = -1

    def written(self) -> bytes:
        self.strings = 0
        out = [self.magic, struct.pack("<I", self.version)]
        count = (len(self.tensors), len(self.keys))
        out += [
            struct.pack("<Q", n if given is None else given % (1 << 64))
            for n, given in zip(count, self.counts, strict=True)
        ]
        for key, kind, value in self.keys:
            out += [self._string(key), struct.pack("<I", kind % (1 << 32)), self._value(kind, value)]
        for name, dims, kind, offset in self.tensors:
            out += [self._string(name), struct.pack("<I", len(dims))]
            out += [struct.pack("<Q", size % (1 << 64)) for size in dims]
            out += [struct.pack("<IQ", kind % (1 << 32), offset % (1 << 64))]
        head = b"".join(out)
        return head + b"\0" * (-len(head) % 32) + self.data

    def _string(self, text: str | bytes) -> bytes:
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        length = len(raw) if self.strings != self.wrong_length or self.lengths is None else self.lengths
        self.strings += 1
        return struct.pack("<Q", length % (1 << 64)) + raw

    def _value(self, kind: int, value: Any) -> bytes:
        if kind == STRING:
            return self._string(value)
        if kind == ARRAY:
            of, items = value
            return struct.pack("<IQ", of % (1 << 32), len(items)) + b"".join(self._value(of, item) for item in items)
        if kind not in FORMATS:
            return struct.pack("<Q", int(value) % (1 << 64))
        code = FORMATS[kind]
        if code in "fd":
            return struct.pack("<" + code, float(value))
        if code == "?":
            return struct.pack("<B", int(bool(value)))
        size = struct.calcsize(code)
        return struct.pack("<" + code.upper(), int(value) % (1 << (8 * size)))


def mutated(rng: random.Random, content: Content) -> tuple[str, bytes]:
    """(how, the file)."""
    keys, tensors = content.keys, content.tensors
    at, of = rng.randrange(len(keys)), rng.randrange(len(tensors))
    key, kind, value = keys[at]
    name, dims, dtype, offset = tensors[of]
    way = rng.choice(WAYS)
    what = key
    match way:
        case "bits in the header":
            raw = bytearray(content.written())
            for _ in range(rng.choice([1, 1, 4, 16])):
                raw[rng.randrange(len(raw) - len(content.data))] ^= 1 << rng.randrange(8)
            return way, bytes(raw)
        case "bits in the data":
            raw = bytearray(content.written())
            raw[len(raw) - 1 - rng.randrange(len(content.data))] ^= 1 << rng.randrange(8)
            return way, bytes(raw)
        case "cut":
            raw = content.written()
            return way, raw[: rng.choice([rng.randrange(len(raw)), rng.randrange(200), len(raw) - rng.randrange(1, 9)])]
        case "counts":
            pair = [None, None]
            pair[rng.randrange(2)] = rng.choice([*NUMBERS, len(keys) - 1, len(keys) + 1, len(tensors) + 1])
            content.counts = (pair[0], pair[1])
            what = str(pair)
        case "magic":
            content.magic = rng.choice([b"FUGG", b"GGML", b"\0\0\0\0", b"PK\3\4"])
        case "version":
            content.version = rng.choice([0, 1, 2, 4, 3 << 24, (1 << 32) - 1])
            what = str(content.version)
        case "length of a string":
            content.wrong_length = rng.randrange(len(keys))
            content.lengths = rng.choice([*NUMBERS, 1 << 62])
            what = str(content.lengths)
        case "number":
            numbers = [i for i, each in enumerate(keys) if each[1] in FORMATS]
            at = rng.choice(numbers)
            key, kind, _ = keys[at]
            new = rng.choice([*NUMBERS, float("nan"), float("inf")] if kind in (F32, F64) else NUMBERS)
            if key.endswith("block_count"):
                new %= 256  # transformers makes as many layers as there are said to be
            keys[at], what = (key, kind, new), f"{key}={new}"
        case "text":
            texts = [i for i, each in enumerate(keys) if each[1] == STRING]
            at = rng.choice(texts)
            new = rng.choice(
                [
                    b"",
                    b"\xff\xfe",
                    b"nonsense",
                    b"llama",
                    b"gpt2",
                    b"{{" * 2000,
                    b"x" * 100_000,
                    b"../../../etc/passwd",
                    b"\0",
                ]
            )
            keys[at], what = (keys[at][0], STRING, new), f"{keys[at][0]}={new[:20]!r}"
        case "type":
            new, given = rng.choice(
                [
                    (U32, 3),
                    (F32, 0.5),
                    (STRING, "text"),
                    (BOOL, True),
                    (ARRAY, (U32, [1, 2])),
                    (ARRAY, (STRING, [])),
                    (77, 1),
                    (ARRAY, (ARRAY, [(U32, [1])] * 3)),
                ]
            )
            keys[at], what = (key, new, given), f"{key}: type {new}"
        case "nested":
            inner: Any = (U32, [1])
            for _ in range(rng.choice([3, 100, 5000])):
                inner = (ARRAY, [inner])
            raw = _nested(content, at, inner)
            return f"{way} {key}", raw
        case "array":
            arrays = [i for i, each in enumerate(keys) if each[1] == ARRAY]
            at = rng.choice(arrays)
            key, _, (of_items, items) = keys[at]
            new = rng.choice([[], items[:-1], items * 2, items[::-1], items[:1] * len(items)])
            keys[at], what = (key, ARRAY, (of_items, new)), f"{key} of {len(new)}"
        case "drop a key":
            del keys[at]
        case "key twice":
            keys.append(keys[at])
        case "rename a key":
            keys[at] = (
                rng.choice([key + "x", "", "general.alignment", "x" * 70_000, key.replace("llama", "qwen2")]),
                kind,
                value,
            )
        case "alignment":
            new = rng.choice([0, 1, 3, 7, 64, 1 << 31, (1 << 32) - 1])
            keys.append(("general.alignment", U32, new))
            what = str(new)
        case "drop a tensor":
            del tensors[of]
            what = name
        case "rename a tensor":
            new = rng.choice(
                [
                    name + "x",
                    "",
                    "blk.9.attn_q.weight",
                    "blk.-1.attn_q.weight",
                    "a" * 70_000,
                    name.replace("weight", "bias"),
                ]
            )
            tensors[of], what = (new, dims, dtype, offset), f"{name} to {new[:30]}"
        case "tensor twice":
            tensors.append(tensors[of])
            what = name
        case "shape":
            new = rng.choice(
                [
                    dims[::-1],
                    [*dims, 1],
                    [0, *dims[1:]],
                    dims[:-1],
                    [1 << 40, *dims[1:]],
                    [(1 << 64) - 1],
                    [1 << 32, 1 << 32],
                    [2, *dims],
                    [],
                    [1] * 5000,
                    [dims[0] * 2, *dims[1:]],
                ]
            )
            tensors[of], what = (name, new, dtype, offset), f"{name} {new[:4]}"
        case "dtype":
            new = rng.choice([0, 1, 2, 3, 8, 12, 14, 16, 24, 30, 35, 99, (1 << 32) - 1])
            tensors[of], what = (name, dims, new, offset), f"{name} {new}"
        case _:
            new = rng.choice([offset + 1, offset + 32, 1 << 40, (1 << 64) - 32, len(content.data), tensors[0][3]])
            tensors[of], what = (name, dims, dtype, new), f"{name} at {new}"
    return f"{way}: {what}"[:200], content.written()


WAYS = [
    "bits in the header", "bits in the header", "bits in the data", "cut", "counts", "magic", "version",
    "length of a string", "number", "number", "number", "text", "type", "type", "nested", "array", "drop a key",
    "key twice", "rename a key", "alignment", "drop a tensor", "rename a tensor", "tensor twice", "shape", "shape",
    "dtype", "offset",
]  # fmt: skip


def _nested(content: Content, at: int, inner: Any) -> bytes:
    sys.setrecursionlimit(100_000)
    key, _, _ = content.keys[at]
    content.keys[at] = (key, ARRAY, inner)
    return content.written()


def read(file: Path, wanted: dict[str, Any]) -> str:
    """A word for what came of it; raises what is wrong."""
    import torch
    from peftcore_cli.bases import models

    from peftcore.errors import PeftcoreError

    outcome = []
    for step in ("config", "tokenizer", "model"):
        try:
            if step == "config":
                models.load_config(str(file), "causal-lm")
            elif step == "tokenizer":
                models.load_tokenizer(str(file))("the film is good")
            else:
                model = models.load_model(str(file), "causal-lm", dtype="fp32", device="cpu")
                with torch.no_grad():
                    model(torch.tensor([[5, 17, 3]]))
                state = model.state_dict()
                other = [name for name in wanted if name not in state or not torch.equal(state[name], wanted[name])]
                outcome.append("loaded" if not other else f"loaded, other {', '.join(other[:2])}")
        except PeftcoreError:
            outcome.append("refused")
        except BaseException as error:
            raise AssertionError(f"{step}: {type(error).__name__}: {str(error)[:300]}") from error
    return "; ".join(outcome)


def in_child(work: Callable[[], str]) -> str:
    """What `work` returns, in a process of its own; WRONG with what ended it else."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))  # of the processor, which others may use
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            try:
                found = work()
            except BaseException as error:
                found = f"WRONG {error}"
            os.write(there, found.encode("utf-8", "replace")[:4000])
        finally:
            os._exit(0)
    os.close(there)
    told = os.read(here, 5000).decode()  # until it ends
    os.close(here)
    status = os.waitpid(child, 0)[1]
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
    return told or (f"WRONG took over {SECONDS} s" if late else f"WRONG died of {status}")


def main(folder: str, count: str, step: str = "1", seed: str = "0") -> None:
    warnings.simplefilter("ignore")
    import torch
    from peftcore_cli.bases import base_files, models
    from support import exported
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: F401

    import peftcore

    torch.set_num_threads(1)
    original, file = Path(folder) / "original.gguf", Path(folder) / "mutated.gguf"
    peftcore.export(exported.llama(), original, format="gguf", tokenizer=exported.tokenizer(), gguf_type="f32")
    file.write_bytes(Content(original).written())
    base_files.quiet_transformers()
    wanted = models.load_model(str(original), "causal-lm", dtype="fp32", device="cpu").state_dict()
    assert in_child(lambda: read(file, wanted)) == "loaded", in_child(lambda: read(file, wanted))
    outcomes: Counter[str] = Counter()
    for number in range(0, int(count), int(step)):
        rng = random.Random(f"gguf {seed} {number}")
        how, raw = mutated(rng, Content(original))
        file.write_bytes(raw)
        found = in_child(lambda: read(file, wanted))
        if found.startswith("WRONG"):
            print(f"WRONG case {number}, {how}: {found[6:]}".replace("\n", " "), flush=True)
        elif "other" in found:
            print(f"other: case {number}, {how}: {found}", flush=True)
        outcomes["wrong" if found.startswith("WRONG") else "other weights" if "other" in found else found] += 1
    print(dict(outcomes))
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
