"""TRL's trainers with `peftcore.reference_model`: the model as it was; what they would do wrong is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import quantized
from support.commands import WORDS, save_tokenizer
from support.mixtures import mixture
from support.quantized import logits, moved

import peftcore

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL calls what transformers has deprecated
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]
PATH = "/nowhere/base"  # what is loaded from here fails
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 0.05,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def model(
    method: Any = "lora", *, quantize: bool = False, loaded: bool = False, base: Any = None, **fields: Any
) -> torch.nn.Module:
    found = base or quantized.llama(eos_token_id=2)
    found.config._name_or_path = PATH
    if quantize:
        peftcore.quantize(found)
    torch.manual_seed(0)
    peftcore.apply(found, method, **({"r": 2} if method == "lora" else {}), **fields)
    return moved(found) if loaded else found


def rows(kind: str) -> Any:
    from datasets import Dataset

    prompts = [f"the film is {word} and" for word in WORDS[:8]]
    match kind:
        case "preference":
            made = [{"prompt": p, "chosen": " with heart", "rejected": " it was not fun"} for p in prompts]
        case "unpaired":
            made = [{"prompt": p, "completion": " with heart", "label": i % 2 == 0} for i, p in enumerate(prompts)]
        case "text":
            made = [{"text": p + " with heart"} for p in prompts]
        case _:
            made = [{"prompt": p} for p in prompts]
    return Dataset.from_list(made)


def longer(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trainer(name: str, found: torch.nn.Module, tokenizer: Any, folder: Path, **changes: Any) -> Any:
    """The trainer `name` of TRL on `found`; `changes` of its arguments, or of its settings."""
    import trl

    options = {key: changes.pop(key) for key in ("ref_model", "peft_config", "callbacks") if key in changes}
    module, settings, kind = trl, {}, "preference"
    match name:
        case "KTO":
            kind = "unpaired"
        case "SFT":
            kind, settings = "text", {"max_length": 16}
        case "GRPO" | "RLOO":
            kind, settings = "prompts", {"beta": 0.1, "num_generations": 2, "max_completion_length": 4}
            options["reward_funcs"] = longer
        case "OnlineDPO":
            import trl.experimental.online_dpo as module

            kind, settings = "prompts", {"max_new_tokens": 4, "max_length": 16}
            options["reward_funcs"] = longer
        case "ORPO":
            import trl.experimental.orpo as module

            settings = {"max_length": 16}
    arguments = getattr(module, f"{name}Config")(str(folder), **{**SETTINGS, **settings, **changes})
    arguments_of_trainer = {"args": arguments, "train_dataset": rows(kind), "processing_class": tokenizer}
    return getattr(module, f"{name}Trainer")(model=found, **arguments_of_trainer, **options)


def with_reference(name: str, found: torch.nn.Module, tokenizer: Any, folder: Path, **changes: Any) -> Any:
    """The trainer `name` on `found`, which it compares with what it is now; GRPO and RLOO take no `ref_model`."""
    reference = peftcore.reference_model(found)
    if name not in ("GRPO", "RLOO"):
        return trainer(name, found, tokenizer, folder, ref_model=reference, **changes)
    found.config._name_or_path = ""
    run = trainer(name, found, tokenizer, folder, **{"beta": 0.0, **changes})
    run.beta, run.ref_model = 0.1, reference
    return run


FIRST = {"DPO": ("loss", math.log(2)), "KTO": ("loss", 0.5), "GRPO": ("kl", 0), "RLOO": ("kl", 0)}
FIRST |= {"OnlineDPO": ("objective/kl", 0)}


@pytest.mark.parametrize(("quantize", "loaded"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", list(FIRST))
def test_the_reference_is_the_model_as_it_was(
    name: str, quantize: bool, loaded: bool, tokenizer: Any, tmp_path: Path
) -> None:
    found = model(quantize=quantize, loaded=loaded)
    before = logits(found)
    run = with_reference(name, found, tokenizer, tmp_path)
    run.train()
    key, expected = FIRST[name]
    assert run.state.log_history[0][key] == pytest.approx(expected, abs=1e-6)
    assert run.state.log_history[1][key] != pytest.approx(expected, abs=1e-6)
    after = logits(found)
    assert not torch.equal(after, before)
    torch.testing.assert_close(logits(run.ref_model), before)
    assert torch.equal(logits(found), after)


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("bitfit", {"add_missing": True}),
        ("prompt-tuning", {"num_virtual_tokens": 2}),
        ("prefix-tuning", {"num_virtual_tokens": 2}),
        ("adapter", {"dropout": 0.5}),
        ("lora", {"lora_dropout": 0.5}),
        ("lora", {"modules_to_save": ["lm_head"]}),
    ],
)
@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_other_methods(name: str, method: str, fields: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Dropout is off, as `disable_dropout` says."""
    found = model(method, loaded=True, **fields)
    before = logits(found)
    run = with_reference(name, found, tokenizer, tmp_path, disable_dropout=True)
    run.train()
    assert run.state.log_history[0][FIRST[name][0]] == pytest.approx(FIRST[name][1], abs=1e-6)
    torch.testing.assert_close(logits(run.ref_model), before)


