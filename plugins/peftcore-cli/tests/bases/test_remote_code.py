"""`--trust-remote-code`: a base whose classes are in its own folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peftcore_cli.bases import base_and_adapter, base_files, models
from support import own_code_models
from support.commands import SPECIAL, WORDS, Run
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from peftcore import PeftcoreError

CONFIG = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, width=32, **kwargs):
        self.width, self.num_hidden_layers = width, 1
        super().__init__(**kwargs)
"""
MODEL = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig

class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.up = nn.Linear(config.width, 2 * config.width)
        self.down = nn.Linear(2 * config.width, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        x = self.words(input_ids)
        before = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        x = x.cumsum(1) / before  # causal
        logits = self.head(x + self.down(torch.relu(self.up(x))))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""


@pytest.fixture(autouse=True, scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let transformers copy the code that it runs to a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def written(folder: Path, llama: Path, code: str = MODEL) -> Path:
    """Write a model's configuration and code, and a tokenizer."""
    folder.mkdir()
    for file in (*llama.glob("*token*"), *llama.glob("vocab*")):
        shutil.copy(file, folder)
    (folder / "configuration_own.py").write_text(CONFIG)
    (folder / "modeling_own.py").write_text(code)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own", "auto_map": classes, "architectures": ["OwnForCausalLM"], "pad_token_id": 0}
    config |= {"vocab_size": len(SPECIAL + WORDS), "width": 32, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def own(llama: Path, tmp_path: Path) -> Path:
    """Return a folder with a model and its own code."""
    folder = written(tmp_path / "own", llama)
    torch.manual_seed(0)
    found = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModelForCausalLM.from_config(found, trust_remote_code=True).save_pretrained(folder)
    return folder


def losses(output: str) -> list[float]:
    """Return (the base's, with the adapter) from what `eval` prints."""
    return [float(word) for word in next(line for line in output.splitlines() if "loss" in line).split()[-2:]]


def test_train_and_use(run: Run, own: Path, reviews: Path, tmp_path: Path) -> None:
    output, trust = tmp_path / "run", "--trust-remote-code"
    given = ("train", "-m", own, "-d", reviews, "--eval-data", reviews, "-o", output, "--steps", 2, "--lr", "0.02")
    method = ("--method", "lora", "--set", "target_modules=up,down", "--set", "r=4")
    refused = "is not run by default. Read the code, and pass --trust-remote-code"
    assert refused in " ".join(run(*given, *method, code=1).output.split())
    printed = run(*given, *method, trust).output
    assert sum(printed.count(f"{trust} --{option}") for option in ("data", "prompt", "output")) == 3
    found = json.loads((output / "result.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"]
    assert json.loads((output / "run.json").read_text())["trust_remote_code"] is True

    assert refused in " ".join(run("eval", output, "-d", reviews, code=1).output.split())  # at each call
    wanted = pytest.approx([found["before"]["loss"], found["after"]["loss"]], abs=1e-4)
    assert losses(run("eval", output, "-d", reviews, trust).output) == wanted
    run("generate", output, "-p", "the film is", "--max-new-tokens", 2, trust)
    run("merge", output, "-o", tmp_path / "merged", trust)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    adapted = base_and_adapter.load_adapter(
        AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True), output / "adapter"
    )
    tokens = {"input_ids": torch.arange(3, 12).view(1, 9)}
    with torch.no_grad():
        torch.testing.assert_close(merged(**tokens).logits, adapted(**tokens).logits, rtol=1e-4, atol=1e-5)


def test_code_that_computes_logits_alone(run: Run, reviews: Path, tmp_path: Path) -> None:
    """Replit's takes no labels, and was written for a `PreTrainedModel` that could generate."""
    own_code_models.replit(tmp_path / "base")
    trust, targets = "--trust-remote-code", "target_modules=Wqkv,mlp_up"
    given = ("-m", tmp_path / "base", "-d", reviews, "--eval-data", reviews, "-o", tmp_path / "run", "--steps", 2)
    run("train", *given, "--method", "lora", "--set", targets, "--lr", "0.02", trust)
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"]
    wanted = pytest.approx([found["before"]["loss"], found["after"]["loss"]], abs=1e-4)
    assert losses(run("eval", tmp_path / "run", "-d", reviews, trust).output) == wanted
    refused = run("generate", tmp_path / "run", "-p", "the film is", trust, code=1).output
    assert "ReplitLM cannot generate text: its class does not inherit from" in " ".join(refused.split())

    model = models.load_model(str(tmp_path / "base"), "causal-lm", device="cpu")
    tokens = torch.arange(3, 13).view(2, 5)
    output = model(input_ids=tokens, labels=tokens)
    wanted_loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, wanted_loss)


def test_a_class_of_transformers_that_the_weights_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rewritten DBRX has the name of a class of transformers, whose modules are others."""
    own_code_models.dbrx(tmp_path / "base")
    monkeypatch.setattr(base_files, "_trusts", False)
    plain = models.load_model(str(tmp_path / "base"), "causal-lm", device="cpu")
    assert type(plain).__module__.startswith("transformers.models.dbrx")
    said = " ".join("".join(capsys.readouterr()).split())
    assert "lacks transformer.blocks.0" in said and "own code was not run" in said
    monkeypatch.setattr(base_files, "_trusts", True)
    model = models.load_model(str(tmp_path / "base"), "causal-lm", device="cpu")
    assert model.get_submodule("transformer.blocks.1.ffn.experts.mlp.3.w2").out_features == 32
    assert "lacks" not in "".join(capsys.readouterr())


def test_quantized(run: Run, own: Path, reviews: Path, tmp_path: Path) -> None:
    given = ("-m", own, "-d", reviews, "--eval-data", reviews, "-o", tmp_path / "run", "--steps", 1)
    run("train", *given, "--method", "qlora", "--set", "target_modules=up", "--trust-remote-code")
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    wanted = pytest.approx([found["before"]["loss"], found["after"]["loss"]], abs=1e-4)
    assert losses(run("eval", tmp_path / "run", "-d", reviews, "--trust-remote-code").output) == wanted


def test_plan(run: Run, own: Path, tmp_path: Path) -> None:
    method = ("--method", "lora", "--set", "target_modules=up,down", "--set", "r=4")
    output = run("plan", "-m", own, *method, "--trust-remote-code").output
    assert "768" in output  # 2 layers, 4 (32 + 64)
    assert "is not run by default" in " ".join(run("plan", "-m", own, *method, code=1).output.split())
    output = " ".join(run("plan", "-m", own, *method, "--task", "tags", "--trust-remote-code", code=1).output.split())
    assert f"--task tags needs a text model, found '{own}' (own). Pass another model" in output


def test_code_that_needs_weights_is_an_error(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_files, "_trusts", True)
    folder = written(tmp_path / "reads", llama, MODEL.replace("self.post_init()", "self.words.weight.tolist()"))
    with pytest.raises(PeftcoreError, match=r"the code of '.*/reads' cannot create a model on the meta device: "):
        models.empty_model(str(folder), "causal-lm")
