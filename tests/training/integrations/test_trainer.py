"""Trainer, unchanged: adapters in checkpoints, methods told of every step, checkpoints that were cut off."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import quantized, tiny
from support.releases import TORCH_2_9
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.generic import can_return_loss, find_labels

import peftcore
from peftcore.training.integrations.trainer import AfterStep, latest_checkpoint, mark_complete, restore_adapters


class Rows(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(3, 9) + index
        return {"input_ids": ids, "labels": ids}


def trainer(
    model: torch.nn.Module,
    folder: Path,
    eval_data: Any = None,
    metrics: Any = None,
    processing_class: Any = None,
    **changes: Any,
) -> Trainer:
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05}
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{**settings, **changes},
    )
    others = {"eval_dataset": eval_data, "compute_metrics": metrics, "processing_class": processing_class}
    return Trainer(model=model, args=arguments, train_dataset=Rows(), **others)


def values(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def test_trainers_of_older_releases_are_refused(toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcore.training.integrations.trainer.transformers.__version__", "5.19.0")
    trainer(tiny.llama(), tmp_path)
    with pytest.raises(peftcore.PeftcoreError, match=r"Trainer of transformers 5\.19\.0.* needs transformers 5\.20"):
        trainer(peftcore.apply(tiny.llama(), "around"), tmp_path)


def test_resume_is_exact_with_several_adapters(toys: None, tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        found = peftcore.apply(tiny.llama(), "around", value=1.5)
        peftcore.apply(found, "after", adapter="second", value=0.1)
        return peftcore.apply(found, "train", adapter="third", names=("model.norm.weight",))

    whole = model()
    trainer(whole, tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    files = {file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file()}
    assert {"adapter_model.safetensors", "second/adapter_model.safetensors", "third/adapter_config.json"} <= files
    assert "model.safetensors" not in files

    resumed = model()
    trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    pairs = list(zip(values(whole), values(resumed), strict=True))
    assert len(pairs) == 4 and all(torch.equal(a, b) for a, b in pairs)


class Plain(torch.nn.Module):
    """A model that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.embed(input_ids))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_model_that_is_not_of_transformers_resumes_exactly(tmp_path: Path) -> None:
    found = []
    for folder, resumed in (("whole", False), ("parts", True)):
        torch.manual_seed(0)
        model = peftcore.apply(Plain(), "lora", r=2, target_modules=["head"])
        run = trainer(model, tmp_path / folder)
        if resumed:
            (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resumed else None)
        found.append({name: t for name, t in model.state_dict().items() if "lora" in name})
    assert found[0].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    names = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


def test_the_best_model_is_loaded_at_the_end(toys: None, tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "around")
    best = trainer(model, tmp_path / "run")
    best.train()
    trained = values(model)
    best.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-2")
    best._load_best_model()
    restored = values(model)
    assert not torch.equal(trained[0], restored[0])
    restore_adapters(model, tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(trained, values(model), strict=True))


def test_methods_are_called_after_every_step_while_there_are_gradients(tmp_path: Path) -> None:
    told = []

    def after_step(adapters: Any, config: Any, step: int, total: int) -> None:
        told.append((step, total, all(adapter.gain.grad is not None for adapter in adapters.values())))

    with tiny.installed(tiny.method("watched", after_step=after_step)):
        trainer(peftcore.apply(tiny.llama(), "watched"), tmp_path, gradient_accumulation_steps=2).train()
        assert told == [(1, 4, True), (2, 4, True), (3, 4, True), (4, 4, True)]
        again = trainer(peftcore.apply(tiny.llama(), "watched"), tmp_path, gradient_accumulation_steps=2)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert told[4:] == [(3, 4, True), (4, 4, True)]


def test_a_step_that_a_scaler_skips_is_none(tmp_path: Path) -> None:
    """Its gradients are not finite: a mean of them that a method keeps would not be from then on."""
    told = []
    with tiny.installed(tiny.method("watched", after_step=lambda *call: told.append(call[2]))):
        found = trainer(peftcore.apply(tiny.llama(), "watched"), tmp_path)
        skips = type("", (), {"step_was_skipped": True})()
        for optimizer in (skips, None):
            AfterStep().on_optimizer_step(
                found.args, found.state, found.control, model=found.model, optimizer=optimizer
            )
    assert told == [1]


