"""Bottlenecks that the library `adapters` 1.3.0 saved compute here what they compute there (adapterhub/make.py)."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny

import peftcore

FOLDERS = Path(__file__).parent / "adapterhub"
spec = importlib.util.spec_from_file_location("adapterhub_make", FOLDERS / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDERS.iterdir() if "-" in path.name))
def test_computes_the_same(name: str, tmp_path: Path) -> None:
    expected = load_file(FOLDERS / name / "output.safetensors")["output"]
    model = make.filled(getattr(make, name.split("-")[0])())
    inputs = make.inputs(model)
    with torch.no_grad():
        base = model(**inputs)[0]
        peftcore.load(model, FOLDERS / name)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
        assert (base - expected).abs().max() > 0.1
        peftcore.save(model, tmp_path)  # in our own format
        twin = make.filled(getattr(make, name.split("-")[0])())
        peftcore.load(twin, tmp_path)
        assert torch.equal(twin(**inputs)[0], model(**inputs)[0])


def test_layers_left_out_stay_so() -> None:
    model = make.filled(make.llama())
    peftcore.load(model, FOLDERS / "llama-seq_bn")
    assert peftcore.engine.applied(model, "default").paths == ("model.layers.1",)


def changed(folder: Path, **settings: Any) -> Path:
    shutil.copytree(FOLDERS / "bert-seq_bn", folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["config"].update(settings)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phm_layer": True}, "its layers share parameters that are not in the file"),
        ({"inv_adapter": "nice"}, "it uses inv_adapter='nice', but the file lacks the tensors"),
        ({"inv_adapter": "glow"}, "it uses inv_adapter='glow', which peftcore's bottlenecks do not have"),
        ({"adapter_residual_before_ln": True}, "it uses adapter_residual_before_ln=True"),
        (
            {"original_ln_after": False},
            "original_ln_after=False and residual_before_ln=True, which add the residual twice",
        ),
        ({"residual_before_ln": False}, "original_ln_after=True and residual_before_ln=False, which add the residual"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln='post_add', which add the residual twice"),
        ({"scaling": "chanel"}, "it uses scaling='chanel'; only a number, 'learned' or 'channel'"),
        ({"phm_dim": "4"}, "it uses phm_dim='4'; only a whole number"),
        ({"reduction_factor": {"default": 4}}, "only a number"),
        ({"scaling": True}, "only a number"),
        ({"dropout": "0.1"}, "it uses dropout='0.1'; only a number"),
        ({"is_parallel": "no"}, "it uses is_parallel='no'; only true or false"),
        ({"non_linearity": ["relu"]}, r"it uses non_linearity=\['relu'\]; only a text"),
        ({"bottleneck": None, "non_linearity": "x" * 9}, "non_linearity must be"),
        ({"non_linearity": "prelu"}, "non_linearity must be .* found 'prelu'"),
    ],
)
def test_what_would_compute_something_else_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = make.filled(make.bert())
    with pytest.raises(peftcore.CheckpointError, match=rf"the library adapters\) cannot be read.*{message}"):
        peftcore.load(model, changed(tmp_path / "a", **settings))
    assert peftcore.engine.state_of(model) is None


def test_parallel_on_a_pre_norm_model_is_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path / "a", is_parallel=True, original_ln_before=False)
    tensors = load_file(folder / "adapter.safetensors")
    renamed = {
        key.replace("encoder.layer.", "model.layers.").replace(".output.", ".output_adapters."): tensor
        for key, tensor in tensors.items()
    }
    save_file(renamed, folder / "adapter.safetensors")
    with pytest.raises(peftcore.CheckpointError, match="reads the input of the norm of LlamaForCausalLM"):
        peftcore.load(make.filled(make.llama()), folder)


def test_not_of_this_model_or_not_a_bottleneck(tmp_path: Path) -> None:
    with pytest.raises(peftcore.CheckpointError, match="is not a known sublayer of this model"):
        peftcore.load(torch.nn.Sequential(torch.nn.Linear(2, 2)), FOLDERS / "bert-seq_bn")
    folder = changed(tmp_path / "a")
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["config"] = {"architecture": "lora", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(
        peftcore.CheckpointError, match=r"its architecture is 'lora', but peftcore can only read bottleneck"
    ):
        peftcore.load(make.filled(make.bert()), folder)
    stranger = changed(tmp_path / "b")
    save_file({"heads.task.weight": torch.zeros(2)}, stranger / "adapter.safetensors")
    with pytest.raises(peftcore.CheckpointError, match=r"'heads.task.weight' does not belong to a bottleneck"):
        peftcore.load(make.filled(make.bert()), stranger)


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = changed(tmp_path / "a")
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(peftcore.CheckpointError, match=r"a pickle, .* save it as adapter.safetensors"):
        peftcore.load(make.filled(make.bert()), folder)


def test_a_config_of_nobody_keeps_the_core_s_message(tmp_path: Path) -> None:
    shutil.copytree(FOLDERS / "bert-seq_bn", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "a" / "adapter.safetensors").rename(tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(peftcore.CheckpointError, match="has no field peft_type"):
        peftcore.load(tiny.llama(), tmp_path / "a")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`command("eval", ...)`: a command on the folder of the Llama's adapter, with its base; returns what it prints."""
    from peftcore_cli import console
    from peftcore_cli.app import build
    from support.commands import SPECIAL, WORDS, save_tokenizer
    from typer.testing import CliRunner

    monkeypatch.setattr(console.out, "width", 200)
    base = tmp_path / "base"
    make.filled(make.llama()).save_pretrained(base)
    save_tokenizer(base)
    assert len(SPECIAL + WORDS) <= 32

    def call(name: str, *arguments: Any, code: int = 0) -> str:
        where = [FOLDERS / "llama-seq_bn", *(["--model", base] if name != "info" else [])]
        words = [str(word) for word in (name, *where, *arguments)]
        result = CliRunner().invoke(build(words), words)
        assert result.exit_code == code, result.output
        return result.output

    return call


def test_commands_take_such_folders(command: Any, tmp_path: Path) -> None:
    shown = command("info")
    assert "the library adapters" in shown and "BOTTLENECK_ADAPTER" in shown and "reduction_factor" in shown
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "the film is good and bright"}) + "\n")
    rows = command("eval", "--data", tmp_path / "rows.jsonl").splitlines()
    base, adapted = next(line.split()[1:] for line in rows if line.startswith("loss"))
    assert float(base) != float(adapted)
    answers = {command("generate", "--prompt", "the film is", *more) for more in ((), ("--compare",))}
    assert len(answers) == 2 and any("with the adapter:" in answer for answer in answers)
    refused = command("merge", "--output", tmp_path / "merged", code=1)
    assert "(adapter) cannot be merged" in refused and not (tmp_path / "merged").exists()


def test_a_folder_that_names_no_base(tmp_path: Path) -> None:
    from peftcore_cli.bases import adapter_folders

    assert adapter_folders.base_of(FOLDERS / "bert-seq_bn", "some/base") == "some/base"
    with pytest.raises(peftcore.PeftcoreError, match="does not record its base"):
        adapter_folders.base_of(FOLDERS / "bert-seq_bn", None)
    shutil.copytree(FOLDERS / "bert-seq_bn", tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**fields, "model_name": "google/bert"}))
    assert adapter_folders.base_of(tmp_path / "a", None) == "google/bert"
    assert adapter_folders.adapter_task(tmp_path / "a", "down,up") == adapter_folders.AdapterTask(
        "classification", 512, ("down", "up")
    )
