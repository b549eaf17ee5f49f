"""`--ebft`: samples, features and loss are those of one text after the other; runs resume exactly and learn."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import SPECIAL, WORDS, Run, write_jsonl
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore import PeftcoreError
from peftcore.cli.tasks.conversations import IGNORED
from peftcore.cli.training import block_rollouts, feature_matching, matching_trainer
from peftcore.cli.training.matching_trainer import MatchingTrainer, Rollouts

TOKENS, STOP = len(SPECIAL + WORDS), 2
TEXT = torch.randint(4, TOKENS, (14,), generator=torch.Generator().manual_seed(0))
PROMPTED = [IGNORED] * 5 + TEXT[5:].tolist()
METHOD = ("--method", "lora", "--set", "r=4", "--device", "cpu")


def models() -> tuple[Any, Any]:
    """Return a model with an adapter that has an effect, and its base."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    base: Any = LlamaForCausalLM(
        LlamaConfig(vocab_size=TOKENS, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    )
    base.eval()
    model = copy.deepcopy(base)
    peftcore.apply(model, "lora", r=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, base


def rollouts(fields: str, samples: int = 3, tokens: int = 3, temperature: float = 0.7) -> Rollouts:
    return Rollouts(feature_matching.parsed(fields), samples, temperature, tokens, 0, [STOP])


def trainer(of: Rollouts) -> MatchingTrainer:
    made = MatchingTrainer.__new__(MatchingTrainer)
    made.rollouts, made.seen = of, {"reward": [], "alignment": [], "diversity": []}
    return made


def loss(model: Any, of: Rollouts, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the trainer's loss of a padded batch in which each row begins as TEXT."""
    monkeypatch.setattr(matching_trainer, "bare_model", lambda trainer: model)
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([TEXT[: len(row)], torch.zeros(length - len(row), dtype=torch.long)]) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORED] * (length - len(row)) for row in rows])
    found: Tensor = trainer(of).compute_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def log_probabilities(model: Any, begin: int, text: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of the tokens of one text from `begin`."""
    logits = model(text[None]).logits[0, begin - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(text) - begin), text[begin:]]


def states(base: Any, text: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [base(text[None], output_hidden_states=True).hidden_states[i][0].double() for i in (1, 2, 3)]


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True))


@pytest.mark.parametrize("embed", ["last_token", "mean_pooling"])
def test_strided_loss_is_that_of_texts_alone(embed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = models()
    of = rollouts(f"mode=strided stride=4 context_length=3 min_completion_prefix=1 embed_method={embed}")
    chosen: list[Tensor] = []
    keep = block_rollouts.continued
    monkeypatch.setattr(block_rollouts, "continued", lambda *arguments: chosen.append(keep(*arguments)) or chosen[-1])
    rows = [TEXT.tolist(), PROMPTED, TEXT[:5].tolist()]  # the last is too short
    found = loss(model, of, rows, monkeypatch)

    def pooled(features: list[Tensor], begin: int, end: int) -> Tensor:
        normal = torch.cat([F.normalize(each, dim=-1) for each in features], -1)
        return normal[end - 1] if embed == "last_token" else normal[begin:end].mean(0)

    total, count = torch.zeros(()), 0
    for prefixes, tokens in zip([[3, 7, 11], [6, 10]], chosen, strict=True):
        for i, size in enumerate(prefixes):
            texts = [torch.cat([TEXT[:size], tokens[3 * i + j]]) for j in range(3)]
            phi = [pooled(states(base, text), size, size + 3) for text in texts]
            wanted = pooled(states(base, TEXT), size, size + 3)
            likeness = [2 * float(F.cosine_similarity(each, wanted, dim=0)) for each in phi]
            for j in range(3):
                a, b = (k for k in range(3) if k != j)
                same = 2 * float(phi[j] @ phi[a] + phi[j] @ phi[b]) / 2 - 2 * float(phi[a] @ phi[b])
                advantage = likeness[j] - (likeness[a] + likeness[b]) / 2 - same
                total = total - advantage * log_probabilities(model, size, texts[j], 0.7).sum()
                count += 3
    torch.testing.assert_close(found, total / count, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(gradients(model, found), gradients(model, total / count), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("embed", ["last_token", "completion_mean"])
def test_structured_loss_is_that_of_texts_alone(embed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that stops counts with its end in the loss, and without it in the features."""
    model, base = models()
    of = rollouts(f"embed_method={embed}")
    answers = torch.tensor([[7, 9, 4], [8, STOP, 0], [STOP, 0, 0]])
    monkeypatch.setattr(model, "generate", lambda **_: torch.cat([TEXT[:5].expand(3, 5), answers], 1), raising=False)
    labels = [*PROMPTED[:9], STOP, IGNORED, IGNORED]
    monkeypatch.setitem(globals(), "TEXT", torch.cat([TEXT[:9], torch.tensor([STOP, 5, 6])]))
    found = loss(model, of, [labels], monkeypatch)

    def pooled(text: Tensor) -> Tensor:
        features = torch.cat(states(base, text), -1)
        if embed == "last_token":
            return F.normalize(features[-1], dim=0)
        return F.normalize(features[5:].mean(0), dim=0) if len(text) > 5 else torch.zeros_like(features[0])

    texts = [torch.cat([TEXT[:5], answers[j, : 3 - j]]) for j in range(3)]  # with their ends
    phi = [pooled(text[:-1] if j else text) for j, text in enumerate(texts)]
    wanted = pooled(TEXT[:9])
    rewards = torch.stack(
        [
            2 * phi[j] @ wanted - 2 * sum(phi[j] @ phi[k] for k in range(3) if k != j) / 2  # type: ignore[operator]
            for j in range(3)
        ]
    )
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    right = (
        -sum(
            advantage.float() * log_probabilities(model, 5, text, 0.7).mean()
            for advantage, text in zip(advantages, texts, strict=True)
        )
        / 3
    )
    torch.testing.assert_close(found, torch.as_tensor(right), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(gradients(model, found), gradients(model, torch.as_tensor(right)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_expected_gradient_is_that_of_the_expected_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all tokens that may follow a prefix, by central differences of the mean reward under the model."""
    model, _ = models()
    model.double().lm_head.weight.data *= 20  # it is sure of its answers
    text = TEXT[:6]
    of = rollouts("mode=strided context_length=5 advantage_estimator=reinforce", samples=1, tokens=1)
    parameter = [p for p in model.parameters() if p.requires_grad][-1]

    def chances() -> Tensor:
        return (model(text[None, :5]).logits[0, -1] / 0.7).softmax(-1)

    expected, rewards = torch.zeros_like(parameter), []
    weights = chances().detach()
    for token in range(TOKENS):
        monkeypatch.setattr(block_rollouts, "sampled", lambda _, token=token: lambda logits: torch.tensor([token]))
        found = trainer(of)
        part = found._loss(model, text, text.tolist())
        assert part is not None and part[1] == 1
        rewards.append(found.seen["reward"][0])
        expected += weights[token] * torch.autograd.grad(part[0], parameter)[0]
    judged, step = torch.tensor(rewards, dtype=torch.float64), 1e-4
    for flat in expected.abs().flatten().topk(3).indices.tolist():
        place = divmod(flat, parameter.shape[1])
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * step
                values.append(float(chances() @ judged))
                parameter[place] -= sign * step
        assert float(-expected[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3)


def test_texts_that_are_all_too_short_have_a_loss_without_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models()
    found = loss(model, rollouts("mode=strided"), [TEXT[:9].tolist()], monkeypatch)
    assert float(found.detach()) == 0 and all(float(each.abs().sum()) == 0 for each in gradients(model, found))


def test_continuations_are_those_of_learned_tokens() -> None:
    """In a conversation of several turns, no continuation reaches into a turn that is not learned."""
    of = rollouts("mode=strided stride=1 context_length=1")
    labels = [IGNORED] * 2 + [5] * 5 + [IGNORED] * 4 + [6] * 4
    assert of.prefixes(labels) == [2, 3, 4, 11, 12]


def test_examples_that_cannot_be_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    model, base = models()
    example = {"input_ids": TEXT.tolist(), "labels": TEXT.tolist()}
    short = {name: values[:9] for name, values in example.items()}
    prompted = {"input_ids": TEXT.tolist(), "labels": PROMPTED}
    for parts in (([example], []), ([prompted], [example])):
        with pytest.raises(PeftcoreError, match="mode=structured answers prompts, found text without one"):
            rollouts("").check(model, *parts)
    with pytest.raises(PeftcoreError, match="all examples are too short for a prefix and the 3 tokens after it"):
        rollouts("mode=strided").check(model, [short], [])
    with pytest.raises(PeftcoreError, match="features of the frozen base, found a base that is trained itself"):
        rollouts("").check(base, [example], [])
    rollouts("mode=strided").check(model, [example, short], [])
    assert "1 of 2 examples are too short" in capsys.readouterr().err.replace("\n", " ")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching_trainer.ranks, "count", lambda: 2)
    with pytest.raises(PeftcoreError, match="--ebft trains in one process, found 2"):
        rollouts("").check(models()[0], [], [])


def test_the_likeness_of_greedy_continuations() -> None:
    model, base = models()
    settings: Any = SimpleNamespace(ebft="mode=strided stride=4 use_whitening=true", answer_tokens=3, generations=4)
    settings.temperature = 1.0
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    before = torch.get_rng_state()
    short, text = ({"input_ids": part.tolist(), "labels": part.tolist()} for part in (TEXT[:9], TEXT))
    found = matching_trainer.alignment(settings, model, tokenizer, [short, text])
    assert matching_trainer.alignment(settings, model, tokenizer, [short]) == {}
    assert torch.equal(before, torch.get_rng_state())
    written = TEXT[:8]
    with torch.no_grad():
        for _ in range(3):
            written = torch.cat([written, model(written[None]).logits[0, -1:].argmax(-1)])
    one, other = (torch.cat([F.normalize(s[10], dim=0) for s in states(base, each)]) for each in (written, TEXT))
    assert found == {"alignment": pytest.approx(float(F.cosine_similarity(one, other, dim=0)), rel=1e-4)}


def data(folder: Path, mode: str) -> Path:
    if mode == "structured":
        rows = [{"prompt": f"the film is {word}", "completion": "it was fun"} for word in WORDS]
    else:
        rows = [{"text": " ".join([*["the film is good and very bright"] * 2, word])} for word in WORDS]
    return write_jsonl(folder / "rows.jsonl", rows)


def arguments(base: Path, folder: Path, mode: str) -> tuple[Any, ...]:
    more = "use_whitening=true stride=4 context_length=3 ce_coef=0.03" if mode == "strided" else ""
    path = data(folder, mode)
    options = ("--ebft", f"mode={mode} {more}", "--generations", 4, "--answer-tokens", 4, "--batch-size", 4)
    return ("-m", base, "-d", path, "--eval-data", path, *METHOD, *options, "--lr", 0.02)


@pytest.mark.parametrize("mode", [pytest.param("structured", marks=pytest.mark.nightly), "strided"])
def test_resume_is_exact(run: Run, llama: Path, tmp_path: Path, mode: str) -> None:
    found = []
    options = (*arguments(llama, tmp_path, mode), "--steps", 3, "--save-every", 1, "--eval-every", 3, "--keep", 9)
    for name in ("whole", "lost"):
        run("train", *options, "-o", tmp_path / name)
        if name == "lost":
            for step in (2, 3):
                (tmp_path / name / "checkpoints" / f"checkpoint-{step}" / "complete.json").unlink()
            assert "checkpoint-1" in run("train", *options, "-o", tmp_path / name, "--resume").output
        found.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["structured", "strided"])
def test_rewards_rise(run: Run, llama: Path, tmp_path: Path, mode: str) -> None:
    more = ["--steps", 40, "--eval-every", 20, "--metric", "alignment", "--load-best", "-o", tmp_path / "run"]
    if mode == "strided":
        fields = "mode=strided stride=3 context_length=3 embed_method=mean_pooling diversity_coef=0.5"
        more += ["--ebft", fields, "--answer-tokens", 2, "--generations", 8, "--batch-size", 8, "--lr", 0.03]
    run("train", *arguments(llama, tmp_path, mode), *more)
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["after"]["alignment"] > found["before"]["alignment"] + 0.2
    state = next((tmp_path / "run" / "checkpoints").glob("*-40/trainer_state.json"))
    rewards = [each["reward"] for each in json.loads(state.read_text())["log_history"] if "reward" in each]
    assert sum(rewards[-10:]) > sum(rewards[:10]) + 1
    assert "perplexity" in run("eval", "-a", tmp_path / "run", "-d", tmp_path / "rows.jsonl").output
    run("generate", "-a", tmp_path / "run", "-p", "the film is")


def test_cross_entropy_alone_is_that_of_other_runs(run: Run, llama: Path, tmp_path: Path) -> None:
    """Also with gradient checkpointing, where texts are sampled in evaluation mode."""
    options = list(arguments(llama, tmp_path, "strided"))
    first, last = options.index("--ebft"), options.index("--batch-size")
    of_ebft = ["--ebft", "mode=strided rl_coef=0 ce_coef=1 context_length=3", "--generations", 4, "--answer-tokens", 4]
    both = []
    for name, ebft in (("ce", of_ebft), ("plain", [])):
        chosen = [*options[:first], *ebft, *options[last:], "--gradient-checkpointing", "--steps", 2]
        run("train", *chosen, "-o", tmp_path / name)
        both.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    for name in both[0]:
        torch.testing.assert_close(both[0][name], both[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("field", [{"min_p": 1.0}, {"suppress_tokens": list(range(3, TOKENS))}, {"num_beams": 3}])
def test_answers_are_sampled_from_the_model_alone(field: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the generation config says of sampling would give tokens other probabilities than those of the loss."""
    model, _ = models()
    seen = []
    keep = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: seen.append(keep(**inputs)) or seen[-1], raising=False)
    for each in ({}, field):
        model.generation_config.update(**each)
        torch.manual_seed(0)
        rollouts("", samples=6, temperature=3.0).structured(model, TEXT, PROMPTED)
    assert torch.equal(*seen)
    assert all(getattr(model.generation_config, name) == value for name, value in field.items())
