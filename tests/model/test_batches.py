"""Inputs of layers and gradients of weights, seen on batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.model import gradients_of, inputs_of, run

BATCHES = [{"input_ids": tiny.TOKENS + i, "labels": tiny.TOKENS + i} for i in range(3)]
PATHS = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"]


@pytest.mark.parametrize("batch", [tiny.TOKENS, (tiny.TOKENS,), [tiny.TOKENS], {"input_ids": tiny.TOKENS}])
def test_a_batch_is_what_the_model_is_called_with(batch: Any) -> None:
    model = tiny.llama()
    assert torch.equal(run(model, batch).logits, model(tiny.TOKENS).logits)


def test_inputs_come_in_order_with_their_batch_until_no_more_are_needed() -> None:
    model, seen, begun = tiny.llama(), [], []

    def read() -> Any:
        for batch in BATCHES:
            begun.append(batch)
            yield batch

    def visit(path: str, x: Tensor, batch: Any) -> bool:
        seen.append((path, x, batch))
        return path == PATHS[1] or len(seen) > 2

    inputs_of(model, PATHS, read(), visit)
    assert [(path, batch) for path, _, batch in seen] == [
        (PATHS[0], BATCHES[0]),
        (PATHS[1], BATCHES[0]),
        (PATHS[0], BATCHES[1]),
    ]
    hidden = model.model.norm.weight.numel()
    assert seen[1][1].shape == (2, 7, hidden) and len(begun) == 2
    layer = model.model.layers[0]
    assert not layer.mlp.down_proj._forward_pre_hooks
    wanted = []
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: wanted.append(args[0]))
    model(**BATCHES[1])
    assert torch.equal(seen[2][1], wanted[0])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("at_once", [1, 2])
def test_gradients_are_the_means_over_batches(count: int, at_once: int) -> None:
    model = tiny.llama()
    names = [f"{path}.weight" for path in PATHS] + ["model.norm.weight"]
    for batch in BATCHES[:count]:
        (model(**batch).loss / count).backward()
    wanted = {name: model.get_parameter(name).grad for name in names}
    model.zero_grad()
    found: dict[str, Tensor] = {}
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True).grad = torch.ones_like(model.model.norm.weight)
    with torch.no_grad():
        gradients_of(model, names, iter(BATCHES[:count]), found.__setitem__, at_once=at_once)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-7, rtol=1e-5)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]
    assert model.model.norm.weight.grad.eq(1).all()


def test_gradients_of_16_bits_are_summed_in_32_and_of_a_loss_that_is_given() -> None:
    model, found = tiny.llama().bfloat16(), {}
    loss = lambda answer, batch: answer.logits.float().mean()  # noqa: E731
    gradients_of(model, ["lm_head.weight"], [tiny.TOKENS] * 2, found.__setitem__, loss=loss)
    loss(model(tiny.TOKENS), None).backward()
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight.grad.float())


def test_gradients_of_a_shared_parameter_have_all_its_names() -> None:
    model, found = tiny.llama(), {}
    model.lm_head.weight = model.model.embed_tokens.weight
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    for count in (1, 2):
        gradients_of(model, [*names, names[0]], BATCHES[:1] * count, found.__setitem__, at_once=1)
        assert list(found) == names and found[names[0]].any() and torch.equal(*found.values())
        found.clear()


def test_what_trains_is_restored_after_an_error() -> None:
    model = tiny.llama()
    with torch.inference_mode():
        model.idle = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(RuntimeError, match="inference"):
        gradients_of(model, ["lm_head.weight", "idle"], BATCHES, print)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["idle"]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_tensors_in_lists_are_moved() -> None:
    moved: list[Any] = []

    class Recorded(Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            moved.extend(args)
            return super().to(*args, **kwargs)

    class OfList(nn.Linear):
        def forward(self, parts: list[Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(parts[0])

    run(OfList(3, 2), {"parts": [torch.ones(4, 3).as_subclass(Recorded)]})
    assert moved == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("observe", "match"),
    [
        (lambda m: inputs_of(m, ["nothing"], BATCHES, print), "'nothing' is not a module"),
        (lambda m: inputs_of(m, ["model.layers"], BATCHES, print), "'model.layers' was not called"),
        (lambda m: inputs_of(m, PATHS, iter([]), print), "`batches` is empty"),
        (lambda m: gradients_of(m, ["nothing"], BATCHES, print), "'nothing' is not a parameter"),
        (lambda m: gradients_of(m, ["lm_head.weight"], [tiny.TOKENS], print), "the model did not return a loss"),
        (lambda m: gradients_of(m, ["idle", "lm_head.weight"], BATCHES, print), "'idle' has no gradient"),
        (
            lambda m: gradients_of(m, ["idle"], BATCHES, print),
            "'idle' has no gradient, because the loss does not depend on it",
        ),
        (lambda m: inputs_of(m, [PATHS[0], PATHS[0], "lm_head.x"], BATCHES, print), "'lm_head.x' is not a module"),
        (
            lambda m: gradients_of(m, ["packed"], BATCHES, print),
            "'packed' has no gradient, because it is stored as torch.uint8",
        ),
    ],
)
def test_what_is_wrong_is_said(observe: Any, match: str, capsys: Any) -> None:
    model = tiny.llama()
    model.idle = nn.Parameter(torch.ones(2))
    model.packed = nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(peftcore.PeftcoreError, match=match):
        observe(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
