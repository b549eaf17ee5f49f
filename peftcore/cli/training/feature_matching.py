"""Energy-based fine-tuning (`--ebft`): sampled text is rewarded for features like those of the text in the data.

Jelassi et al. 2026, arXiv 2603.12248. phi are hidden states of the frozen base, y is the text in the data, and y_j are
the n texts that the model samples for the same prefix:

    r_j = 2 a cos(phi(y_j), phi(y)) - 2 d / (n - 1) sum_{k != j} phi(y_j) . phi(y_k)

The loss is -A_j log p(y_j), where A_j is r_j compared with the rewards of the other samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.cli import task_names
from peftcore.cli.fields import parse
from peftcore.cli.settings import RunOptions
from peftcore.errors import PeftcoreError

STRUCTURED, STRIDED = "structured", "strided"
LAST, MEAN, ANSWER, QUARTERS = EMBEDDINGS = ("last_token", "mean_pooling", "completion_mean", "concat")
LEAVE_ONE_OUT, GROUP, NONE = ESTIMATORS = ("rloo", "group_norm", "reinforce")
_CHOICES = {"mode": (STRUCTURED, STRIDED), "embed_method": EMBEDDINGS, "advantage_estimator": (None, *ESTIMATORS)}
_SMALL = 1e-5  # singular values below this share of the largest are 0
_SPREAD = 1e-4  # added to a standard deviation, as in TRL


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Fields of `--ebft`.

    Attributes:
        mode: `structured`: answers to whole prompts; `strided`: short continuations of many prefixes of a text.
        feature_layers: depths of the layers whose outputs are the features, from 0 to 1.
        embed_method: how the features of tokens become one vector.
        use_whitening: whether the features of the samples of a prefix are whitened.
        alignment_coef: weight a of the likeness to the data.
        diversity_coef: weight d of the likeness among samples.
        rl_coef: weight of the policy gradient in the loss.
        ce_coef: weight of the cross-entropy of the data in the loss.
        advantage_estimator: `rloo`, `group_norm` or `reinforce`; None for `group_norm` of answers, `rloo` of strides.
        stride: tokens from prefix to prefix.
        context_length: tokens of the shortest prefix.
        min_completion_prefix: tokens of a completion in its shortest prefix.
    """

    mode: str = STRUCTURED
    feature_layers: Sequence[float] = (0.25, 0.5, 0.75)
    embed_method: str = LAST
    use_whitening: bool = False
    alignment_coef: float = 1.0
    diversity_coef: float = 1.0
    rl_coef: float = 1.0
    ce_coef: float = 0.0
    advantage_estimator: str | None = None
    stride: int = 8
    context_length: int = 8
    min_completion_prefix: int = 0

    def __post_init__(self) -> None:
        """Raise a PeftcoreError if a field has a value that means nothing."""
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                shown = ", ".join(each for each in known if each)
                raise PeftcoreError(f"--ebft {name} must be one of {shown}, found '{getattr(self, name)}'")
        if not self.feature_layers or not all(0 <= depth <= 1 for depth in self.feature_layers):
            raise PeftcoreError(f"--ebft feature_layers must be depths from 0 to 1, found {list(self.feature_layers)}")
        for name, least in (("stride", 1), ("context_length", 1), ("min_completion_prefix", 0)):
            if getattr(self, name) < least:
                raise PeftcoreError(f"--ebft {name} must be at least {least}, found {getattr(self, name)}")
        for name in ("alignment_coef", "diversity_coef", "rl_coef", "ce_coef"):
            if getattr(self, name) < 0:
                raise PeftcoreError(f"--ebft {name} must not be negative, found {getattr(self, name):g}")
        if self.mode == STRIDED and self.embed_method == QUARTERS:
            raise PeftcoreError(f"--ebft embed_method={QUARTERS} is for mode=structured. Use {LAST} or {MEAN}")

    @property
    def is_strided(self) -> bool:
        """Whether short continuations of many prefixes are sampled."""
        return self.mode == STRIDED

    @property
    def estimator(self) -> str:
        """How rewards become advantages."""
        return self.advantage_estimator or (LEAVE_ONE_OUT if self.is_strided else GROUP)


