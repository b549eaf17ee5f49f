"""Formats of `peftcore.export`: a user's plugin adds one, and errors name who is to blame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exported import apply, llama, logits, tokenizer

import peftcore
from peftcore.plugin import Exporter, PeftcoreError, adapter_products, base_tensors, hookimpl
from peftcore.plugin.registry import registry

# --- a user's module: the whole of a new format ----------------------------------------------------------------------


@dataclass(frozen=True)
class NpzOptions:
    compressed: bool = False


def write_model(model: Any, path: Path, options: NpzOptions) -> None:
    save = np.savez_compressed if options.compressed else np.savez
    save(path, **{name: tensor.detach().numpy() for name, tensor in base_tensors(model).items()})


def write_adapter(model: Any, path: Path, adapter: str, options: NpzOptions) -> None:
    found = adapter_products(model, adapter, "be written as .npz")
    np.savez(path, **{name: (each.scale * each.b @ each.a).numpy() for name, each in found.items()})


class NpzPlugin:
    @hookimpl
    def peftcore_exporters(self) -> list[Exporter]:
        return [
            Exporter(
                "npz",
                "NumPy",
                write_adapter,
                write_model,
                NpzOptions,
                adapter_file="change.npz",
                model_file="model.npz",
                usage=lambda path, base, part: [f"numpy.load({path.name!r})"],
            )
        ]


# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def installed(plugin: Any, name: str = "npz") -> Iterator[None]:
    registry.register(name, plugin, f"peftcore-{name}", "1.0")
    try:
        yield
    finally:
        registry.unregister(name)


def one(**fields: Any) -> Any:
    class Plugin:
        @hookimpl
        def peftcore_exporters(self) -> list[Exporter]:
            return [Exporter(**{"name": "npz", "programs": "NumPy", **fields})]

    return Plugin()


def test_a_plugin_adds_a_format(tmp_path: Path) -> None:
    model = apply(llama(num_hidden_layers=1), r=4, target_modules=["q_proj"])
    path = "model.layers.0.self_attn.q_proj"
    before = model.get_submodule(path).weight.detach().numpy().copy()
    with installed(NpzPlugin()):
        file = peftcore.export(model, tmp_path / "change.npz", format="npz", adapter="default")
        change = np.load(file)[path]
        with pytest.raises(PeftcoreError, match=r"adapters 'default' are active but would be missing"):
            peftcore.export(model, tmp_path / "model.npz", format="npz")
        peftcore.merge(model, undo=True)
        file = peftcore.export(model, tmp_path / "model.npz", format="npz", compressed=True)
        assert np.abs(np.load(file)[f"{path}.weight"] - before - change).max() < 1e-6
        with pytest.raises(PeftcoreError, match=r"'npz' has no option 'compresed' \(nearest: 'compressed'"):
            peftcore.export(model, tmp_path / "x", format="npz", compresed=True)
        with pytest.raises(PeftcoreError, match=r"compressed.* true or false, found 'yes'"):
            peftcore.export(model, tmp_path / "x", format="npz", compressed="yes")
    with pytest.raises(PeftcoreError, match=r"'npz' is unknown. Choose one of: .*onnx, peft, vllm"):
        peftcore.export(model, tmp_path / "x", format="npz")


def test_a_plugins_format_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.commands import invoke

    for part in (llama(num_hidden_layers=1), tokenizer()):
        part.save_pretrained(tmp_path / "base")
    model = apply(llama(num_hidden_layers=1), r=4, target_modules=["q_proj"])
    peftcore.save(model, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    with installed(NpzPlugin()):
        given = ("export", "--format", "npz", "adapter", "--model", "base", "--set", "compressed=true")
        found = invoke(*given, "--output", "both")
        assert found.exit_code == 0, found.output
        assert sorted(each.name for each in Path("both").iterdir()) == ["change.npz", "model.npz"]
        assert "MB): numpy.load('model.npz')" in found.output.replace("\n", " ")
        assert "npz" in invoke("export").output
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained("base")
    merged.load_state_dict(
        {name: torch.from_numpy(each) for name, each in np.load("both/model.npz").items()}, strict=False
    )
    assert (logits(merged.eval()) - logits(model.eval())).abs().max() < 1e-5


def test_errors_name_the_plugin(tmp_path: Path) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("rope")

    model = llama(num_hidden_layers=1)
    with installed(one(write_model=broken)):
        who = r"`write_model` of the plugin 'npz' \(peftcore-npz 1.0\) failed: KeyError: 'rope'"
        with pytest.raises(peftcore.PluginError, match=who):
            peftcore.export(model, tmp_path / "new" / "x", format="npz")
    assert not list(tmp_path.iterdir())  # the folder that was made for it is gone
    both = r"peftcore_exporters: the plugin 'other' \(peftcore-other 1.0\) and peftcore both provide 'onnx'"
    with installed(one(name="onnx", write_model=broken), "other"), pytest.raises(peftcore.PluginError, match=both):
        peftcore.export(model, tmp_path / "x", format="vllm")


def test_an_adapter_of_a_format_without_adapters(tmp_path: Path) -> None:
    model = apply(llama(num_hidden_layers=1), r=4, target_modules=["q_proj"])
    with pytest.raises(
        PeftcoreError, match=r"format='onnx' writes complete models, so it does not take adapter='default'"
    ):
        peftcore.export(model, tmp_path / "model.onnx", format="onnx", adapter="default")


def test_peft_is_a_format_like_others(tmp_path: Path) -> None:
    model = apply(llama(num_hidden_layers=1), r=4, target_modules=["q_proj"])
    folder = peftcore.export(model, tmp_path / "peft", format="peft")
    again = peftcore.load(llama(num_hidden_layers=1), folder)
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcore.exporting import export as _export  # noqa: F401  # registers the core's formats

    known = {name: each for name, each in registry.exporters().items() if name != "gguf"}
    monkeypatch.setattr(registry, "exporters", lambda: known)
    with pytest.raises(PeftcoreError, match=r"'gguf' is not installed .*: pip install ./plugins/peftcore-gguf"):
        peftcore.export(llama(num_hidden_layers=1), tmp_path / "x", format="gguf")
