"""Saving survives kills and full disks; loading is strict and says what does not fit."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import tiny

import peftcore
from peftcore.engine import adapter_parameters
from peftcore.files import folder, single_file
from peftcore.files.loading import restore
from peftcore.files.tensors import tensors_on_disk
from peftcore.plugin import PeftRules, StateRules
from peftcore.testing import disturb

pytestmark = pytest.mark.usefixtures("toys")


FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_round_trip(saved: Path) -> None:
    model = peftcore.load(tiny.llama(), saved, adapter="again")
    assert {p.item() for _, p in adapter_parameters(model, "again")} == {3.0}
    wanted = tiny.logits(peftcore.apply(tiny.llama(), "around", value=3.0))
    assert torch.equal(tiny.logits(model), wanted)


def test_the_files(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == FILES
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["peft_type"] == "TOY_AROUND"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    tensors = safetensors.torch.load_file(saved / "adapter_model.safetensors")
    assert sorted(tensors) == [f"base_model.model.model.layers.{i}.self_attn.q_proj.gain" for i in range(2)]


def test_what_is_trained_beside_the_adapters_is_reported(tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "around")
    peftcore.apply(model, "train", adapter="second", names=("lm_head.weight",))
    peftcore.save(model, tmp_path / "all")  # which has what is trained
    model.model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 base parameters .*, such as 'model.norm.weight', .* modules_to_save"):
        peftcore.save(model, tmp_path / "one", adapter="default")


def test_names_of_every_placement() -> None:
    for kind, wanted in {
        "after": "base_model.model.model.layers.0.self_attn.shift",
        "soft": "vectors",
        "prefix": "vectors",
    }.items():
        assert list(tensors_on_disk(peftcore.apply(tiny.llama(), kind), "default")) == [wanted]
    model = peftcore.apply(tiny.llama(), "train", names=("lm_head.weight",))
    assert list(tensors_on_disk(model, "default")) == ["base_model.model.lm_head.weight"]


@pytest.mark.parametrize("kind", ["after", "soft", "prefix"])
def test_round_trip_of_every_placement(kind: str, tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), kind)
    peftcore.save(model, tmp_path)
    assert torch.equal(tiny.logits(peftcore.load(tiny.llama(), tmp_path)), tiny.logits(model))


def test_trainable_and_dtype(saved: Path, tmp_path: Path) -> None:
    model = peftcore.load(tiny.llama(), saved, trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    peftcore.save(model, tmp_path / "half", dtype=torch.bfloat16)
    tensors = safetensors.torch.load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def several() -> torch.nn.Module:
    """Three adapters, two of which train one parameter in turn; `b` and then `default` act."""
    model = peftcore.apply(tiny.llama(), "around", value=3.0)
    peftcore.apply(model, "train", names=("lm_head.weight",), adapter="a")
    peftcore.activate(model, [])
    peftcore.apply(model, "train", names=("lm_head.weight",), adapter="b")
    disturb(model, "b", seed=1)
    peftcore.activate(model, ["b", "default"])
    return model


def test_several_are_saved_and_loaded_together(tmp_path: Path) -> None:
    model = several()
    peftcore.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "a",
        "adapter_config.json",
        "adapter_model.safetensors",
        "b",
    ]
    loaded = peftcore.load(tiny.llama(), tmp_path)
    assert [a.name for a in peftcore.summary(loaded).adapters] == ["default", "a", "b"]
    assert peftcore.engine.state_of(loaded).active == ("b", "default")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    for names in (["a"], ["b"], ["default", "a"]):
        peftcore.activate(model, names)
        peftcore.activate(loaded, names)
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    alone = peftcore.load(tiny.llama(), tmp_path / "b", adapter="only")
    peftcore.activate(model, "b")
    assert torch.equal(tiny.logits(alone), tiny.logits(model))


def test_one_of_several_that_does_not_load_takes_all_back(tmp_path: Path) -> None:
    peftcore.save(several(), tmp_path)
    os.truncate(tmp_path / "b" / "adapter_model.safetensors", 100)
    model = peftcore.apply(tiny.llama(), "around", adapter="mine")
    acting = tiny.logits(model)
    with pytest.raises(
        peftcore.CheckpointError, match=r"b/adapter_model.safetensors' .* is not a complete safetensors"
    ):
        peftcore.load(model, tmp_path)
    assert torch.equal(tiny.logits(model), acting)
    assert [a.name for a in peftcore.summary(model).adapters] == ["mine"]


def test_one_of_several_whose_folder_was_deleted(tmp_path: Path) -> None:
    peftcore.save(several(), tmp_path)
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(peftcore.CheckpointError, match=r"lacks the adapter 'b', which was saved together"):
        peftcore.load(tiny.llama(), tmp_path)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ('{"adapters": ["../outside"], "active": []}', r"the adapter name '../outside' contains '.'"),
        (
            '{"adapters": ["default"], "active": ["other"]}',
            r"the active adapters are \['other'\], but the folder contains \['default'\]",
        ),
        ('{"adapters": 3}', r"the list of adapters in"),
        ('{"adapters": [], "active": []}', r"list of adapters in .*: no names are given"),
        ("nonsense", r"the list of adapters in"),
    ],
)
def test_names_in_a_file_are_not_trusted(theirs: Path, told: str, message: str) -> None:
    file = theirs / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"peftcore_together": told})
    with pytest.raises(peftcore.PeftcoreError, match=message):
        peftcore.load(tiny.llama(), theirs)


def test_checkpoints_beside_an_adapter_are_not_loaded_with_it(saved: Path) -> None:
    peftcore.save(peftcore.apply(tiny.llama(), "around"), saved / "checkpoint-3")
    model = peftcore.load(tiny.llama(), saved)
    assert [a.name for a in peftcore.summary(model).adapters] == ["default"]


def test_the_base_is_recognised_by_its_values(tmp_path: Path) -> None:
    """An adapter on the model that trains a sampled parameter does not make it another base."""
    peftcore.save(peftcore.apply(tiny.llama(), "around"), tmp_path)
    model = peftcore.apply(tiny.llama(), "train", names=("lm_head.weight",), adapter="head")
    disturb(model, "head", seed=1, std=2.0)
    peftcore.load(model, tmp_path)
    assert peftcore.summary(model).adapters[1].active


def test_restore_fills_an_applied_adapter(saved: Path) -> None:
    model = peftcore.apply(tiny.llama(), "around", value=1.0)
    restore(model, saved)
    assert {p.item() for _, p in adapter_parameters(model, "default")} == {3.0}
    other = peftcore.apply(tiny.llama(), "after")
    with pytest.raises(
        peftcore.CheckpointError, match="contains an adapter of method around, but 'default' uses after"
    ):
        restore(other, saved)


def test_values_too_large_for_the_dtype_on_disk(saved: Path) -> None:
    model = peftcore.apply(tiny.llama(), "around", value=1e6)
    with pytest.raises(peftcore.CheckpointError, match=r"gain' contains 1e\+06, which is too large for torch.float16"):
        peftcore.save(model, saved, dtype=torch.float16)
    assert {p.item() for _, p in adapter_parameters(peftcore.load(tiny.llama(), saved), "default")} == {3.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_no_load_takes_is_not_saved(saved: Path, value: float) -> None:
    model = peftcore.apply(tiny.llama(), "around")
    with torch.no_grad():
        next(iter(adapter_parameters(model, "default")))[1].fill_(value)
    with pytest.raises(
        peftcore.CheckpointError, match=r"adapter 'default' was not saved: '.*gain' contains NaN or Inf"
    ):
        peftcore.save(model, saved)
    assert {p.item() for _, p in adapter_parameters(peftcore.load(tiny.llama(), saved), "default")} == {3.0}


def test_folders_inside_are_not_read_whole(saved: Path) -> None:
    """Of what lies in a folder without an adapter of its own, the headers tell whether it belongs together."""
    tiny.without_hash(saved)
    with open(saved / "adapter_model.safetensors", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        peftcore.CheckpointError, match=r"does not contain an adapter: adapter_model.safetensors is missing"
    ):
        peftcore.load(tiny.llama(), saved.parent)


def test_a_missing_folder_says_what_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(path: str | Path) -> str:
        with pytest.raises(peftcore.CheckpointError) as found:
            peftcore.load(tiny.llama(), path)
        return str(found.value)

    what = "Pass the folder that `save` wrote, or a Hugging Face Hub id as a string, 'ORG/NAME'"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter.txt").write_text("")
    near = f"'{tmp_path}' contains other folders (nearest: 'adapter'). "
    assert error(tmp_path / "adaptr") == f"the folder '{tmp_path}/adaptr' does not exist. {near}{what}"
    assert error(tmp_path / "xyz") == f"the folder '{tmp_path}/xyz' does not exist. {what}"
    assert f"'{tmp_path}/a/b' does not exist either. {what}" in error(tmp_path / "a" / "b" / "c")
    monkeypatch.chdir(tmp_path)
    assert error("xyz") == f"the folder 'xyz' does not exist. The path is relative to '{tmp_path}'. {what}"
    assert what in error("half a path\0")


def test_only_the_method_that_the_file_names_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a file read or parsed twice."""
    reads: list[str] = []

    def read(_model: object, tensors: object, fields: object) -> object:
        reads.append("own")
        return tensors, fields

    def other(*_: object) -> object:
        raise AssertionError("it was asked")

    parsed: list[Path] = []
    parse = folder.parse_tensors
    monkeypatch.setattr(folder, "parse_tensors", lambda content, file: (parsed.append(file), parse(content, file))[1])
    monkeypatch.setattr(single_file, "formats", other)
    methods = [tiny.method("own", state=StateRules("SAME", read=read))]
    methods.append(tiny.method("other", state=StateRules("SAME", read=other, peft=PeftRules(refused=other))))
    with tiny.installed(*methods):
        peftcore.save(peftcore.apply(tiny.llama(), "own", value=3.0), tmp_path / "a")
        reads.clear()
        peftcore.load(tiny.llama(), tmp_path / "a")
    assert reads == ["own"] and parsed == [tmp_path / "a" / "adapter_model.safetensors"]


def test_another_base_of_the_same_shape(saved: Path) -> None:
    other = tiny.llama(seed=1)
    with pytest.raises(peftcore.CheckpointError, match=r"trained on another base: the values of .* differ by 1\d\d %"):
        peftcore.load(other, saved)
    peftcore.load(other, saved, check_base=False)


def test_the_same_base_in_another_dtype(saved: Path) -> None:
    peftcore.load(tiny.llama().to(torch.bfloat16), saved)


def test_a_file_in_the_way_of_the_folder(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(peftcore.CheckpointError, match="could not be saved"):
        peftcore.save(peftcore.apply(tiny.llama(), "around"), tmp_path / "file")


def test_a_full_disk_leaves_the_old_adapter(saved: Path) -> None:
    model = peftcore.apply(tiny.llama(), "around", value=9.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))  # the config fits, the tensors do not
        with pytest.raises(peftcore.CheckpointError, match=r"could not be saved.*Existing files are unchanged"):
            peftcore.save(model, saved)
        assert sorted(os.listdir(saved)) == FILES
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    loaded = peftcore.load(tiny.llama(), saved)
    assert {p.item() for _, p in adapter_parameters(loaded, "default")} == {3.0}
