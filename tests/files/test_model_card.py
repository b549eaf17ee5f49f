"""The model card of an adapter folder: what it says, whose edits are kept, and that equal adapters are equal files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

import peftcore
from peftcore.files import model_card

HEAD = """---
base_model: org/base
library_name: peft
pipeline_tag: text-generation
tags:
- base_model:adapter:org/base
- peftcore
- lora
peftcore:
  method: lora
"""


def model(method: str = "lora", adapter: str = "default", **fields: Any) -> torch.nn.Module:
    found = tiny.llama()
    found.config._name_or_path = "org/base"
    torch.manual_seed(0)
    return peftcore.apply(found, method, adapter=adapter, **fields)


def read(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_what_a_card_says(tmp_path: Path) -> None:
    peftcore.save(model(r=2, target_modules=["q_proj"]), tmp_path)
    card = read(tmp_path)
    assert card.startswith(f"{HEAD}  version: ")
    assert "# Adapter for org/base\n" in card and 'peftcore.load(model, "ADAPTER")' in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows[:3] == ["| | |", "| method | lora |", "| trained parameters | 256 |"]
    assert "| `r` | `2` |" in rows and '| `target_modules` | `["q_proj"]` |' in rows
    assert not any("lora_dropout" in row for row in rows)  # as usual
    assert len(rows) == 5  # without target_parameters, of which none are selected


def test_a_pattern_stays_in_its_cell_of_the_table(tmp_path: Path) -> None:
    peftcore.save(model(r=2, target_modules=r".*\.(q_proj|v_proj)"), tmp_path)
    assert r"""| `target_modules` | `".*\\.(q_proj\|v_proj)"` |""" in read(tmp_path).splitlines()


def test_the_metadata_are_yaml_that_hubs_read(tmp_path: Path) -> None:
    data = pytest.importorskip("huggingface_hub").ModelCard.load(peftcore.save(model(r=2), tmp_path) / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/base", "peft", "text-generation")
    assert data.tags == ["base_model:adapter:org/base", "peftcore", "lora"]
    assert data["peftcore"] == {"method": "lora", "version": peftcore.__version__}


def test_a_folder_is_not_named_as_the_base(tmp_path: Path) -> None:
    found = model(r=2)
    found.config._name_or_path = str(tmp_path)
    card = read(peftcore.save(found, tmp_path / "saved"))
    assert "base_model" not in card and str(tmp_path) not in card and "# Adapter for LlamaForCausalLM" in card


def test_methods_that_peft_does_not_have(tmp_path: Path) -> None:
    assert "library_name: peftcore\n" in read(peftcore.save(model("bitfit", add_missing=True), tmp_path))


def test_several_adapters(tmp_path: Path) -> None:
    found = peftcore.apply(model(r=2), "ia3", adapter="second")
    card = read(peftcore.save(found, tmp_path))
    assert '  method: ["lora", "ia3"]\n' in card and "## `default`\n" in card and "## `second`\n" in card
    assert not (tmp_path / "second" / "README.md").exists()
    peftcore.save(found, tmp_path / "second", adapter="second")
    assert read(tmp_path) == card and "# Adapter for org/base" in read(tmp_path / "second")


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "other"):
        found = model(r=2, lora_dropout=0.1)
        peftcore.scale(found, "default", 0.5)
        peftcore.save(found, tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file
    header = (tmp_path / "one" / "adapter_model.safetensors").read_bytes()[8:]
    names = [header.index(f'"peftcore_{name}"'.encode()) for name in ("base", "config_hash", "method", "version")]
    assert names == sorted(names)


def test_edits_are_kept(tmp_path: Path) -> None:
    peftcore.save(model(r=2), tmp_path)
    card = read(tmp_path)
    edited = card.replace("tags:\n", "license: mit\ntags:\n- poems\n").replace(
        "base_model: org/base", "base_model: mine"
    )
    edited = edited.replace(model_card.BEGIN, f"# Poems\n\nBy me.\n\n{model_card.BEGIN}") + "\nThanks.\n"
    edited = edited.replace("| `r` | `2` |", "| `r` | `3` |")
    (tmp_path / "README.md").write_text(edited)
    peftcore.save(model(r=2), tmp_path)
    wanted = card.replace("tags:\n", "license: mit\ntags:\n- poems\n")
    wanted = wanted.replace(model_card.BEGIN, f"# Poems\n\nBy me.\n\n{model_card.BEGIN}") + "\nThanks.\n"
    assert read(tmp_path) == wanted
    peftcore.save(model("ia3"), tmp_path)  # another method: its tag is added, and no other removed
    assert "- poems\n- base_model:adapter:org/base\n- peftcore\n- lora\n- ia3\n" in read(tmp_path)
    assert "  method: ia3\n" in read(tmp_path) and "| method | ia3 |" in read(tmp_path)


def test_what_a_killed_save_left_is_deleted(tmp_path: Path) -> None:
    (tmp_path / f".README.md.{'0' * 16}.tmp").write_text("half")
    peftcore.save(model(r=2), tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content", [b"# Mine\n", b"\xff\xfe", b"---\ntags: [a]\n---\n" + model_card.END.encode()])
def test_a_card_without_marks_is_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content)
    peftcore.save(model(r=2), tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_nothing_is_written_where_the_card_is_no_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "device": lambda: file.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(peftcore.CheckpointError, match=rf"README.md' is a {kind}, not a regular file. Delete it"):
        peftcore.save(model(r=2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_field_cannot_end_its_code_span_or_the_card(tmp_path: Path) -> None:
    found = model(
        r=2,
        target_modules=["q_proj"],
        exclude_modules=r".*(v_proj|`|<img src=x>|" + model_card.END + "|\n# Mine\u2028)",
    )
    peftcore.save(found, tmp_path)
    card = read(tmp_path)
    assert card.count(model_card.END) == 1 and "<img" not in card and "\n# Mine" not in card
    peftcore.save(found, tmp_path)
    assert read(tmp_path) == card


def test_text_in_a_code_span_cannot_close_it() -> None:
    assert model_card.code_span("a`b<i>\n\x85") == r"`a\u0060b\u003ci>\u000a\u0085`"


def test_a_command_cannot_end_its_block_or_the_card(tmp_path: Path) -> None:
    peftcore.save(model(r=2), tmp_path)
    fences = read(tmp_path).count("```")
    model_card.add_to_card(tmp_path, "Training", [], f"peftcore train '\n```\n<b>{model_card.END}'")
    card = read(tmp_path)
    assert card.count("```") == fences + 2 and card.count(model_card.END) == 1 and "<b>" not in card


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tags:\n  - x\n", "tags:\n  - x\n  - a:b\n"),
        ("tags: [x, y]\n", "tags: [x, y, a:b]\n"),
        ("tags: []\n", "tags: [a:b]\n"),
        ("tags: x\n", "tags: x\n"),
        ("tags:\n- 'a:b'\n", "tags:\n- 'a:b'\n"),
        ("# ours\nlicense: mit\n", "# ours\nlicense: mit\ntags:\n- a:b\n"),
        ("", "tags:\n- a:b\n"),
    ],
)
def test_tags(before: str, after: str) -> None:
    assert model_card.update_header(before, {"tags": ["a:b"]}) == after


def test_keys_that_no_longer_apply_are_removed() -> None:
    head = "base_model:\n- one\n- two\nlicense: mit\nlibrary_name: x\n"
    assert model_card.update_header(head, {"library_name": "no"}) == 'license: mit\nlibrary_name: "no"\n'


def test_figures_are_added_until_the_next_save(tmp_path: Path) -> None:
    peftcore.save(model(r=2), tmp_path)
    before = read(tmp_path)
    model_card.add_to_card(tmp_path, "Training", [("loss", "1.0 → 0.5")], "peftcore train --model org/base")
    added = "\n## Training\n\n| | |\n|---|---|\n| loss | 1.0 → 0.5 |\n\n```sh\npeftcore train --model org/base\n```\n"
    assert read(tmp_path) == before.replace(model_card.END, added + model_card.END)
    peftcore.save(model(r=2), tmp_path)
    assert read(tmp_path) == before


def test_facts_of_a_training_leave_a_file_alone_that_is_not_a_card(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    model_card.add_to_card(tmp_path, "Training", [("steps", "6")], "peftcore train")
    assert not file.exists()
    for content in (b"\xff\xfe words", b"words without marks"):
        file.write_bytes(content)
        model_card.add_to_card(tmp_path, "Training", [("steps", "6")], "peftcore train")
        assert file.read_bytes() == content
