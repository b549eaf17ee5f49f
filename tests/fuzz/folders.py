"""Adapter folders to begin with, and what may happen to them: mutations by random numbers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from support import tiny

import peftcore
from peftcore.testing import disturb

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERHUB = Path(__file__).parents[2] / "plugins" / "peftcore-adapter" / "tests" / "adapterhub"

ORIGINALS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6}),
    "lora-patterns": (
        "lora",
        {
            "target_modules": r".*\.(q|v)_proj",
            "rank_pattern": {r"layers\.0\..*": 2},
            "alpha_pattern": {"v_proj": 3},
            "use_rslora": True,
            "modules_to_save": ["norm"],
        },
    ),
    "tied": ("lora", {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["embed_tokens"]}),
    "bitfit": ("bitfit", {}),
    "adapter": ("adapter", {"reduction_factor": 8, "non_linearity": "gelu", "scaling": 0.5}),
    "prompt-tuning": ("prompt-tuning", {"num_virtual_tokens": 3}),
    "prefix-tuning": ("prefix-tuning", {"num_virtual_tokens": 3}),
    "projection": ("prefix-tuning", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 5}),
}


def model_for(name: str) -> torch.nn.Module:
    """The base of the adapter `name` of `originals`."""
    if name == "adapterhub":
        spec = importlib.util.spec_from_file_location("adapterhub_make", ADAPTERHUB / "make.py")
        make = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(make)
        return make.filled(make.llama()).eval()
    if name == "tied":
        model = tiny.llama()
        config = type(model.config).from_dict({**model.config.to_dict(), "tie_word_embeddings": True})
        torch.manual_seed(0)
        return type(model)(config).eval()
    return tiny.gpt2() if name == "bitfit" else tiny.llama()


def originals(folder: Path) -> dict[str, Path]:
    """A folder of each kind."""
    found = {}
    for seed, (name, (method, fields)) in enumerate(ORIGINALS.items()):
        model = peftcore.apply(model_for(name), method, **fields)
        disturb(model, "default", seed)
        found[name] = peftcore.save(model, folder / name)
    model = peftcore.apply(tiny.llama(), "lora", target_modules=["q_proj"], r=2)
    peftcore.apply(model, "lora", adapter="b", target_modules=["up_proj"], r=3)
    disturb(model, "default", 7)
    disturb(model, "b", 8)
    found["several"] = peftcore.save(model, folder / "several")
    source = ADAPTERHUB / "llama-seq_bn"
    found["adapterhub"] = shutil.copytree(source, folder / "adapterhub", ignore=shutil.ignore_patterns("output*"))
    return found


DEEP = "[" * 50_000 + "]" * 50_000
TRAP = "([a-z_.0-9]+)+X"
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, 4, 5, 7, 8, -1, 10**6, 10**9, 10**15, 10**40, 0.1, 0.5, 1.5, -2.0, 1e30, 1e308, "",
    "x", "q_proj", "all-linear", "none", "all", "lora_only", "relu", "LORA", "PREFIX_TUNING", "../..", "\0", "é", "x"
    * 100_000, TRAP, ".*" * 12 + "X", "(", "(?=q_proj)", [], ["q_proj"], ["q_proj", "q_proj"], [0], [1], [-1], ["x"] *
    1000, [[]], ["up_proj", "x"], [None], {}, {"q_proj": 4}, {"q_proj": 2, "x": 3}, {TRAP: 4}, {"(": 4},
    {"q_proj": "4"}, {"q_proj": 10**12}, {"x": {}}, {"default": 4}, [True], [1.5], [10**30],
]  # fmt: skip
TEXTS = [DEEP, "9" * 5000, "NaN", "-Infinity", "1e999", '"\\ud800"', "", "{", '{"a": ' * 40_000 + "1" + "}" * 40_000]
FIELDS = [
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "modules_to_save", "use_rslora", "bias", "use_dora", "fan_in_fan_out", "peft_type", "task_type",
    "num_virtual_tokens", "prefix_projection", "encoder_hidden_size", "num_layers", "token_dim", "placement",
    "is_parallel", "reduction_factor", "bottleneck_size", "non_linearity", "scaling", "num_transformer_submodules",
    "ensure_weight_tying",
]  # fmt: skip

DTYPES = [torch.int32, torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64, torch.float8_e4m3fn]

Mutation = Callable[[random.Random, Path], None]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _tensor_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice([path for path in _files(folder) if path.suffix == ".safetensors"])


def _config_file(rng: random.Random, folder: Path) -> Path:
    return rng.choice([path for path in _files(folder) if path.name == CONFIG])


# --- bytes


def flip(rng: random.Random, folder: Path) -> None:
    file = rng.choice(_files(folder))
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 20])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def flip_values(rng: random.Random, folder: Path) -> None:
    """Behind the header: mostly another adapter."""
    file = _tensor_file(rng, folder)
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.choice([1, 3])):
        content[rng.randrange(begin, len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(rng: random.Random, folder: Path) -> None:
    file = rng.choice(_files(folder))
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice([0, 1, 8, rng.randrange(len(content)), len(content) - 1])])


def lengthen(rng: random.Random, folder: Path) -> None:
    with open(rng.choice(_files(folder)), "ab") as out:
        out.write(rng.randbytes(rng.choice([1, 8, 1000])))


def zeros(rng: random.Random, folder: Path) -> None:
    file = rng.choice(_files(folder))
    content = bytearray(file.read_bytes())
    begin = rng.randrange(len(content))
    end = min(len(content), begin + rng.choice([1, 16, 4096]))
    content[begin:end] = bytes(end - begin)
    file.write_bytes(content)


# --- the header of safetensors


def header(rng: random.Random, folder: Path) -> None:
    file = _tensor_file(rng, folder)
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    told = json.loads(content[8:begin])
    name = rng.choice(sorted(told.keys() - {"__metadata__"}))
    match rng.randrange(7):
        case 0:
            told[name]["dtype"] = rng.choice(["F16", "I32", "BOOL", "U8", "F64", "F4", "X", 3, None, "F8_E4M3", "C64"])
        case 1:
            told[name]["shape"] = rng.choice(
                [[], [-1], [1 << 62], [0, 1 << 50], told[name]["shape"][::-1], [1] * 99, "x", None]
            )
        case 2:
            told[name]["data_offsets"] = rng.choice([[0, 0], [0, 1 << 60], [-8, 8], [1], "x", None, [0.0, 4.0]])
        case 3:
            told[rng.choice(["x", "", "\0", name + "x", name[:-1], "x" * 5000])] = told.pop(name)
        case 4:
            told["__metadata__"] = rng.choice([None, 3, [], {"a": 3}, {"a": {}}, {"peftcore_base": DEEP}])
        case 5:
            told[name] = rng.choice([None, 3, [], {}, "x"])
        case _:
            other = rng.choice(sorted(told.keys() - {"__metadata__"}))
            told[name], told[other] = told[other], told[name]
    text = json.dumps(told).encode()
    length = rng.choice([len(text)] * 6 + [len(text) + 8, 0, 1 << 63])
    file.write_bytes(length.to_bytes(8, "little") + text + content[begin:])


TOLD = [
    *("[]", "{}", "3", "null", "true", "false", '{"adapters": 3}'),
    *('{"adapters": ["../x"], "active": []}', '{"adapters": [], "active": []}', '{"adapters": [[]], "active": []}'),
    *('{"adapters": ["default"], "active": []}', '{"adapters": ["default"], "active": ["default", "default"]}'),
    *('{"adapters": ["default", "b"], "active": ["b"]}', '{"lm_head.weight": [[96, 32], [1e400]]}'),
    *('{"lm_head.weight": [[96, 32], [NaN]]}', '{"lm_head.weight": [[96, 32], []]}', '{"lm_head.weight": 3}'),
    '{"x": [[1], [1]]}',
]


def metadata(rng: random.Random, folder: Path) -> None:
    file = _tensor_file(rng, folder)
    with safe_open(file, "pt") as archive:
        told = archive.metadata() or {}
    key = rng.choice(
        [
            "peftcore_together",
            "peftcore_base",
            "peftcore_tied",
            "peftcore_version",
            "peftcore_config_sha256",
            "peftcore_fields",
            "peftcore_method",
        ]
    )
    told[key] = rng.choice([*TEXTS, *TOLD])
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, told)


# --- tensors


def tensors(rng: random.Random, folder: Path) -> None:
    file = _tensor_file(rng, folder)
    with safe_open(file, "pt") as archive:
        told = archive.metadata()
    found = safetensors.torch.load_file(file)
    name = rng.choice(sorted(found))
    value = found[name]
    match rng.randrange(12):
        case 0:
            del found[name]
        case 1:
            found[rng.choice([name + "x", "x", name.replace("layers.0", "layers.1"), name.replace("0", "00")])] = (
                found.pop(name)
            )
        case 2:
            found[name] = value.to(rng.choice(DTYPES))
        case 3:
            found[name] = value.contiguous().view(torch.int32)
        case 4:
            found[name] = value.T.contiguous() if value.dim() == 2 else value.unsqueeze(0)
        case 5:
            found[name] = value.reshape(-1)
        case 6:
            found[name] = value.clone()
            found[name].view(-1)[rng.randrange(value.numel())] = rng.choice(
                [float("nan"), float("inf"), -float("inf"), 1e38]
            )
        case 7:
            found[rng.choice(["x", "base_model.model.lm_head.weight", f"{name}.y", name.replace("model.", "", 1)])] = (
                value.clone()
            )
        case 8:
            found[name] = value[:1].clone()
        case 9:
            found[name] = value.double() * rng.choice([1, 1e300])
        case 10:
            found[name] = torch.empty(0)
        case _:
            found[name] = value * rng.uniform(-2, 2)
    safetensors.torch.save_file({key: each.contiguous() for key, each in found.items()}, file, told)


# --- the config


def field(rng: random.Random, folder: Path) -> None:
    file = _config_file(rng, folder)
    fields = json.loads(file.read_text())
    inside = fields.get("config", fields)  # AdapterHub's
    names = [name for name in FIELDS if name in inside] * 3 + sorted(inside) + ["unheard_of", *FIELDS[-4:]]
    name = rng.choice(names)
    if rng.random() < 0.1:
        inside.pop(name, None)
    else:
        inside[name] = rng.choice(VALUES)
    text = json.dumps(fields)
    if rng.random() < 0.2:
        inside[name] = "PLACE"
        text = json.dumps(fields).replace('"PLACE"', rng.choice(TEXTS))
    file.write_text(text)


def two_fields(rng: random.Random, folder: Path) -> None:
    field(rng, folder)
    with contextlib.suppress(ValueError, RecursionError):  # it is no JSON any more
        field(rng, folder)


def whole_config(rng: random.Random, folder: Path) -> None:
    _config_file(rng, folder).write_bytes(
        rng.choice(
            [
                b"",
                b"{}",
                b"[]",
                b"null",
                b"3",
                b"\xff\xfe",
                b"\0" * 100,
                b'{"peft_type": 3}',
                DEEP.encode(),
                b'{"config": {}}',
            ]
        )
    )


# --- what lies there is no file


def no_file(rng: random.Random, folder: Path) -> None:
    file = rng.choice(_files(folder))
    kept = file.read_bytes()
    file.unlink()
    match rng.randrange(10):
        case 0:
            os.mkfifo(file)
        case 1:
            file.mkdir()
        case 2:
            file.symlink_to("/dev/zero")
        case 3:
            file.symlink_to("/dev/null")
        case 4:
            file.symlink_to(file)
        case 5:
            (folder / "elsewhere").write_bytes(kept)
            file.symlink_to(folder / "elsewhere")  # as in a cache of the Hugging Face hub
        case 6:
            file.write_bytes(b"")
            os.truncate(file, 1 << 40)
        case 7:
            (file.parent / "adapter_model.bin").write_bytes(kept)
        case 8:
            os.mkfifo(folder / "pipe")
            file.symlink_to(folder / "pipe")
        case _:
            pass


def exchange(rng: random.Random, folder: Path) -> None:
    one, other = rng.choice(_files(folder)), rng.choice(_files(folder))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def temporary(rng: random.Random, folder: Path) -> None:
    """What a killed save may leave."""
    file = rng.choice(_files(folder))
    name = rng.choice([f".{file.name}.tmp", f".{file.name}.{'0' * 16}.tmp"])
    match rng.randrange(3):
        case 0:
            shutil.copy(file, file.with_name(name))
        case 1:
            os.mkfifo(file.with_name(name))
        case _:
            shutil.move(file, file.with_name(name))


MUTATIONS: list[Mutation] = [
    flip, flip_values, cut, lengthen, zeros, header, header, metadata, metadata, tensors, tensors, tensors, field,
    field, field, field, two_fields, two_fields, whole_config, no_file, no_file, exchange, temporary,
]  # fmt: skip