def test_methods_are_called_after_every_step_of_a_model_that_the_trainer_makes(tmp_path: Path) -> None:
    told = []
    with tiny.installed(tiny.method("watched", after_step=lambda *call: told.append(call[2:]))):
        settings = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(str(tmp_path), dataloader_pin_memory=False, **settings)
        made = Trainer(model_init=lambda: peftcore.apply(tiny.llama(), "watched"), args=arguments, train_dataset=Rows())
        made.train()
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("method", ["around", "after", "soft", "prefix", "train"])
@pytest.mark.parametrize("kind", [tiny.llama, tiny.llama_classifier, tiny.bert_classifier, tiny.t5])
def test_what_trainer_reads_of_a_model_stays(kind: Any, method: str, toys: None) -> None:
    """Names of labels and of arguments, by which it drops columns and counts tokens."""
    plain = kind()
    name = next(name for name, _ in plain.named_parameters() if "norm" in name.lower())
    fields = {"names": (name,)} if method == "train" else {}
    if method == "around":
        modules = {path.rpartition(".")[2] for path, _ in plain.named_modules()}
        fields["target_modules"] = sorted(modules & {"q_proj", "query", "q"})
    if method == "after" and not hasattr(getattr(plain, "model", None), "layers"):
        pytest.skip("the toy stands at a layer of Llama")
    found = peftcore.apply(kind(), method, **fields)
    for read in (find_labels, can_return_loss, lambda cls: cls.__name__):
        assert read(type(found)) == read(type(plain))
    assert inspect.signature(found.forward) == inspect.signature(plain.forward)
    assert found._get_name() == plain._get_name()


@pytest.mark.parametrize("how", ["rests", "frozen", "merged"])
def test_a_model_of_which_nothing_trains_is_refused(how: str, tmp_path: Path) -> None:
    """With gradient checkpointing a backward pass would find a gradient all the same: that of the input."""
    model = peftcore.apply(tiny.llama(), "lora", r=2)
    match how:
        case "rests":
            peftcore.activate(model, [])
        case "frozen":
            peftcore.engine.set_trainable(model, "default", False)
        case "merged":
            peftcore.merge(model, undo=True)
    with pytest.raises(peftcore.PeftcoreError, match="the model has no trainable parameters"):
        trainer(model, tmp_path).train()


