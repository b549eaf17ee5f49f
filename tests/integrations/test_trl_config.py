"""TRL's trainers with a model's path and `peft_config=` of peftcore, as TRL's documentation writes them for PEFT."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import quantized
import torch
from commands import WORDS, save_tokenizer

import peftcore

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL calls what transformers has deprecated
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]
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
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    quantized.llama(eos_token_id=2).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def rows(kind: str) -> Any:
    from datasets import Dataset

    prompts = [f"the film is {word} and" for word in WORDS[:8]]
    made: dict[str, Any] = {
        "preference": [{"prompt": p, "chosen": " with heart", "rejected": " it was not fun"} for p in prompts],
        "unpaired": [{"prompt": p, "completion": " heart", "label": i % 2 == 0} for i, p in enumerate(prompts)],
        "text": [{"text": p + " with heart"} for p in prompts],
        "prompts": [{"prompt": p} for p in prompts],
    }
    return Dataset.from_list(made[kind])


def longer(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trainer(name: str, model: Any, folder: Path, config: Any = None, **changes: Any) -> Any:
    """The trainer `name` of TRL, with a tokenizer that it loads from the model's folder."""
    import trl

    module, settings, kind, options = trl, {}, "preference", {}
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
        case "CPO":
            import trl.experimental.cpo as module

            settings = {"max_length": 16}
    arguments = getattr(module, f"{name}Config")(str(folder), **{**SETTINGS, **settings, **changes})
    options |= {} if config is None else {"peft_config": config}
    if name == "OnlineDPO":
        from transformers import AutoTokenizer

        options["processing_class"] = AutoTokenizer.from_pretrained(model)
    return getattr(module, f"{name}Trainer")(model=model, args=arguments, train_dataset=rows(kind), **options)


