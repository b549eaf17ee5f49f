"""One file for several models: its format is a plugin's, here a toy's that writes `PART/NAME`."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine import adapter_parameters, state_of
from peftcore.plugin import FileFormat

FILE = "toys.safetensors"


def parts(model: nn.Module, called: str | None) -> list[str]:
    if not hasattr(model, "lm_head"):
        raise peftcore.PeftcoreError("no head")
    if called not in (None, "left", "right"):
        raise peftcore.PeftcoreError(f"'{called}' is no part")
    return ["left", "right"] if called is None else [called]


def split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, inside = name.rpartition("/")
        found.setdefault(part, {})[inside] = tensor
    return found


def read(model: nn.Module, part: str, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Any:
    return tensors, {"peft_type": "TOY_FILED"}


def write(contents: Mapping[str, Any]) -> Any:
    return {f"{part}/{name}": t for part, (_, tensors, _) in contents.items() for name, t in tensors.items()}, {}


FORMAT = FileFormat("toys", FILE, lambda names: all("gain" in name for name in names), parts, split, read, write)


@pytest.fixture(autouse=True)
def filed() -> Any:
    method = tiny.method("filed")
    with tiny.installed(dataclasses.replace(method, state=dataclasses.replace(method.state, formats=(FORMAT,)))):
        yield


def gains(model: nn.Module) -> set[float]:
    return {p.item() for _, p in adapter_parameters(model, "default")}


def pair() -> dict[str, Any]:
    return {"left": tiny.llama(), "right": tiny.llama(), "scheduler": object(), "nothing": None}


def saved(folder: Path) -> Path:
    models = pair()
    for value, name in ((2.0, "left"), (3.0, "right")):
        peftcore.apply(models[name], "filed", value=value)
    return peftcore.save(models, folder, format="toys")


def test_each_model_is_given_its_part(tmp_path: Path) -> None:
    assert os.listdir(saved(tmp_path)) == [FILE]
    for path in (tmp_path, tmp_path / FILE):
        models = pair()
        assert peftcore.load(models, path) is models
        assert (gains(models["left"]), gains(models["right"])) == ({2.0}, {3.0})
    one = tiny.llama()
    with pytest.raises(peftcore.CheckpointError, match="contains left and right, and a LlamaForCausalLM can be either"):
        peftcore.load(one, tmp_path)
    with pytest.raises(
        peftcore.CheckpointError, match=r"contains right \(\d+ tensors\), but no model for it was passed"
    ):
        peftcore.load({"left": one}, tmp_path)
    assert state_of(one) is None


def test_all_or_none(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / FILE)
    last = next(name for name in tensors if name.startswith("right"))
    save_file({name: t for name, t in tensors.items() if name != last}, tmp_path / FILE)
    models = pair()
    with pytest.raises(peftcore.CheckpointError, match="1 tensors are missing"):
        peftcore.load(models, tmp_path)
    assert state_of(models["left"]) is None and state_of(models["right"]) is None


def test_what_a_save_would_lose(tmp_path: Path) -> None:
    saved(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    one = peftcore.apply(tiny.llama(), "filed")
    with pytest.raises(peftcore.PeftcoreError, match=r"can be 'left' or 'right' of a pipeline. Pass it under its name"):
        peftcore.save(one, tmp_path, format="toys")
    with pytest.raises(
        peftcore.CheckpointError, match=r"also contains right \(\d+ tensors\), which this save would delete"
    ):
        peftcore.save({"left": one}, tmp_path, format="toys")
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / FILE).write_bytes(b"what")
    with pytest.raises(peftcore.CheckpointError, match="is not in a known format"):
        peftcore.save({"left": one}, tmp_path, format="toys")
    with pytest.raises(peftcore.PeftcoreError, match="format='peft' saves one model"):
        peftcore.save({"left": one}, tmp_path)
    peftcore.apply(one, "filed", adapter="b")
    with pytest.raises(
        peftcore.PeftcoreError, match=r"saves one adapter per model, found default, b. Pass adapter='NAME'"
    ):
        peftcore.save({"left": one}, tmp_path / "new", format="toys")
    peftcore.save({"left": one}, tmp_path / "new.safetensors", adapter="b", format="toys")
    assert (tmp_path / "new.safetensors").is_file()


def test_what_is_no_such_file(tmp_path: Path) -> None:
    model = tiny.llama()
    save_file({"weight": next(model.parameters()).detach()}, tmp_path / "model.safetensors")
    with pytest.raises(
        peftcore.CheckpointError, match=r"not in a known format \(known formats: .*toys.*\). Its tensors: 'w"
    ):
        peftcore.load(model, tmp_path / "model.safetensors")
    (tmp_path / "adapter.bin").write_bytes(b"a pickle")
    with pytest.raises(peftcore.CheckpointError, match=r"adapter.bin' is a pickle, which can run arbitrary code"):
        peftcore.load(model, tmp_path / "adapter.bin")
    folder = peftcore.save(peftcore.apply(tiny.llama(), "filed"), tmp_path / "folder")
    with pytest.raises(peftcore.CheckpointError, match=r"is one of an adapter's files. Pass its folder"):
        peftcore.load(model, folder / "adapter_model.safetensors")
    with pytest.raises(peftcore.CheckpointError, match="contains one adapter, but 2 models were passed"):
        peftcore.load({"left": model, "right": model}, folder)
    (tmp_path / "adapter.bin").unlink()
    with pytest.raises(
        peftcore.CheckpointError, match=r"If 'model.safetensors' is an adapter, pass that file: '.*model.safeten"
    ):
        peftcore.load(model, tmp_path)
    for call in (lambda: peftcore.load(object(), folder), lambda: peftcore.save(object(), folder, format="toys")):
        with pytest.raises(
            peftcore.PeftcoreError, match="expected a model or a dictionary of models by name, found a object"
        ):
            call()


def test_what_is_in_it(tmp_path: Path) -> None:
    folder = peftcore.inspect(peftcore.save(peftcore.apply(tiny.llama(), "filed"), tmp_path / "folder"))
    assert folder.format == "peft" and folder.parts.keys() == {""}
    info = peftcore.inspect(saved(tmp_path / "several"))
    assert (info.format, info.method, info.fields, info.base_is_checked) == ("toys", "filed", {}, True)
    assert info.parts.keys() == {"left", "right"} and len(info.parts["left"]) == len(info.parts["right"]) > 0
    assert str(info).splitlines()[0] == "layout  toys"


def test_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    saved(tmp_path / "org" / "name")
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    models = peftcore.load(pair(), "org/name")
    assert gains(models["right"]) == {3.0} and FILE in asked[-1]