def parsed(text: str) -> Matching:
    """Return the fields of `--ebft "NAME=VALUE NAME=VALUE"`.

    Raises:
        PeftcoreError: a field does not exist, or has a wrong value.
    """
    return Matching(**parse(Matching, text.split(), "--ebft"))


def checked(given: RunOptions, task: str) -> Matching:
    """Return the fields of `--ebft`.

    Raises:
        PeftcoreError: they are wrong, or the other options do not fit.
    """
    found = parsed(str(given.ebft))
    if task != task_names.LANGUAGE_MODEL:
        raise PeftcoreError(f"--ebft is for causal-lm, found task {task}. Leave it out, or pass --task causal-lm")
    others = {"--pack": given.pack, "--streaming": given.streaming, "--teacher": given.teacher is not None}
    others |= {"--parallel": given.parallel is not None, "--lazy-logits on": given.lazy_logits == "on"}
    for option, is_given in others.items():
        if is_given:
            raise PeftcoreError(f"--ebft does not work with {option}. Leave one out")
    if given.temperature <= 0:
        raise PeftcoreError(f"--temperature must be above 0, since --ebft samples, found {given.temperature:g}")
    return found


@torch.no_grad()
def hidden_states(model: Any, layers: Sequence[float], input_ids: Tensor, **inputs: Any) -> list[Tensor]:
    """Return the outputs of the layers at these depths, each [batch, length, width], in fp32; depth 0 is the input."""
    backbone = getattr(model, "base_model", model)
    found = backbone(input_ids=input_ids, output_hidden_states=True, use_cache=False, **inputs).hidden_states
    return [found[int(depth * (len(found) - 1))].detach().float() for depth in layers]  # some inputs ask for gradients


def pooled(states: Tensor, lengths: Tensor, prompt: int, method: str) -> Tensor:
    """Return one vector per text, [texts, width], or [texts, 3 width] for `concat`.

    Args:
        states: [texts, length, width].
        lengths: tokens of each text; those after them are padding.
        prompt: tokens of the prompt that all texts begin with.
        method: one of `EMBEDDINGS`.
    """
    rows = torch.arange(len(states), device=states.device)
    if method == LAST:
        return states[rows, lengths - 1]
    if method == QUARTERS:
        return torch.cat([states[rows, share * lengths // 4] for share in (1, 2, 3)], dim=-1)
    places = torch.arange(states.shape[1], device=states.device)
    counted = (places < lengths[:, None]) & (places >= (prompt if method == ANSWER else 0))
    return (states * counted[..., None]).sum(1) / counted.sum(1, keepdim=True).clamp_min(1)


def whitened(samples: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return both times W = (X^T X)^(-1/2), where X are the samples, in coordinates of the space that these span.

    Args:
        samples: [..., n, width].
        wanted: [..., 1, width].
    """
    left, values, right = torch.linalg.svd(samples, full_matrices=False)
    kept = values > _SMALL * values.amax(-1, keepdim=True)
    inverse = torch.where(kept, 1 / values, 0.0)[..., None, :]
    return left * kept[..., None, :], (wanted @ right.mT) * inverse


def terms(samples: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeness of samples to what is wanted and the mean likeness to the other samples, each [..., n]."""
    alignment = F.cosine_similarity(samples, wanted, dim=-1)
    among = samples @ samples.mT
    others = among.sum(-1) - among.diagonal(dim1=-2, dim2=-1)
    return alignment, others / max(1, samples.shape[-2] - 1)


def advantages(alignment: Tensor, diversity: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Return (rewards, advantages) of samples, each [..., n].

    With `rloo`, the reward that a sample is compared with does not depend on the sample: the mean alignment of the
    others, and their mean likeness among each other.
    """
    likeness, sameness = 2 * matching.alignment_coef * alignment, 2 * matching.diversity_coef * diversity
    rewards, count = likeness - sameness, alignment.shape[-1]
    if matching.estimator == NONE:
        return rewards, rewards
    if matching.estimator == GROUP:
        centered = rewards - rewards.mean(-1, keepdim=True)
        return rewards, centered / (rewards.std(-1, keepdim=True) + _SPREAD)
    found = likeness - (likeness.sum(-1, keepdim=True) - likeness) / (count - 1)
    if count > 2:
        sameness = sameness - (sameness.sum(-1, keepdim=True) - 2 * sameness) / (count - 2)
    return rewards, found - sameness