@pytest.mark.parametrize("quantize", [False, True])
def test_experts(quantize: bool, tokenizer: Any, tmp_path: Path) -> None:
    found = mixture("qwen3_moe")
    found = peftcore.apply(peftcore.quantize(found) if quantize else found, "lora", r=4)
    before = logits(found)
    run = with_reference("DPO", found, tokenizer, tmp_path)
    run.train()
    first, second, *_ = run.state.log_history
    # Layers with adapters that add 0 use other kernels than layers without: log-probabilities near 24 differ by units
    # in the last place (1.9e-6), of which a margin is 0.1 (beta). A step of training changes it by 1.
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5) != second["rewards/margins"]
    assert first["loss"] == pytest.approx(math.log(2) + 0.001 * first["aux_loss"], abs=1e-5)  # which balances experts
    assert not torch.equal(logits(found), before)
    torch.testing.assert_close(logits(run.ref_model), before)


def test_two_active_adapters(tokenizer: Any, tmp_path: Path) -> None:
    found = model(loaded=True)
    peftcore.engine.set_trainable(found, "default", False)
    moved(peftcore.apply(found, "lora", adapter="second", r=2))
    before = logits(found)
    run = with_reference("DPO", found, tokenizer, tmp_path)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(logits(run.ref_model), before)
    with peftcore.disabled(found), pytest.raises(peftcore.PeftcoreError, match="cannot use the reference inside"):
        run.evaluate(rows("preference"))


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", ["SFT", "Reward", "ORPO"])
def test_trainers_without_a_reference(name: str, quantize: bool, tokenizer: Any, tmp_path: Path) -> None:
    """They keep none, and only the adapter and a new head train."""
    base = None
    if name == "Reward":
        from transformers import LlamaForSequenceClassification

        base = LlamaForSequenceClassification(quantized.llama(eos_token_id=2, num_labels=1).config)
    found = model(base=base, quantize=quantize)
    before = {name: p.detach().clone() for name, p in found.named_parameters()}
    run = trainer(name, found, tokenizer, tmp_path)
    run.train()
    changed = {n for n, p in found.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in n or n == "score.weight" for n in changed)
    assert ("score.weight" in changed) == (name == "Reward")


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": True}, {"use_reentrant": False}, None])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_changes_nothing(checkpointing: Any, tokenizer: Any, tmp_path: Path) -> None:
    def trained(**changes: Any) -> list[torch.Tensor]:
        found = model(loaded=True)
        with_reference("DPO", found, tokenizer, tmp_path, **changes).train()
        return [p for p in found.parameters() if p.requires_grad]

    changes = {"gradient_checkpointing": checkpointing is not None, "gradient_checkpointing_kwargs": checkpointing}
    for a, b in zip(trained(**changes), trained(gradient_checkpointing=False), strict=True):
        torch.testing.assert_close(a, b)


