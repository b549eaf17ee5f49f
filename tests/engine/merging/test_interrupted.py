"""A merge or unmerge that is interrupted leaves a model that computes the same; one that can be undone is undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn

import peftcore
from peftcore.engine.merging import merge as merging
from peftcore.engine.merging.merge import Exchange
from peftcore.plugin import Around

pytestmark = pytest.mark.usefixtures("toys")


class _Interrupted(BaseException):
    pass


def _interrupt(patch: pytest.MonkeyPatch, at: int) -> None:
    """Raise instead of the exchange number `at`, from 0."""
    put, count = Exchange.put, 0

    def counted(self: Exchange, name: str, tensor: Any) -> None:
        nonlocal count
        count += 1
        if count == at + 1:
            raise _Interrupted
        put(self, name, tensor)

    patch.setattr(Exchange, "put", counted)


def _model(kind: str) -> nn.Module:
    if kind == "tied":
        model = peftcore.apply(tiny.gpt2(), "train", names=("lm_head.weight",))
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        return peftcore.apply(model, "around", target_modules=("c_attn",), value=3.0, adapter="more")
    model = tiny.llama()
    if kind == "quantized":
        peftcore.quantize(model)
    return peftcore.apply(model, "around", target_modules=("q_proj", "v_proj"), value=3.0)


def _counted(model: nn.Module, **options: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        names: list[str] = []
        put = Exchange.put
        patch.setattr(Exchange, "put", lambda self, name, tensor: (names.append(name), put(self, name, tensor)))
        peftcore.merge(model, **options)
    return len(names)


_KINDS = ["dense", "quantized", "tied"]


def _options(kind: str) -> dict[str, Any]:
    return {"undo": True, **({"dtype": torch.float32} if kind == "quantized" else {})}


@pytest.mark.parametrize("kind", _KINDS)
def test_an_interrupted_merge_and_unmerge_are_undone(kind: str) -> None:
    options, model = _options(kind), _model(kind)
    before, acting = dict(model.named_parameters()), tiny.logits(model)
    number = _counted(model, **options)
    merged = dict(model.named_parameters())
    peftcore.unmerge(model)
    assert number >= 4
    for at in range(number):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(_Interrupted):
            _interrupt(patch, at)
            peftcore.merge(model, **options)
        assert all(p is before[name] for name, p in model.named_parameters()) and not peftcore.summary(model).merged
        assert torch.equal(tiny.logits(model), acting)
    peftcore.merge(model, **options)
    result, merged = tiny.logits(model), dict(model.named_parameters())
    for at in range(number):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(_Interrupted):
            _interrupt(patch, at)
            peftcore.unmerge(model)
        assert all(p is merged[name] for name, p in model.named_parameters()) and peftcore.summary(model).merged
        assert torch.equal(tiny.logits(model), result)
    peftcore.unmerge(model)
    assert torch.equal(tiny.logits(model), acting)


@pytest.mark.parametrize("kind", _KINDS)
def test_an_interrupted_merge_for_good_computes_the_same_and_is_refused(kind: str, tmp_path: Any) -> None:
    options = {**_options(kind), "undo": False}
    model = _model(kind)
    acting, at = tiny.logits(model), _counted(_model(kind), **options) - 1
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Interrupted):
        _interrupt(patch, at)
        peftcore.merge(model, **options)
    torch.testing.assert_close(tiny.logits(model), acting)
    match = r"interrupted after \d+ of \d+ layers.*Load the base and the adapters again"
    for call, *given in (
        (peftcore.save, tmp_path),
        (peftcore.activate, []),
        (peftcore.merge,),
        (peftcore.remove,),
        (peftcore.unmerge,),
    ):
        with pytest.raises(peftcore.PeftcoreError, match=match):
            call(model, *given)


def test_an_error_in_a_layer_after_the_first_is_written_keeps_what_is_merged() -> None:
    model = _model("dense")
    acting, layers = tiny.logits(model), merging.merged_layers

    def failing(*args: Any, checked: bool = False, **kwargs: Any) -> Any:
        for number, layer in enumerate(layers(*args, checked=checked, **kwargs)):
            if checked and number == 2:
                raise MemoryError
            yield layer

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(merging, "merged_layers", failing)
        peftcore.merge(model)
    torch.testing.assert_close(tiny.logits(model), acting)


@pytest.mark.parametrize("undo", [True, False])
def test_an_error_in_merged_of_a_plugin_leaves_the_model_unchanged(undo: bool) -> None:
    class Failing(tiny.Scaled):
        def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            raise RuntimeError("no")

    def place(model: nn.Module, config: Any, architecture: Any) -> list[Around]:
        names = ("q_proj", "k_proj")
        return [Around(f"model.layers.0.self_attn.{name}", kind(2.0)) for name, kind in zip(names, kinds, strict=True)]

    kinds = (tiny.Scaled, Failing)
    with tiny.installed(tiny.method("failing", place)):
        model = peftcore.apply(tiny.llama(), "failing")
        acting, before = tiny.logits(model), dict(model.named_parameters())
        with pytest.raises(peftcore.PluginError, match="no"):
            peftcore.merge(model, undo=undo)
        assert all(p is before[name] for name, p in model.named_parameters()) and not peftcore.summary(model).merged
        assert torch.equal(tiny.logits(model), acting)
