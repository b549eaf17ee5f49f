"""Fields of a config that PEFT does not know are kept beside the tensors, and count as those of the config do."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
from support import tiny

import peftcore
from peftcore.engine import applied
from peftcore.plugin import Method, PeftRules, StateRules

FIELDS = "peftcore_fields"


def gated(name: str = "gated", **rules: object) -> Method:
    """A method of the same files as `plain`, but for fields of its own."""
    return tiny.method(
        name, state=StateRules("SAME", peft=PeftRules(own_fields=frozenset({"value", "names"}), **rules))
    )


@pytest.fixture
def plain() -> Iterator[None]:
    with tiny.installed(tiny.method("plain", state=StateRules("SAME"))):
        yield


def metadata(folder: Path) -> dict[str, str]:
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


def set_metadata(folder: Path, **changes: str) -> None:
    file = folder / "adapter_model.safetensors"
    about = {name: value for name, value in {**metadata(folder), **changes}.items() if value is not None}
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, about)
    tiny.without_hash(folder)


def test_they_lie_beside_the_tensors_and_come_back(tmp_path: Path, plain: None) -> None:
    with tiny.installed(gated(flag="value")):
        peftcore.save(peftcore.apply(tiny.llama(), "gated", value=3.0, names=("a", "b")), tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert "value" not in config and "names" not in config and "target_modules" in config
        assert json.loads(metadata(tmp_path)[FIELDS]) == {"value": 3.0, "names": ["a", "b"]}
        set_metadata(tmp_path, peftcore_method=None)
        entry = applied(peftcore.load(tiny.llama(), tmp_path), "default")
        assert (entry.method, entry.config.value, list(entry.config.names)) == ("gated", 3.0, ["a", "b"])
    with pytest.raises(
        peftcore.CheckpointError, match=r"safetensors' uses names=\['a', 'b'\], which .* 'plain' does not"
    ):
        peftcore.load(tiny.llama(), tmp_path)


def test_defaults_are_not_written(tmp_path: Path, plain: None) -> None:
    with tiny.installed(gated()):
        peftcore.save(peftcore.apply(tiny.llama(), "gated"), tmp_path)
    assert FIELDS not in metadata(tmp_path)
    with pytest.warns(UserWarning, match="was written by the method 'gated', which is not installed. 'plain' reads it"):
        assert applied(peftcore.load(tiny.llama(), tmp_path), "default").method == "plain"


def test_a_method_that_would_not_take_its_own_file_does_not_write_it(tmp_path: Path, plain: None) -> None:
    with tiny.installed(gated(flag="value")):  # which a default leaves out
        model = peftcore.apply(tiny.llama(), "gated")
        with pytest.raises(peftcore.PluginError, match=r"of 'gated' would lack its PeftRules.flag 'value'"):
            peftcore.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"value": "3"}', "value must be a finite number, found '3'"),
        ('{"value": NaN}', "peftcore_fields' cannot be read as JSON: it contains NaN"),
        ("[3]", r"peftcore_fields' must be a table of fields, found \[3\]"),
        ('{"valeu": 3}', "uses valeu=3, which the installed plugin 'gated' does not support"),
        (
            '{"target_modules": ["k_proj"]}',
            r"uses target_modules=\['k_proj'\], which the installed plugin 'gated'",
        ),
        ('{"peft_type": "OTHER"}', "uses peft_type='OTHER', which"),
        ("[" * 100_000, "cannot be read as JSON: it is nested too deeply"),
    ],
)
def test_what_a_stranger_wrote_there_is_checked(tmp_path: Path, text: str, message: str) -> None:
    with tiny.installed(gated()):
        peftcore.save(peftcore.apply(tiny.llama(), "gated", value=3.0), tmp_path)
        set_metadata(tmp_path, **{FIELDS: text})
        with pytest.raises(peftcore.CheckpointError, match=message):
            peftcore.load(tiny.llama(), tmp_path)


def test_a_field_in_both_places_says_one_thing(tmp_path: Path) -> None:
    with tiny.installed(gated()):
        peftcore.save(peftcore.apply(tiny.llama(), "gated", value=3.0), tmp_path)
        file = tmp_path / "adapter_config.json"
        tiny.without_hash(tmp_path)
        for value in (3.0, 4.0):
            file.write_text(json.dumps({**json.loads(file.read_text()), "value": value}))
            if value == 3.0:
                peftcore.load(tiny.llama(), tmp_path)
        with pytest.raises(peftcore.CheckpointError, match=r"has value=3.0, but its config has value=4.0"):
            peftcore.load(tiny.llama(), tmp_path)


def test_a_field_that_the_config_does_not_have_is_refused() -> None:
    method = tiny.method("gated", state=StateRules("SAME", peft=PeftRules(own_fields=frozenset({"valeu"}))))
    with pytest.raises(peftcore.PluginError, match=r"own_fields names 'valeu', .* ToyGatedConfig \(nearest: 'value'"):
        tiny.installed(method).__enter__()
