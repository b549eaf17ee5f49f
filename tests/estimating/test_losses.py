"""Predicted steps of TRL's trainers, with the passes of their references, compared with real ones."""

from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peftcore_cli.tasks import pairs
from peftcore_cli.tasks.registered import find
from support.step_memory import allocated_by, allocated_with, predicted, real
from support.whole_run import nightly_but
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast, TrainingArguments

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.estimating import Step
from peftcore.estimating.losses import VECTORS

pytest.importorskip("trl", minversion="1.16")  # whose releases need Python 3.11
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that TRL has of transformers

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=3, vocab_size=320, pad_token_id=0, eos_token_id=2)
RUN = {"batch_size": 3, "length": 40}
TOKENS = list(range(3, 23))
PAIR = {"prompt_ids": TOKENS, "chosen_ids": TOKENS, "rejected_ids": TOKENS[::-1]}
ROWS: dict[str, dict[str, Any]] = {
    "sft": {"input_ids": TOKENS * 2, "completion_mask": [0] * 20 + [1] * 20},
    "dpo": PAIR,
    "kto": {"prompt_ids": TOKENS, "completion_ids": TOKENS, "KL_completion_ids": TOKENS[::-1], "label": True},
}


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{n}": n for n in range(320)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w1")), pad_token="w0", eos_token="w2")


def trainer(name: str, model: torch.nn.Module, folder: Path, watch: Any, **changes: Any) -> Any:
    import trl
    from datasets import Dataset

    settings = {"max_steps": 3, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    settings |= {"per_device_train_batch_size": 3, "dataloader_pin_memory": False, "remove_unused_columns": False}
    settings |= {"max_length": None, "bf16": False, **changes}
    known = {field.name for field in fields(TrainingArguments)}
    settings[next(each for each in ("activation_checkpointing", "gradient_checkpointing") if each in known)] = False
    kind, config = getattr(trl, f"{name.upper()}Trainer"), getattr(trl, f"{name.upper()}Config")

    class OfTokens(kind):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    reference = {"ref_model": peftcore.reference_model(model)} if name in ("dpo", "kto") else {}
    rows = Dataset.from_list([ROWS[name]] * 9)
    return OfTokens(
        model,
        args=config(str(folder), **settings),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=[watch],
        **reference,
    )


@pytest.mark.parametrize("name", nightly_but(ROWS, ("sft",)))
def test_is_what_a_step_of_the_trainer_takes(name: str, tmp_path: Path) -> None:
    step = Step(**RUN, loss=name)
    found = peftcore.estimate(CONFIG, "lora", step=step)
    model = real(CONFIG, "lora", step)
    most = allocated_by(lambda watch: trainer(name, model, tmp_path, watch))
    assert predicted(found) == pytest.approx(most, rel=0.03)


def test_mixed_precision_and_checkpointing_of_dpo(tmp_path: Path) -> None:
    step = Step(**RUN, loss="dpo", mixed_precision="bf16", gradient_checkpointing=True)
    found = peftcore.estimate(CONFIG, "lora", step=step)
    model = real(CONFIG, "lora", step)
    most = allocated_by(lambda watch: trainer("dpo", model, tmp_path, watch, bf16=True))
    assert predicted(found) == pytest.approx(most, rel=0.03)


@pytest.mark.parametrize("name", ["pairs", "triplets"])
@pytest.mark.parametrize("kind", ["BertModel", "LlamaModel"])
def test_is_what_a_step_on_texts_as_vectors_takes(kind: str, name: str) -> None:
    configs = {"BertModel": BertConfig(**{**SIZES, "num_key_value_heads": 4}, vocab_size=320), "LlamaModel": CONFIG}
    config = deepcopy(configs[kind])
    config.architectures = [kind]
    found = peftcore.estimate(config, "lora", **RUN, loss=name, fused=True)
    assert f"batch 3 x 40, {name}, fused" in found.title
    model = getattr(transformers, kind)(config).train()
    peftcore.fuse(peftcore.apply(model, "lora"))
    texts = [[list(range(3, 43 - i - text)) for text in range(VECTORS[name])] for i in range(3)]
    batch = find("pairs").collate([{"texts": each, "labels": None} for each in texts], tokenizer())

    def loss() -> torch.Tensor:
        return pairs.loss(pairs.compute_embeddings(model, batch, "mean"), batch["labels"], batch["same"])

    assert predicted(found) == pytest.approx(allocated_with(model, loss), rel=5e-3)


def test_vectors_come_from_a_model_without_a_head() -> None:
    with pytest.raises(
        PeftcoreError, match="LlamaForCausalLM returns no last_hidden_state, so there are no embeddings"
    ):
        peftcore.estimate(CONFIG, "lora", **RUN, loss="pairs")


def test_without_adapters_there_is_a_second_model() -> None:
    dpo, sft = (peftcore.estimate(CONFIG, None, **RUN, loss=name) for name in ("dpo", "sft"))
    assert dpo.parts["base"] == 2 * sft.parts["base"]
    assert peftcore.estimate(CONFIG, "lora", **RUN, loss="dpo").parts["base"] == sft.parts["base"]


def test_on_a_card_tiles_of_logits_have_nothing_beside_them() -> None:
    wide = LlamaConfig(**SIZES, num_hidden_layers=3, vocab_size=9000)
    here, there = (peftcore.estimate(wide, "lora", **RUN, loss="dpo", device=device) for device in ("cpu", "t4"))
    tile = 2 * RUN["batch_size"] * (RUN["length"] - 1) * 32768 * 4  # of 32,768 words at once, in fp32
    assert tile < predicted(there) < 1.2 * tile < 2.5 * tile < predicted(here)


def test_what_has_no_such_loss() -> None:
    classifier = BertConfig(**{**SIZES, "num_key_value_heads": 4}, architectures=["BertForSequenceClassification"])
    with pytest.raises(
        PeftcoreError, match="loss='dpo' needs a language model with an output head, which BertForSequenceClass"
    ):
        peftcore.estimate(classifier, "lora", **RUN, loss="dpo")