def test_a_resumed_run_compares_with_what_the_first_began_with(tokenizer: Any, tmp_path: Path) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = model(loaded=True), model(loaded=True)
    with_reference("DPO", whole, tokenizer, tmp_path / "run", **changes).train()
    again = with_reference("DPO", resumed, tokenizer, tmp_path / "again", **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_log_probabilities_that_are_computed_beforehand(name: str, tokenizer: Any, tmp_path: Path) -> None:
    def history(**changes: Any) -> list[float]:
        run = with_reference(name, model(loaded=True), tokenizer, tmp_path, **changes)
        run.train()
        return [row["loss"] for row in run.state.log_history if "loss" in row]

    assert history(precompute_ref_log_probs=True) == pytest.approx(history(), abs=1e-5)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
def test_a_second_base_is_refused(name: str, tokenizer: Any, tmp_path: Path) -> None:
    quantized.llama(eos_token_id=2).save_pretrained(tmp_path / "base")
    found = model()
    found.config._name_or_path = str(tmp_path / "base")
    run = trainer(name, found, tokenizer, tmp_path / "run")
    match = rf"trainer.ref_model of {name}Trainer is a second copy of .* Pass ref_model=peftcore.reference_model"
    with pytest.raises(peftcore.PeftcoreError, match=match):
        run.train()
    run.ref_model = peftcore.reference_model(found)
    run.train()
    assert run.state.log_history[0][FIRST[name][0]] == pytest.approx(FIRST[name][1], abs=1e-6)


def test_another_model_as_reference_is_taken(tokenizer: Any, tmp_path: Path) -> None:
    run = trainer("DPO", model(), tokenizer, tmp_path, ref_model=quantized.llama(seed=1))
    run.train()
    assert run.state.log_history[0]["loss"] != pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_an_adapter_that_the_fused_head_would_leave_out(name: str, tokenizer: Any, tmp_path: Path) -> None:
    from trl.trainer import utils

    make = trainer if name == "SFT" else with_reference
    adapted = model(target_modules=["q_proj", "lm_head"])
    run = make(name, adapted, tokenizer, tmp_path)
    if name != "SFT" and not hasattr(utils, "add_fused_lm_head"):  # TRL 1.14 calls the head
        run.train()
        assert adapted.get_parameter("lm_head.peftcore.default.lora_B").any()
        return
    with pytest.raises(peftcore.PeftcoreError, match="adapter would neither be used nor trained"):
        run.train()


def test_arguments_and_callbacks_that_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig
    from trl import SFTTrainer
    from trl.trainer.callbacks import BEMACallback, SyncRefModelCallback

    for name in ("SFT", "DPO", "KTO", "GRPO", "RLOO"):
        with pytest.raises(peftcore.PeftcoreError, match="PEFT cannot adapt LlamaForCausalLM"):
            trainer(name, model(), tokenizer, tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"))
    for name in ("DPO", "KTO", "GRPO", "RLOO"):
        with pytest.raises(peftcore.PeftcoreError, match="sync_ref_model=True updates"):
            with_reference(name, model(), tokenizer, tmp_path, sync_ref_model=True)
    for name in ("GRPO", "RLOO"):
        with pytest.raises(peftcore.PeftcoreError, match="vLLM would generate with the base alone"):
            with_reference(name, model(), tokenizer, tmp_path, use_vllm=True)
    run = with_reference("DPO", model(), tokenizer, tmp_path)
    run.add_callback(SyncRefModelCallback(run.ref_model, run.accelerator))
    with pytest.raises(peftcore.PeftcoreError, match="SyncRefModelCallback writes averages"):
        run.train()
    run = trainer("SFT", model(), tokenizer, tmp_path, callbacks=[BEMACallback()])
    with pytest.raises(peftcore.PeftcoreError, match="BEMACallback averages weights into a second model"):
        run.train()
    assert type(trainer("SFT", quantized.llama(), tokenizer, tmp_path)) is SFTTrainer  # nothing is refused or mixed in


def test_a_config_of_peft_is_applied_beforehand(tokenizer: Any, tmp_path: Path) -> None:
    import peft

    found = model(peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    run = trainer("SFT", found, tokenizer, tmp_path)
    run.train()
    run.save_model(tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(quantized.llama(eos_token_id=2), tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**quantized.INPUTS).logits, found.eval()(**quantized.INPUTS).logits)
    assert theirs.peft_config["default"].target_modules == {"q_proj", "v_proj"}
