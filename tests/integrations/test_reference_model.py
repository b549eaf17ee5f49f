"""TRL's trainers with a reference model, unchanged: it is the model as it was, and no second one is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from commands import WORDS, save_tokenizer
from mixtures import mixture
from quantized import logits, moved

import peftcore
from peftcore.integrations.reference_model import reference_of, refuse_wrapped

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
        case "A2PO":
            import trl.experimental.a2po as module

            kind, settings = "prompts", {"max_completion_length": 4}
            options["reward_funcs"] = longer
    arguments = getattr(module, f"{name}Config")(str(folder), **{**SETTINGS, **settings, **changes})
    return getattr(module, f"{name}Trainer")(
        model=found, args=arguments, train_dataset=rows(kind), processing_class=tokenizer, **options
    )


FIRST = {"DPO": ("loss", math.log(2)), "KTO": ("loss", 0.5), "GRPO": ("kl", 0), "RLOO": ("kl", 0)}
FIRST |= {"OnlineDPO": ("objective/kl", 0), "A2PO": ("loss", None)}


@pytest.mark.parametrize(("quantize", "loaded"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", list(FIRST))
def test_the_reference_is_the_model_as_it_was(
    name: str, quantize: bool, loaded: bool, tokenizer: Any, tmp_path: Path
) -> None:
    if name == "A2PO" and not loaded:
        pytest.skip("slow, and as the others")
    found = model(quantize=quantize, loaded=loaded)
    before = logits(found)
    run = trainer(name, found, tokenizer, tmp_path)
    run.train()
    key, wanted = FIRST[name]
    if wanted is not None:
        assert run.state.log_history[0][key] == pytest.approx(wanted, abs=1e-6)
        assert run.state.log_history[1][key] != pytest.approx(wanted, abs=1e-6)
    after = logits(found)
    assert not torch.equal(after, before)
    torch.testing.assert_close(logits(run.ref_model), before)
    assert torch.equal(logits(found), after)
    held = {id(p) for p in found.parameters()}
    assert all(id(p) in held for p in run.ref_model.parameters())  # no second model in memory


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
    run = trainer(name, found, tokenizer, tmp_path, disable_dropout=True)
    run.train()
    assert run.state.log_history[0][FIRST[name][0]] == pytest.approx(FIRST[name][1], abs=1e-6)
    torch.testing.assert_close(logits(run.ref_model), before)


@pytest.mark.parametrize("quantize", [False, True])
def test_experts(quantize: bool, tokenizer: Any, tmp_path: Path) -> None:
    found = mixture("qwen3_moe")
    found = peftcore.apply(peftcore.quantize(found) if quantize else found, "lora", r=4)
    before = logits(found)
    run = trainer("DPO", found, tokenizer, tmp_path)
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
    run = trainer("DPO", found, tokenizer, tmp_path)
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
    assert reference_of(run) is None
    changed = {n for n, p in found.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in n or n == "score.weight" for n in changed)
    assert ("score.weight" in changed) == (name == "Reward")


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": True}, {"use_reentrant": False}, None])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_changes_nothing(checkpointing: Any, tokenizer: Any, tmp_path: Path) -> None:
    def trained(**changes: Any) -> list[torch.Tensor]:
        found = model(loaded=True)
        trainer("DPO", found, tokenizer, tmp_path, **changes).train()
        return [p for p in found.parameters() if p.requires_grad]

    changes = {"gradient_checkpointing": checkpointing is not None, "gradient_checkpointing_kwargs": checkpointing}
    for a, b in zip(trained(**changes), trained(gradient_checkpointing=False), strict=True):
        torch.testing.assert_close(a, b)


def test_a_resumed_run_compares_with_what_the_first_began_with(tokenizer: Any, tmp_path: Path) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = model(loaded=True)
    trainer("DPO", whole, tokenizer, tmp_path / "run", **changes).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    base = quantized.llama(eos_token_id=2)
    base.config._name_or_path = PATH
    resumed = peftcore.load(base, checkpoint)  # no more what the run began with
    again = trainer("DPO", resumed, tokenizer, tmp_path / "again", **changes)
    again.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))

    early = trainer("DPO", model(loaded=False), tokenizer, tmp_path, precompute_ref_log_probs=True, **changes)
    with pytest.raises(peftcore.CheckpointError, match="were precomputed with other adapters"):
        early.train(resume_from_checkpoint=checkpoint)
    (Path(checkpoint) / "reference.safetensors").unlink()
    (Path(checkpoint) / "complete.json").write_text("{}")
    with pytest.raises(peftcore.CheckpointError, match="has no reference model"):
        again.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_log_probabilities_that_are_computed_beforehand(name: str, tokenizer: Any, tmp_path: Path) -> None:
    def history(**changes: Any) -> list[float]:
        run = trainer(name, model(loaded=True), tokenizer, tmp_path, **changes)
        run.train()
        return [row["loss"] for row in run.state.log_history if "loss" in row]

    assert history(precompute_ref_log_probs=True) == pytest.approx(history(), abs=1e-5)


def test_an_explicit_reference_is_taken(tokenizer: Any, tmp_path: Path) -> None:
    other = quantized.llama(seed=1)
    run = trainer("DPO", model(), tokenizer, tmp_path, ref_model=other)
    assert run.ref_model is other
    run.train()
    assert run.state.log_history[0]["loss"] != pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_an_adapter_that_the_fused_head_would_leave_out(name: str, tokenizer: Any, tmp_path: Path) -> None:
    found = model(target_modules=["q_proj", "lm_head"])
    with pytest.raises(peftcore.PeftcoreError, match="adapter would neither be used nor trained"):
        trainer(name, found, tokenizer, tmp_path)


def test_what_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from trl import SFTTrainer
    from trl.trainer.callbacks import BEMACallback, SyncRefModelCallback

    def refused(name: str, match: str, **changes: Any) -> None:
        with pytest.raises(peftcore.PeftcoreError, match=match):
            trainer(name, model(), tokenizer, tmp_path, **changes)

    for name in ("SFT", "DPO", "KTO", "GRPO", "RLOO"):
        refused(name, "peft_config=... would wrap", peft_config=object())
    for name in ("DPO", "KTO", "GRPO", "RLOO"):
        refused(name, "sync_ref_model=True moves", sync_ref_model=True)
    for name in ("GRPO", "RLOO"):
        refused(name, "vLLM would get the base's weights", use_vllm=True)
    moves = SyncRefModelCallback(quantized.llama(), None)
    refused("DPO", "SyncRefModelCallback writes averages", callbacks=[moves])
    refused("SFT", "BEMACallback averages into a second model", callbacks=[BEMACallback()])
    late = trainer("DPO", model(), tokenizer, tmp_path)  # the callback would shrink the weights of the base
    late.add_callback(SyncRefModelCallback(late.ref_model, late.accelerator))
    with pytest.raises(peftcore.PeftcoreError, match="SyncRefModelCallback writes averages"):
        late.train()
    plain = quantized.llama()  # without adapters nothing is refused
    assert isinstance(trainer("SFT", plain, tokenizer, tmp_path), SFTTrainer)


def test_a_config_of_peft_is_applied_beforehand(tokenizer: Any, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM")
    found = model(config)
    with pytest.raises(peftcore.PeftcoreError, match=r"peft_config=... would wrap a model that already has adapters"):
        trainer("SFT", found, tokenizer, tmp_path, peft_config=config)
    running = trainer("SFT", found, tokenizer, tmp_path)
    running.train()
    running.save_model(tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(quantized.llama(eos_token_id=2), tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**quantized.INPUTS).logits, found.eval()(**quantized.INPUTS).logits)
    assert theirs.peft_config["default"].target_modules == {"q_proj", "v_proj"}


def test_a_trainer_that_loads_a_reference_in_its_own_way(tokenizer: Any, tmp_path: Path) -> None:
    from trl import SFTTrainer

    class Own(SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.anchor = quantized.llama()
            self.anchor.config._name_or_path = PATH

    from trl import SFTConfig

    with pytest.raises(peftcore.PeftcoreError, match=r"Own loaded '/nowhere/base' again \(trainer.anchor\)"):
        Own(model(), SFTConfig(str(tmp_path), **SETTINGS), train_dataset=rows("text"), processing_class=tokenizer)


def test_a_subclass_that_passes_its_arguments_on(tokenizer: Any, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    class Own(DPOTrainer):
        def __init__(self, model: Any, folder: Path) -> None:
            arguments = DPOConfig(str(folder), **SETTINGS)
            super().__init__(model=model, args=arguments, train_dataset=rows("preference"), processing_class=tokenizer)

    run = Own(model(loaded=True), tmp_path)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_adapters_keep_their_dtype_beside_a_base_of_bitsandbytes(tokenizer: Any, tmp_path: Path) -> None:
    """TRL rounds what trains beside a model that says `is_loaded_in_4bit`."""
    found = model(loaded=True)
    found.is_loaded_in_4bit = True
    before = {name: p.detach().clone() for name, p in found.named_parameters()}
    run = trainer("DPO", found, tokenizer, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in found.named_parameters())
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_parts_of_the_reference_are_of_the_reference(tokenizer: Any, tmp_path: Path) -> None:
    """Other versions of TRL call the backbone, and multiply by the head themselves."""
    found = model(loaded=True, modules_to_save=["lm_head"])
    before = found.model(**quantized.INPUTS).last_hidden_state.detach()
    reference = trainer("DPO", found, tokenizer, tmp_path).ref_model
    moved(found)
    for backbone in (reference.model, reference.base_model, reference.get_decoder()):
        torch.testing.assert_close(backbone(**quantized.INPUTS).last_hidden_state, before)
    with pytest.raises(peftcore.PeftcoreError, match="'weight' of the reference is read outside its forward"):
        _ = reference.get_output_embeddings().weight
    found.train()
    assert not reference.eval().requires_grad_(False).train().training or found.training
    assert all(p.requires_grad for n, p in found.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_what_spreads_models_itself_is_refused(engine: str, tokenizer: Any, tmp_path: Path) -> None:
    run = trainer("DPO", model(), tokenizer, tmp_path)
    refuse_wrapped(run)
    setattr(run, f"is_{engine}_enabled", True)
    with pytest.raises(peftcore.PeftcoreError, match=rf"separately \({engine}\), although .*Shard the model first"):
        refuse_wrapped(run)