def test_checkpoints_that_were_cut_off_are_skipped(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (1, 2, 10, 20):
        folder = tmp_path / f"checkpoint-{step}" / "inner"
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"12345")
        if step != 20:
            mark_complete(folder.parent)
    (tmp_path / "checkpoint-best").mkdir()
    assert json.loads((tmp_path / "checkpoint-1" / "complete.json").read_text()) == {"inner/file": 5}
    with pytest.warns(UserWarning, match=r"checkpoint-20' is incomplete .*complete.json is missing"):
        assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "inner" / "file").write_bytes(b"123")
    mark_complete(tmp_path / "checkpoint-20")
    (tmp_path / "checkpoint-20" / "inner" / "file").unlink()
    with pytest.warns(UserWarning, match=r"inner/file has [03] instead of 5 bytes") as warned:
        assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert len(warned) == 2
    for step in (10, 20):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-2" / "complete.json").write_text("null")
    (tmp_path / "checkpoint-3").mkdir()
    os.mkfifo(tmp_path / "checkpoint-3" / "complete.json")
    with pytest.warns(UserWarning, match=r"checkpoint-[23]' is incomplete .*complete.json is damaged"):
        assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_save_that_fails_leaves_no_complete_checkpoint(
    toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(peftcore.apply(tiny.llama(), "around"), tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.warns(UserWarning, match="is incomplete"):
        assert latest_checkpoint(tmp_path) is None


def test_it_goes_on_from_the_newest_whole_checkpoint(toys: None, tmp_path: Path) -> None:
    whole = peftcore.apply(tiny.llama(), "around", value=1.5)
    trainer(whole, tmp_path / "run").train()
    (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut off")
    resumed = peftcore.apply(tiny.llama(), "around", value=1.5)
    again = trainer(resumed, tmp_path / "run")
    with pytest.raises(peftcore.CheckpointError, match=r"checkpoint-4' is incomplete .*optimizer.pt has 7 instead of"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    with pytest.warns(UserWarning, match="checkpoint-4' is incomplete"):
        again.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(resumed), strict=True))
    nothing = trainer(peftcore.apply(tiny.llama(), "around"), tmp_path / "nothing")
    with pytest.raises(peftcore.CheckpointError, match="has no complete checkpoint"):
        nothing.train(resume_from_checkpoint=True)


def test_resume_is_exact_with_dropout_and_a_scheduler(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return peftcore.apply(tiny.llama(), "lora", r=2, lora_dropout=0.3)

    changes = {"lr_scheduler_type": "cosine", "warmup_steps": 1}
    whole, resumed = model(), model()
    first = trainer(whole, tmp_path, **changes)
    first.train()
    second = trainer(resumed, tmp_path, **changes)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(resumed), strict=True))
    states = [t.optimizer.state_dict()["state"] for t in (first, second)]
    assert all(torch.equal(states[0][i]["exp_avg_sq"], states[1][i]["exp_avg_sq"]) for i in states[0])


def test_the_best_of_a_run_is_loaded(toys: None, tmp_path: Path) -> None:
    from transformers import EvalPrediction

    losses = iter([3.0, 1.0, 2.0, 4.0])

    def metrics(_: EvalPrediction) -> dict[str, float]:
        return {"grade": next(losses)}

    model = peftcore.apply(tiny.llama(), "around", value=1.5)
    changes = {"load_best_model_at_end": True, "metric_for_best_model": "grade", "greater_is_better": False}
    changes |= {"eval_strategy": "steps", "eval_steps": 1}
    run = trainer(model, tmp_path, save_steps=1, save_total_limit=1, eval_data=Rows(), metrics=metrics, **changes)
    run.train()
    found = dict(peftcore.engine.adapter_parameters(model, "default"))
    best = peftcore.load(tiny.llama(), tmp_path / "checkpoint-2")
    assert all(torch.equal(found[name], p) for name, p in peftcore.engine.adapter_parameters(best, "default"))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_limit_of_checkpoints_counts_whole_ones(
    toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of one, a save that is cut off has not yet taken the one before."""
    run = trainer(peftcore.apply(tiny.llama(), "around"), tmp_path, save_total_limit=1)
    save = run._save_rng_state

    def killed(folder: str) -> None:
        if folder.endswith("-4"):
            raise KeyboardInterrupt
        save(folder)

    monkeypatch.setattr(run, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.warns(UserWarning, match="checkpoint-4' is incomplete"):
        assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


class FullDisk(TrainerCallback):
    """Makes writes to a file of the checkpoint of some steps fail: `/dev/full` has no space."""

    def __init__(self, name: str, steps: tuple[int, ...]) -> None:
        self.name, self.steps = name, steps

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            folder.mkdir()
            (folder / self.name).symlink_to("/dev/full")


small_file = pytest.mark.skipif(TORCH_2_9, reason="torch.save of PyTorch 2.9 ignores failed writes below 8 KB")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=small_file) for name in ("optimizer.pt", "scheduler.pt")),
        "trainer_state.json",
        ".complete.json.tmp",
    ],
)
def test_training_goes_on_when_the_disk_is_full_at_a_checkpoint(toys: None, tmp_path: Path, name: str) -> None:
    losses = iter([3.0, 1.0, 2.0, 4.0])
    changes = {"load_best_model_at_end": True, "metric_for_best_model": "grade", "greater_is_better": False}
    changes |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    model = peftcore.apply(tiny.llama(), "around", value=1.5)
    run = trainer(model, tmp_path, eval_data=Rows(), metrics=lambda _: {"grade": next(losses)}, **changes)
    run.add_callback(FullDisk(name, (2,)))
    with pytest.warns(UserWarning, match="checkpoint-2' was not written, because the disk seems to be full") as warned:
        run.train()
    assert sum("was not written" in str(warning.message) for warning in warned) == 1
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 3, 4)]
    # The best evaluation, at step 2, has no checkpoint: the best of the others is loaded.
    assert run.state.best_metric == 2.0 and run.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    best = peftcore.load(tiny.llama(), tmp_path / "checkpoint-3", trainable=True)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(best), strict=True))


def test_other_errors_at_a_checkpoint_end_training(toys: None, tmp_path: Path) -> None:
    run = trainer(peftcore.apply(tiny.llama(), "around"), tmp_path)
    (tmp_path / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "checkpoint-2" / "trainer_state.json").mkdir()
    with pytest.raises(IsADirectoryError):
        run.train()


def test_a_base_that_transformers_quantized_is_accepted(tmp_path: Path) -> None:
    """Trainer refuses one by itself: there are no adapters that it knows."""
    quantized.llama().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bitsandbytes
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
        with pytest.raises(ValueError, match="purely quantized"):
            trainer(base, tmp_path / "run")
        model = peftcore.apply(base, "lora", r=2)
        before = values(model)
        trainer(model, tmp_path / "run").train()
    assert not any(torch.equal(a, b) for a, b in zip(before[1::2], values(model)[1::2], strict=True))
    assert "_hf_peft_config_loaded" not in model.__dict__
    assert not (tmp_path / "run" / "checkpoint-4" / "model.safetensors").exists()


def test_the_model_card_needs_no_network(toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from huggingface_hub import ModelCard

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    model = peftcore.apply(tiny.llama(), "around")
    model.config._name_or_path = "org/base"
    run = trainer(model, tmp_path)
    for _ in range(2):
        run.create_model_card(model_name="mine", license="mit")
    card = ModelCard.load(tmp_path / "README.md").data
    assert (card.base_model, card.library_name, card.license) == ("org/base", "peftcore", "mit")
    assert {"peftcore", "around"} <= set(card.tags)


def test_a_card_that_is_edited_leaves_a_checkpoint_complete(toys: None, tmp_path: Path) -> None:
    model = peftcore.apply(tiny.llama(), "around")
    trainer(model, tmp_path).train()
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    (Path(checkpoint) / "README.md").write_text("# Mine\n")
    assert latest_checkpoint(tmp_path) == checkpoint


def test_a_tokenizer_is_saved_with_the_adapter(toys: None, tmp_path: Path) -> None:
    from support.commands import save_tokenizer
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    run = trainer(peftcore.apply(tiny.llama(), "around"), tmp_path / "run", processing_class=tokenizer)
    run.save_model(str(tmp_path / "saved"))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()
    peftcore.load(tiny.llama(), tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "kind"), [("paged_adamw_8bit", "PagedAdamW8bit"), ("paged_adamw_32bit", "PagedAdamW")]
)
def test_paged_optimizers_by_their_names(toys: None, tmp_path: Path, capsys: Any, name: str, kind: str) -> None:
    pytest.importorskip("peftcore._C")

    def run(folder: str, steps: int, resume: str | None = None, **changes: Any) -> tuple[Trainer, list[torch.Tensor]]:
        model = peftcore.apply(tiny.llama(), "around", value=1.5)
        chosen = trainer(model, tmp_path / folder, max_steps=steps, lr_scheduler_type="constant", **changes)
        chosen.train(resume_from_checkpoint=resume)
        return chosen, values(model)

    whole, wanted = run("whole", 4, optim=name, optim_args="budget=4096,page_bytes=4096,betas=(0.8,0.9)")
    optimizer = whole.optimizer.optimizer
    assert type(optimizer).__name__ == kind and optimizer.budget == 4096
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert "optimizer state: 0.0 MB resident, " in capsys.readouterr().out
    other = "budget=1MB,page_bytes=4096,betas=(0.8,0.9)"  # another budget, from the middle
    _, found = run("again", 4, str(tmp_path / "whole" / "checkpoint-2"), optim=name, optim_args=other)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
