"""`--ebft`: rewards and advantages are those of the formulas, in fp64 and term by term."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcore import PeftcoreError
from peftcore.cli.settings import RunOptions
from peftcore.cli.training import feature_matching
from peftcore.cli.training.feature_matching import Matching


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def drawn(count: int, width: int = 7) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, width, generator=draw, dtype=torch.float64) for size in (count, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("count", [2, 4])
def test_terms_of_the_reward(count: int) -> None:
    samples, wanted = drawn(count)
    alignment, diversity = feature_matching.terms(samples.float()[None], wanted.float()[None])
    for j in range(count):
        others = [float(samples[j] @ samples[k]) for k in range(count) if k != j]
        assert float(alignment[0, j]) == pytest.approx(cosine(samples[j], wanted[0]), rel=1e-5)
        assert float(diversity[0, j]) == pytest.approx(sum(others) / len(others), rel=1e-5)


@pytest.mark.parametrize("rank", [4, 2])
def test_whitened_features_are_times_the_inverse_root_of_the_second_moment(rank: int) -> None:
    """Also if samples are the same, whose second moment has a pseudo-inverse only."""
    samples, wanted = drawn(4)
    samples[rank:] = samples[0]
    values, vectors = torch.linalg.eigh(samples.T @ samples)
    inverse = torch.where(values > 1e-8, values.clamp_min(1e-30).rsqrt(), 0.0)
    root = vectors @ torch.diag(inverse) @ vectors.T
    right = feature_matching.terms(samples @ root, wanted @ root)
    found = feature_matching.terms(*feature_matching.whitened(samples.float()[None], wanted.float()[None]))
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours[0].double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_a_sample_is_compared_with_rewards_that_do_not_depend_on_it(count: int) -> None:
    samples, wanted = drawn(count)
    terms = feature_matching.terms(samples, wanted)
    matching = Matching(mode="strided", alignment_coef=0.5, diversity_coef=0.25)
    rewards, found = feature_matching.advantages(*terms, matching)
    for j in range(count):
        others = [k for k in range(count) if k != j]
        pairs = [float(samples[a] @ samples[b]) for a in others for b in others if a != b]
        reward = float(terms[0][j] - 0.5 * terms[1][j])
        baseline = sum(cosine(samples[k], wanted[0]) for k in others) / len(others)
        baseline -= 0.5 * sum(pairs) / max(1, len(pairs))
        assert float(rewards[j]) == pytest.approx(reward)
        assert float(found[j]) == pytest.approx(reward - baseline)


def test_other_estimators() -> None:
    terms = torch.tensor([[0.1, 0.4, 0.4, 0.9]]), torch.tensor([[0.5, 0.5, 0.2, 0.0]])
    rewards = 2 * terms[0] - 2 * terms[1]
    found = feature_matching.advantages(*terms, Matching())[1]
    torch.testing.assert_close(found, (rewards - rewards.mean()) / (rewards.std() + 1e-4))
    torch.testing.assert_close(
        feature_matching.advantages(*terms, Matching(advantage_estimator="reinforce"))[1], rewards
    )


def test_pooling() -> None:
    states = torch.arange(16.0).view(2, 8, 1)
    lengths = torch.tensor([8, 5])

    def found(method: str) -> list[list[float]]:
        pooled: list[list[float]] = feature_matching.pooled(states, lengths, 3, method).tolist()
        return pooled

    assert found("last_token") == [[7], [12]]
    assert found("mean_pooling") == [[3.5], [10]]
    assert found("completion_mean") == [[5], [11.5]]
    assert found("concat") == [[2, 4, 6], [9, 10, 11]]
    assert feature_matching.pooled(states, torch.tensor([3, 3]), 3, "completion_mean").tolist() == [[0], [0]]


def test_fields() -> None:
    found = feature_matching.parsed("mode=strided feature_layers=0.5,1 use_whitening=true stride=2 ce_coef=0.03")
    assert found.is_strided and list(found.feature_layers) == [0.5, 1] and found.use_whitening
    assert (found.stride, found.ce_coef, found.estimator) == (2, 0.03, "rloo")
    assert feature_matching.parsed("").estimator == "group_norm"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mode=striped", "mode must be one of structured, strided, found 'striped'"),
        ("strides=3", "--ebft strides=3: Matching has no field 'strides'"),
        ("stride=0", "stride must be at least 1, found 0"),
        ("feature_layers=0.5,2", "feature_layers must be depths from 0 to 1"),
        ("ce_coef=-1", "ce_coef must not be negative, found -1"),
        ("advantage_estimator=gae", "advantage_estimator must be one of rloo, group_norm, reinforce"),
        ("mode=strided embed_method=concat", "embed_method=concat is for mode=structured"),
    ],
)
def test_wrong_fields(text: str, message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        feature_matching.parsed(text)


@pytest.mark.parametrize(
    ("options", "task", "message"),
    [
        ({}, "grpo", "--ebft is for causal-lm, found task grpo"),
        ({"pack": True}, "causal-lm", "--ebft does not work with --pack"),
        ({"streaming": True}, "causal-lm", "with --streaming"),
        ({"parallel": "ddp"}, "causal-lm", "with --parallel"),
        ({"teacher": "m"}, "causal-lm", "with --teacher"),
        ({"lazy_logits": "on"}, "causal-lm", "with --lazy-logits on"),
        ({"temperature": 0.0}, "causal-lm", "--temperature must be above 0, since --ebft samples, found 0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], task: str, message: str) -> None:
    with pytest.raises(PeftcoreError, match=message):
        feature_matching.checked(RunOptions(ebft="mode=strided", **options), task)
    assert feature_matching.checked(RunOptions(ebft="mode=strided"), "causal-lm").is_strided


def test_layers_are_depths() -> None:
    outputs = [torch.full((1, 2, 3), float(i)) for i in range(9)]
    model = SimpleNamespace(base_model=lambda **_: SimpleNamespace(hidden_states=outputs))
    found = feature_matching.hidden_states(model, (0, 0.25, 0.5, 0.99, 1), torch.zeros(1, 2, dtype=torch.long))
    assert [float(each[0, 0, 0]) for each in found] == [0, 2, 4, 7, 8]
