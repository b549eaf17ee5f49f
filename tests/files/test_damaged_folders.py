"""Folders that are damaged or written by a stranger: errors say what is wrong, and the model stays as it was."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import tiny

import peftcore
from peftcore.engine import adapter_parameters

pytestmark = pytest.mark.usefixtures("toys")


def break_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{not json")


def no_peft_type(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def unknown_type(folder: Path) -> None:
    edit(folder, peft_type="UNHEARD_OF")


def unknown_field(folder: Path) -> None:
    edit(folder, magic=7)


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def lengthen(folder: Path) -> None:
    with open(folder / "adapter_model.safetensors", "ab") as out:
        out.write(b"x" * 9)


def huge_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def empty(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"")


def pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def no_tensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def rewrite(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file)


def missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: dict(list(tensors.items())[:1]))


def extra_tensor(folder: Path) -> None:
    rewrite(
        folder, lambda tensors: {**tensors, "base_model.model.model.layers.7.self_attn.q_proj.gain": torch.ones(())}
    )


def wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: torch.ones(2) for name in tensors})


def every_value(value, dtype=torch.float32):
    def damage(folder: Path) -> None:
        rewrite(folder, lambda tensors: {name: torch.tensor(value, dtype=dtype) for name in tensors})

    return damage


def pipe(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def with_metadata(**metadata: str):
    def damage(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata)

    return damage


def with_base(tensors: dict[str, object]):
    return with_metadata(peftcore_base=json.dumps({"version": 2, "tensors": tensors}))


def of_fields(**changes):
    return lambda folder: edit(folder, **changes)


def edit(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_json, r"adapter_config.json' cannot be read as JSON: Expecting property name"),
        (no_peft_type, r"has no field peft_type"),
        (
            unknown_type,
            r"no installed method reads peft_type 'UNHEARD_OF'.*If you trust the file and that package: pip install",
        ),
        (unknown_field, r"uses magic=7, which the installed plugin 'around' does not support"),
        (truncate, r"is not a complete safetensors file.*truncated"),
        (lengthen, r"is not a complete safetensors file"),
        (huge_header, r"is not a complete safetensors file"),
        (empty, r"\(0 bytes\) is not a complete safetensors file"),
        (pickle_only, r"'adapter_model.bin', a pickle, which can run arbitrary code, so peftcore never reads it"),
        (no_tensors, r"does not contain an adapter: adapter_model.safetensors is missing"),
        (missing_tensor, r"1 tensors are missing, such as 'base_model.model.model.layers.1.self_attn.q_proj.gain'"),
        (extra_tensor, r"1 tensors are unexpected, such as 'base_model.model.model.layers.7"),
        (wrong_shape, r"has shape \[2\], but the model needs \[\]"),
        (
            every_value(float("nan")),
            r"q_proj.gain' \(torch.float32; torch.float32 in the model\) contains values that are not finite",
        ),
        (every_value(float("-inf")), "contains values that are not finite"),
        (
            every_value(1e300, torch.float64),
            r"\(torch.float64; torch.float32 in the model\) contains values that are too large for it",
        ),
        (every_value(1, torch.int32), r"q_proj.gain' is torch.int32, but the model needs torch.float32"),
        (every_value(True, torch.bool), r"is torch.bool, but the model needs torch.float32"),
        (every_value(1, torch.uint8), r"is torch.uint8, but the model needs torch.float32"),
        (pipe, r"adapter_model.safetensors' is a pipe, not a regular file"),
        (with_base({"lm_head.weight": [[96, 32], [float("nan")]]}), "but 1 in the adapter's base"),
        (with_base({"lm_head.weight": [[96, 32], [float("nan")] * 8]}), "differ by nan"),
        (with_base({"lm_head.weight": 3}), r"the fingerprint of the base \(peftcore_base\) cannot be"),
        (with_metadata(peftcore_base="[" * 100_000), r"the fingerprint of the base \(peftcore_base\) cannot be read"),
        (
            of_fields(value="3"),
            r"adapter_config.json' is not a valid config of 'around': value must be a finite number",
        ),
        (of_fields(target_modules=3), r"target_modules must be a list \(text\), found 3"),
        (of_fields(target_modules=["nothing"]), r"adapter_config.json' does not fit LlamaForCausalLM: target_modules"),
    ],
)
def test_damaged_folders(theirs: Path, damage, message: str) -> None:
    damage(theirs)
    model = tiny.llama()
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.load(model, theirs)
    assert not any("peftcore" in key for key in model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_a_failed_load_leaves_the_active_adapters(saved: Path) -> None:
    wrong_shape(saved)
    model = peftcore.apply(tiny.llama(), "around", adapter="mine")
    acting = tiny.logits(model)
    with pytest.raises(peftcore.CheckpointError):
        peftcore.load(model, saved)
    assert torch.equal(tiny.logits(model), acting)


def test_numbers_of_8_bits(theirs: Path) -> None:
    every_value(1.75, torch.float8_e4m3fn)(theirs)
    model = peftcore.load(tiny.llama(), theirs)
    assert {p.item() for _, p in adapter_parameters(model, "default")} == {1.75}