FIRST = {"DPO": ("loss", math.log(2)), "KTO": ("loss", 0.5), "GRPO": ("kl", 0), "RLOO": ("kl", 0)}
FIRST |= {"OnlineDPO": ("objective/kl", 0)}


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward", "ORPO", "CPO", "OnlineDPO"])
def test_a_path_and_a_config(name: str, base: Path, tmp_path: Path) -> None:
    """Only the adapter trains (and a new head); the reference is the base; what is saved is an adapter."""
    run = trainer(name, str(base), tmp_path, peftcore.config("lora", r=2))
    model = run.model
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    run.train()
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed and all("lora_" in key or key == "score.weight" for key in changed)
    assert peftcore.summary(model).adapters[0].method == "lora"
    if name in FIRST:
        key, wanted = FIRST[name]
        assert run.state.log_history[0][key] == pytest.approx(wanted, abs=1e-6)
        assert run.state.log_history[1][key] != pytest.approx(wanted, abs=1e-6)
        held = {id(p) for p in model.parameters()}
        assert all(id(p) in held for p in run.ref_model.parameters())  # no second model in memory
    run.save_model(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names and "model.safetensors" not in names


@pytest.mark.parametrize("as_path", [True, False])
def test_the_same_training_as_with_apply(as_path: bool, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, set_seed

    def loaded() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    run = trainer("SFT", str(base) if as_path else loaded(), tmp_path, peftcore.config("lora", r=2))
    set_seed(run.args.seed)
    model = peftcore.apply(loaded(), "lora", r=2)
    ours = trainer("SFT", model, tmp_path)
    for each in (run, ours):
        each.train()
    assert [row["loss"] for row in run.state.log_history[:2]] == [row["loss"] for row in ours.state.log_history[:2]]
    pairs = zip(run.model.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_resume(name: str, base: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def run() -> Any:
        return trainer(name, str(base), tmp_path, peftcore.config("lora", r=2), **changes)

    whole, resumed = run(), run()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(resumed.state.log_history) >= 2


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_log_probabilities_that_are_computed_beforehand(name: str, base: Path, tmp_path: Path) -> None:
    def history(**changes: Any) -> list[float]:
        run = trainer(name, str(base), tmp_path, peftcore.config("lora", r=2), **changes)
        run.train()
        return [row["loss"] for row in run.state.log_history if "loss" in row]

    assert history(precompute_ref_log_probs=True) == pytest.approx(history(), abs=1e-5)


def test_tokens_that_a_chat_template_adds_are_trained(base: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    other = AutoTokenizer.from_pretrained(base)
    other.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    other.chat_template = "{% for m in messages %}<turn> {{ m['content'] }} </s>{% endfor %}"
    other.save_pretrained(tmp_path / "template")
    turn = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "is good"}]
    arguments = SFTConfig(str(tmp_path), chat_template_path=str(tmp_path / "template"), max_length=16, **SETTINGS)

    def run(config: Any) -> Any:
        data = Dataset.from_list([{"messages": turn}] * 4)
        return SFTTrainer(model=str(base), args=arguments, train_dataset=data, peft_config=config)

    config = peftcore.config("lora", r=2)
    model = run(config).model
    applied = peftcore.engine.applied(model, "default").config
    added = applied.trainable_token_indices["embed_tokens"]
    assert added and all(index >= 19 for index in added)
    assert applied.modules_to_save == ["lm_head"] and config == peftcore.config("lora", r=2)
    with pytest.raises(
        peftcore.PeftcoreError, match=r"the method needs \['trainable_token_indices'\] to train, but Vera"
    ):
        run(peftcore.config("vera", r=2))


def test_a_trainer_that_does_not_apply_the_config(base: Path, tmp_path: Path) -> None:
    from trl import SFTTrainer

    class Own(SFTTrainer):
        def __init__(self, *args: Any, peft_config: Any = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    from trl import SFTConfig

    with pytest.raises(peftcore.PeftcoreError, match=r"Own did not apply peft_config, a LoraConfig of peftcore"):
        Own(
            str(base),
            SFTConfig(str(tmp_path), **SETTINGS),
            train_dataset=rows("text"),
            peft_config=peftcore.config("lora"),
        )


def test_a_model_that_has_adapters(base: Path, tmp_path: Path) -> None:
    model = peftcore.apply(quantized.llama(eos_token_id=2), "lora", r=2)
    with pytest.raises(peftcore.PeftcoreError, match=r"peft_config=... would wrap a model that already has adapters"):
        trainer("SFT", model, tmp_path, peftcore.config("lora", r=2))
    with pytest.raises(peftcore.PeftcoreError, match=r"vLLM would get the base's weights"):
        trainer("GRPO", str(base), tmp_path, peftcore.config("lora", r=2), use_vllm=True)


def test_configs_of_peft_stay_pefts(base: Path, tmp_path: Path) -> None:
    import peft

    run = trainer("SFT", str(base), tmp_path, peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert isinstance(run.model, peft.PeftModel)
    names = vars(sys.modules["trl.trainer.sft_trainer"])
    assert names["PeftConfig"] is peft.PeftConfig and names["get_peft_model"] is peft.get_peft_model


WITHOUT = """
import sys
sys.modules["peft"] = None
sys.path[:0] = sys.argv[1].split(":")
from pathlib import Path
{order}
import test_trl_config as here
for name in {names}:
    run = here.trainer(name, sys.argv[2], Path(sys.argv[3]), peftcore.config("lora", r=2))
    run.train()
    run.save_model(sys.argv[3] + "/" + name)
    print(name, sorted(path.name for path in (Path(sys.argv[3]) / name).glob("*.safetensors")))
"""
ORDERS = ["import peftcore, trl", "import trl, transformers.trainer, trl.trainer.sft_trainer, peftcore"]


@pytest.mark.parametrize("order", [pytest.param(ORDERS[0], marks=pytest.mark.nightly), ORDERS[1]])
def test_where_peft_is_not_installed(order: str, base: Path, tmp_path: Path) -> None:
    names = ["SFT", "DPO", "GRPO"] if order == ORDERS[0] else ["SFT"]
    code = WITHOUT.format(order=order, names=names)
    here = Path(__file__).parent
    done = fresh_process.run(code, f"{here}:{here.parent}", str(base), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    written = [line for line in done.stdout.splitlines() if line.endswith(".safetensors']")]
    assert written == [f"{name} ['adapter_model.safetensors']" for name in names]
