"""Trainer that rewards sampled text for features like those of the data (`--ebft`), and the figure of its progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

import peftcore
from peftcore import ranks
from peftcore.cli.console import warn
from peftcore.cli.settings import Settings
from peftcore.cli.tasks import positions
from peftcore.cli.tasks.conversations import IGNORED
from peftcore.cli.tasks.encoded_examples import Example
from peftcore.cli.tasks.evaluation_mode import evaluating
from peftcore.cli.tasks.text_generation import ends
from peftcore.cli.training import block_rollouts, feature_matching
from peftcore.cli.training.feature_matching import Matching
from peftcore.cli.training.trainers import MeasuringTrainer
from peftcore.engine import state_of
from peftcore.errors import PeftcoreError
from peftcore.integrations.trainer_optimizer import bare_model

MEASURED = 100  # held-out examples that are continued


@dataclass(frozen=True)
class Sampled:
    """Samples of a text's prefixes, compared with the text.

    Attributes:
        alignment: likeness to the text, [prefixes, samples].
        diversity: mean likeness to the other samples of the prefix, [prefixes, samples].
        logs: computes the log-probabilities of the tokens, [prefixes, samples, tokens].
        counted: which of the tokens count; None for all.
    """

    alignment: Tensor
    diversity: Tensor
    logs: Callable[[], Tensor]
    counted: Tensor | None = None


@dataclass(frozen=True)
class Rollouts:
    """How text is sampled and compared.

    Attributes:
        matching: fields of `--ebft`.
        samples: samples of each prefix.
        temperature: of sampling.
        tokens: of an answer at most, or of a continuation.
        padding: token after an answer that is shorter than others.
        stops: tokens that end an answer.
    """

    matching: Matching
    samples: int
    temperature: float
    tokens: int
    padding: int
    stops: Sequence[int]

    @classmethod
    def of_run(cls, settings: Settings, model: nn.Module, tokenizer: Any) -> Rollouts:
        """Return how the text of a run is sampled."""
        return cls(
            matching=feature_matching.parsed(str(settings.ebft)),
            samples=settings.generations,
            temperature=settings.temperature,
            tokens=settings.answer_tokens,
            padding=tokenizer.pad_token_id or 0,
            stops=ends(model, tokenizer) or [],
        )

    def check(self, model: nn.Module, examples: Sequence[Example], held_out: Sequence[Example]) -> None:
        """Raise a PeftcoreError if the text of the examples cannot be sampled; warn of examples that are too short."""
        if ranks.count() > 1:
            raise PeftcoreError(f"--ebft trains in one process, found {ranks.count()}. Start it without torchrun")
        if state_of(model) is None:
            raise PeftcoreError("--ebft compares features of the frozen base, found a base that is trained itself")
        if not self.matching.is_strided:
            if any(_prompt(each["labels"]) == 0 for each in (*examples, *held_out)):
                raise PeftcoreError(
                    "--ebft mode=structured answers prompts, found text without one. Pass prompts with completions or "
                    "conversations, or --ebft mode=strided"
                )
            return
        long = [each for each in examples if self.prefixes(each["labels"])]
        if not long:
            raise PeftcoreError(
                f"--ebft mode=strided: all examples are too short for a prefix and the {self.tokens} tokens after it "
                "(--answer-tokens). Reduce --answer-tokens or context_length, or pass longer texts"
            )
        if len(long) < len(examples):
            warn(
                f"{len(examples) - len(long):,} of {len(examples):,} examples are too short for a prefix and "
                f"{self.tokens} tokens after it (--answer-tokens): nothing is sampled for them"
            )

    def check_blocks(self, model: nn.Module, examples: Sequence[Example]) -> None:
        """Raise a PeftcoreError unless the model computes the continuations of a text's prefixes together."""
        if self.matching.is_strided:
            longest = max(examples, key=lambda each: (bool(self.prefixes(each["labels"])), len(each["labels"])))
            first = self.prefixes(longest["labels"])[0]
            block_rollouts.check(model, longest["input_ids"], first, self.tokens)

    def prefixes(self, labels: Sequence[int]) -> list[int]:
        """Return the lengths of the prefixes that are continued: of a text, or within what is learned of it."""
        matching, prompt = self.matching, _prompt(labels)
        first = max(matching.context_length, prompt + matching.min_completion_prefix if prompt else 1)
        found = block_rollouts.ends(len(labels), first, matching.stride, self.tokens)
        return [end for end in found if IGNORED not in labels[end : end + self.tokens]]

    def strided(self, model: Any, ids: Tensor, labels: list[int]) -> Sampled | None:
        """Return continuations of a text's prefixes, or None if the text is too short."""
        prefixes = self.prefixes(labels)
        if not prefixes:
            return None
        begin = torch.tensor(prefixes, device=ids.device)
        each = begin.repeat_interleave(self.samples)
        with evaluating(model):
            choose = block_rollouts.sampled(self.temperature)
            tokens = block_rollouts.continued(model, ids, each, self.tokens, choose)
        inputs = block_rollouts.row(model, ids, each, tokens)
        with _frozen(model):
            states = feature_matching.hidden_states(model, self.matching.feature_layers, **inputs)
        features = torch.cat([F.normalize(state[0], dim=-1) for state in states], -1)
        blocks = features[len(ids) :].unflatten(0, (len(begin), self.samples, self.tokens + 1))[:, :, 1:]
        wanted = features[begin[:, None] + torch.arange(self.tokens, device=ids.device)]
        if self.matching.embed_method == feature_matching.LAST:
            terms = self._compared(blocks[:, :, -1], wanted[:, -1:])
        else:
            terms = self._compared(blocks.mean(2), wanted.mean(1, keepdim=True))

        def logs() -> Tensor:
            logits = block_rollouts.logits(model, inputs, tokens)
            found = block_rollouts.log_probabilities(logits, tokens, self.temperature)
            return found.unflatten(0, (len(begin), self.samples))

        return Sampled(*terms, logs)

    def structured(self, model: Any, ids: Tensor, labels: list[int]) -> Sampled:
        """Return answers to the prompt of a text, which end where the model ends them."""
        begin = _prompt(labels)
        over = next((i for i in range(begin, len(labels)) if labels[i] == IGNORED), len(labels))
        over = next((i for i in range(begin, over) if int(ids[i]) in self.stops), over)
        prompt = ids[None, :begin]
        with evaluating(model), _own_probabilities(model), positions.of_answers(model, "--answer-tokens"):
            texts = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.tokens,
                num_return_sequences=self.samples,
                pad_token_id=self.padding,
                eos_token_id=list(self.stops) or None,
                **_sampling(self.temperature),
            )
        answers = texts[:, begin:]
        stopped = torch.isin(answers, torch.tensor(list(self.stops), device=ids.device, dtype=ids.dtype))
        sizes = torch.where(stopped.any(1), stopped.int().argmax(1), answers.shape[1])  # without the end
        counted = torch.arange(answers.shape[1], device=ids.device) <= sizes[:, None]
        mask = torch.cat([prompt.new_ones(len(texts), begin), counted.to(texts)], 1)
        layers, method = self.matching.feature_layers, self.matching.embed_method
        with _frozen(model):
            found = torch.cat(feature_matching.hidden_states(model, layers, texts, attention_mask=mask), -1)
            right = torch.cat(feature_matching.hidden_states(model, layers, ids[None, :over]), -1)
        samples = feature_matching.pooled(found, begin + sizes, begin, method)
        wanted = feature_matching.pooled(right, torch.tensor([over], device=ids.device), begin, method)
        if not self.matching.use_whitening:
            samples, wanted = F.normalize(samples, dim=-1), F.normalize(wanted, dim=-1)
        terms = self._compared(samples[None], wanted[None])

        def logs() -> Tensor:
            last = answers.shape[1] + 1
            output = model(input_ids=texts, attention_mask=mask, use_cache=False, **block_rollouts.kept(model, last))
            return block_rollouts.log_probabilities(output.logits[:, -last:-1], answers, self.temperature)[None]

        return Sampled(*terms, logs, counted[None])

    def sampled(self, model: Any, ids: Tensor, labels: list[int]) -> Sampled | None:
        """Return samples of a text's prefixes, or None if the text is too short."""
        return (self.strided if self.matching.is_strided else self.structured)(model, ids, labels)

    def _compared(self, samples: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        if self.matching.use_whitening:
            samples, wanted = feature_matching.whitened(samples, wanted)
        return feature_matching.terms(samples, wanted)


def of_run(
    settings: Settings, model: nn.Module, tokenizer: Any, train: Sequence[Example], held_out: Sequence[Example]
) -> Rollouts | None:
    """Return how the text of a run is sampled, or None if it is not.

    Raises:
        PeftcoreError: the text of the examples cannot be sampled.
    """
    if settings.ebft is None:
        return None
    found = Rollouts.of_run(settings, model, tokenizer)
    found.check(model, train, held_out)
    found.check_blocks(model, [*train, *held_out])
    return found


def alignment(settings: Settings, model: nn.Module, tokenizer: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Return the mean likeness of greedy answers or continuations to the data; no random numbers are drawn.

    The first 100 examples are continued, but for those that are too short; empty if all are.
    """
    drawn = Rollouts.of_run(settings, model, tokenizer)
    greedy = replace(drawn, matching=replace(drawn.matching, use_whitening=False), samples=1, temperature=0.0)
    found = []
    device = next(model.parameters()).device
    with evaluating(model):
        for each in examples[:MEASURED]:
            result = greedy.sampled(model, torch.tensor(each["input_ids"], device=device), each["labels"])
            if result is not None:
                found.append(result.alignment.flatten())
    return {"alignment": float(torch.cat(found).mean())} if found else {}


class MatchingTrainer(MeasuringTrainer):
    """Trainer of `--ebft`.

    Args:
        rollouts: how text is sampled and compared.
    """

    def __init__(self, *args: Any, rollouts: Rollouts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rollouts.check_blocks(self.model, self.train_dataset)  # again, with fused operators
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a batch
        self.rollouts = rollouts
        self.seen: dict[str, list[float]] = {"reward": [], "alignment": [], "diversity": []}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch: of continuations a mean over their tokens, of answers over means of tokens."""
        matching = self.rollouts.matching
        bare = bare_model(self)
        total: Any = 0.0
        count = 0
        for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
            size = int(mask.sum())
            part = self._loss(bare, ids[:size], labels[:size].tolist())
            if part is not None:
                total, count = total + part[0], count + part[1]
        if count == 0:  # all texts are too short
            total = sum((p.sum() for p in bare.parameters() if p.requires_grad), start=torch.zeros(())) * 0.0
        loss = matching.rl_coef * total / max(1, count)
        if matching.ce_coef:
            loss = loss + matching.ce_coef * super().compute_loss(model, inputs)
        return (loss, None) if return_outputs else loss

    def _loss(self, model: Any, ids: Tensor, labels: list[int]) -> tuple[Tensor, int] | None:
        """Return the sum of the policy gradient's loss over a text's tokens or answers, and their number."""
        found = self.rollouts.sampled(model, ids, labels)
        if found is None:
            return None
        rewards, advantages = feature_matching.advantages(found.alignment, found.diversity, self.rollouts.matching)
        for name, values in (("reward", rewards), ("alignment", found.alignment), ("diversity", found.diversity)):
            self.seen[name].append(float(values.mean()))
        logs = found.logs()
        if found.counted is None:
            return -(logs * advantages[..., None]).sum(), logs.numel()
        means = (logs * found.counted).sum(-1) / found.counted.sum(-1)
        return -(means * advantages).sum(), means.numel()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of rewards and their terms since the last log to a log of training, and log it."""
        if "loss" in logs and self.seen["reward"]:
            logs = logs | {name: sum(values) / len(values) for name, values in self.seen.items()}
            for values in self.seen.values():
                values.clear()
        super().log(logs, *args, **kwargs)


def _prompt(labels: Sequence[int]) -> int:
    """Return the number of tokens before the first that is learned."""
    return next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))


def _sampling(temperature: float) -> dict[str, Any]:
    """Return arguments of `generate` that sample from the model's own probabilities, or, at 0, take the most likely."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


@contextlib.contextmanager
def _own_probabilities(model: Any) -> Iterator[None]:
    """Generate without the fields of the model's generation config, such as min_p or suppressed tokens."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Compute with the frozen base, in evaluation mode and without gradients."""
    with evaluating(model), peftcore.disabled(model):
        yield
