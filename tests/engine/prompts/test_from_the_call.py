"""Soft prompts that depend on the call: other vectors for each row of a batch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import tiny
from support.prompted import N, bart, check_steps, close, gemma3, generate, logits, padded
from support.tiny import TOKENS
from torch import Tensor, nn

import peftcore
from peftcore.plugin import Adapter, Architecture, Placement, SoftPrompt, current_call

TASKS = torch.tensor([2, 1])


class ByTask(Adapter):
    """The vectors of each row's task, `[batch, tokens, hidden]`; without tasks those of task 0, `[1, ...]`."""

    needs_call = ("task_ids",)
    tokens = N

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.vectors = nn.Parameter(torch.randn(3, N, hidden))

    def forward(self) -> Tensor:
        return self.vectors[current_call().get("task_ids", slice(1))]


def place(*tokens: int) -> Any:
    def placed(model: nn.Module, config: Any, architecture: Architecture) -> list[Placement]:
        hidden = architecture.hidden_size
        return [SoftPrompt(ByTask(hidden), (*tokens, hidden) if tokens else None)]

    return placed


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    with tiny.installed(tiny.method("bytask", place(N)), tiny.method("unsized", place())):
        yield


def by_task(model: nn.Module, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    return peftcore.apply(model, "bytask", **kwargs)


MODELS = {"llama": tiny.llama, "gemma3": gemma3, "roberta": tiny.roberta_classifier, "t5": tiny.t5, "bart": bart}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_each_row_has_its_own(make: Any) -> None:
    model = by_task(make())
    kwargs = {"decoder_input_ids": TOKENS[:, :4]} if model.config.is_encoder_decoder else {}
    found = logits(model, TOKENS, task_ids=TASKS, **kwargs)
    for row, task in enumerate(TASKS):
        own = {name: value[row : row + 1] for name, value in kwargs.items()}
        close(found[row], logits(model, TOKENS[row : row + 1], task_ids=task[None], **own)[0])
    assert not torch.allclose(found, logits(model, TOKENS, task_ids=TASKS.flip(0), **kwargs))
    close(logits(model, TOKENS, **kwargs), logits(model, TOKENS, task_ids=0 * TASKS, **kwargs))


def test_with_embedded_input_and_in_a_graph() -> None:
    model = by_task(tiny.llama())
    wanted = logits(model, TOKENS, task_ids=TASKS)
    close(logits(model, inputs_embeds=model.get_input_embeddings()(TOKENS), task_ids=TASKS), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for tasks in (TASKS, TASKS.flip(0)):
        close(logits(compiled, TOKENS, task_ids=tasks), logits(model, TOKENS, task_ids=tasks))


def test_steps_and_padding() -> None:
    model = by_task(tiny.llama())
    rows, mask = padded(TOKENS[:1], 10)
    with peftcore.call_arguments(model, task_ids=TASKS):
        for use_cache in (True, False):
            check_steps(model, generate(model, rows, mask, use_cache=use_cache), 10, mask)
            beams = generate(model, rows, mask, use_cache=use_cache, num_beams=3).sequences
        alone = generate(model, rows, mask).sequences
    for row, task in enumerate(TASKS):
        own = TOKENS[:1] if row else rows[:1]
        assert torch.equal(alone[row, 10:], generate(model, own, task_ids=task[None]).sequences[0, own.shape[1] :])
        several = generate(model, own, task_ids=task[None], num_beams=3).sequences
        assert torch.equal(beams[row, 10:], several[0, own.shape[1] :])


def test_two_prompts_of_which_one_depends() -> None:
    model = by_task(by_task(tiny.llama()), adapter="other")
    found = logits(model, TOKENS, task_ids=TASKS)
    for row, task in enumerate(TASKS):
        close(found[row], logits(model, TOKENS[row : row + 1], task_ids=task[None])[0])


def test_gradients_reach_the_tasks_of_the_batch() -> None:
    model = by_task(tiny.llama()).train()
    model(TOKENS, labels=TOKENS, task_ids=TASKS).loss.backward()
    (gradient,) = (p.grad for p in model.parameters() if p.requires_grad)
    assert [bool(each.any()) for each in gradient] == [False, True, True]


def test_another_number_of_rows_is_refused() -> None:
    model = by_task(tiny.llama())
    with pytest.raises(peftcore.PeftcoreError, match=r"\[2 or 1, 3, 32\] in a batch of 2; ByTask .*\[3, 3, 32\]"):
        logits(model, TOKENS, task_ids=torch.arange(3))
    with pytest.raises(peftcore.PeftcoreError, match="acts on the batch as a whole"):
        peftcore.activate(model, ["default", None], per_sample=True)


def test_the_shape_is_said_beforehand() -> None:
    with pytest.raises(peftcore.PeftcoreError, match=r"SoftPrompt\(adapter, shape=\(tokens, hidden\)\)"):
        peftcore.apply(tiny.llama(), "unsized")
