"""Reinforcement learning with a user-defined reward function (`--task grpo --reward FILE.py:FUNCTION`).

The model is trained with TRL's GRPOTrainer (Shao et al. 2024, arXiv 2402.03300). As in TRL, the function takes
`prompts`, `completions`, `completion_ids` and the other columns as keyword arguments, and returns a number for each
answer. Held-out prompts are answered greedily. The reported loss is the negative mean reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.plugin import has_adapters
from peftcore_cli.console import require
from peftcore_cli.data import mixture, turns
from peftcore_cli.data.labels import text_of
from peftcore_cli.data.row import Row
from peftcore_cli.settings import RunOptions, Settings
from peftcore_cli.tasks import conversations, generations
from peftcore_cli.tasks.encoded_examples import Encoded, Example
from peftcore_cli.tasks.judged import Judged
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Evaluation

if TYPE_CHECKING:
    from peftcore_cli.bases.adapter_folders import AdapterTask
    from peftcore_cli.training.trainers import Measuring

_IDS = "prompt_ids"  # column that reward functions do not see


class GRPO(Judged):
    """Prompts to answer, and a function that scores the answers."""

    name = "grpo"
    keys = (("prompt",),)
    shown_keys = "prompt"
    columns_example = "prompt=question"
    trl_name = "GRPO"
    family = "writers"
    options = ("generations", "temperature", "reward")
    least_beta = 0.0
    counts_tokens = False
    fixed_ranks = True
    figures = ("reward",)
    unpredicted = "the memory for sampling answers is unknown"

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        """Return a prompt to answer, with the other fields of its line."""
        columns = {name: value for name, value in fields.items() if name != "prompt"}
        if columns.get("tools"):
            raise PeftcoreError(f"{location}: --task grpo does not support tools. Remove 'tools'")
        if isinstance(fields["prompt"], list):
            messages = turns.without_marks(turns.messages_of(location, "prompt", fields["prompt"]))
            if messages[-1]["role"] == "assistant":
                raise PeftcoreError(f"{location}: 'prompt' must end with a turn to answer, found an assistant turn")
            return Row(location, "", messages=messages, columns=columns)
        return Row(location, text_of(location, "prompt", fields["prompt"]), columns=columns)

    def check_options(self, run_options: RunOptions, data: Sequence[str], *, continues: bool) -> None:
        require("trl", extra="dpo")
        if run_options.reward is None:
            raise PeftcoreError("--task grpo needs a function that scores answers. Pass --reward FILE.py:FUNCTION")
        size = run_options.batch_size * run_options.grad_accum
        if size % run_options.generations:
            raise PeftcoreError(
                "--batch-size times --grad-accum counts answers in --task grpo, so it must be a multiple of "
                f"--generations {run_options.generations}, found {size}. Use --batch-size {run_options.generations}"
            )
        if run_options.temperature <= 0:
            raise PeftcoreError(f"--temperature must be above 0 to sample answers, found {run_options.temperature:g}")
        weighted_path = next((path for path in data if mixture.parse(path).weight != 1), None)
        if weighted_path is not None:
            raise PeftcoreError(
                "--task grpo uses every prompt once per epoch, so data sets cannot be weighted, found --data "
                f"{weighted_path}. Remove the weight"
            )
        generations.load_reward(run_options.reward)

    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as `prompt`, `prompt_ids` and their other columns.

        Raises:
            PeftcoreError: a prompt is empty or longer than `max_length` tokens.
        """
        examples = []
        for row in rows:
            if row.messages is None:
                prompt: Any = row.text
                ids = processor(prompt)["input_ids"]
            else:
                prompt = row.messages
                ids = processor(conversations.render(processor, prompt, begins_answer=True), add_special_tokens=False)[
                    "input_ids"
                ]
            if not 0 < len(ids) <= max_length:
                raise PeftcoreError(
                    f"{row.location}: the prompt must have 1 to {max_length:,} tokens (--max-length), found "
                    f"{len(ids):,}. Increase --max-length, or remove the row"
                )
            examples.append({**row.columns, "prompt": prompt, _IDS: list(ids)})
        return Encoded(examples, 0)

    def as_texts(self, examples: Sequence[Example]) -> list[Example]:
        """Return the prompts as examples of a language model, for methods that initialise from data."""
        return [{"input_ids": example[_IDS], "labels": list(example[_IDS])} for example in examples]

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of each prompt."""
        return [len(example[_IDS]) for example in examples]

    def columns(self, examples: Sequence[Example]) -> list[Example]:
        """Return examples with the columns of TRL's GRPOTrainer."""
        return [{name: value for name, value in example.items() if name != _IDS} for example in examples]

    def examples_per_epoch(self, examples: int, settings: Settings) -> int:
        return examples * settings.generations

    def arguments(self, settings: Settings) -> tuple[Any, dict[str, Any]]:
        kind, options = super().arguments(settings)
        del options["max_length"]
        sampling = {"num_generations": settings.generations, "max_completion_length": settings.answer_tokens}
        return kind, {**options, **sampling, "temperature": settings.temperature, "beta": settings.beta or 0.0}

    def trainer_class(self) -> Any:
        from peftcore_cli.training.trainers import Measuring

        base: Any = super().trainer_class()

        class SamplingTrainer(base):
            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                sampler = super(Measuring, self)._get_train_sampler(train_dataset)  # type: ignore[misc]  # TRL's, repeats prompts
                # TRL's order depends on earlier epochs, which a resumed run has not sampled.
                sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
                return sampler

        return SamplingTrainer

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        arguments["reward_funcs"] = [arguments["measure"].evaluation.reward]
        args, model = arguments["args"], arguments["model"]
        if not has_adapters(model) or args.beta == 0:
            return super().trainer(arguments, settings, processor, about)
        # GRPOTrainer takes no reference model, and loads the base a second time unless beta=0.
        beta, args.beta = args.beta, 0.0
        trainer: Any = super().trainer(arguments, settings, processor, about)
        trainer.beta = trainer.args.beta = beta
        trainer.ref_model = peftcore.reference_model(model)
        return trainer

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        evaluation: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        """Return the mean reward of greedy answers, and its negative as the loss.

        Raises:
            PeftcoreError: no answer has a reward.
        """
        cases = [generations.Case(example[_IDS], "") for example in examples]
        texts = generations.answer(model, cases, evaluation.processor, evaluation.answer_tokens)
        completions: list[Any] = [
            text if isinstance(example["prompt"], str) else [{"role": "assistant", "content": text}]
            for text, example in zip(texts, examples, strict=True)
        ]
        rows = self.columns(examples)
        columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
        ids = [evaluation.processor(text, add_special_tokens=False)["input_ids"] for text in texts]
        rewards = evaluation.reward(
            prompts=[row["prompt"] for row in rows], completions=completions, completion_ids=ids, **columns
        )
        values = [value for value in rewards if value is not None]
        if not values:
            raise PeftcoreError("--reward returns None for every held-out answer. Return a number for some of them")
        mean = sum(values) / len(values)
        return Metrics(-mean, len(values), {"reward": mean})
