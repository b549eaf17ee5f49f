"""A vocabulary that was resized after loading: its new rows go with the adapter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import tiny
from torch import nn

import peftcore
from peftcore.files import resized_vocabulary
from peftcore.testing import disturb

pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def make(request, tmp_path: Path) -> Callable[[int, int], nn.Module]:
    """(seed of the new rows, size of the vocabulary) -> a model that was loaded with one of 96."""
    config = type(tiny.llama().config).from_dict(
        {**tiny.llama().config.to_dict(), "tie_word_embeddings": request.param}
    )
    torch.manual_seed(0)
    cls = type(tiny.llama())
    cls(config).save_pretrained(tmp_path / "base")

    def made(seed: int, size: int = 100) -> nn.Module:
        model = cls.from_pretrained(tmp_path / "base").eval()
        model.resize_token_embeddings(size, mean_resizing=False)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in {model.get_input_embeddings().weight, model.lm_head.weight}:
                weight[96:].normal_(std=0.02)
        return model

    return made


TOKENS = torch.tensor([[5, 97, 3, 60, 99, 22, 98], [8, 4, 77, 31, 2, 50, 63]])


def test_it_is_seen(make) -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    assert resized_vocabulary.resized_parameters(make(1)) == names
    assert (
        resized_vocabulary.resized_parameters(make(1, 96)) == resized_vocabulary.resized_parameters(tiny.llama()) == []
    )


@pytest.mark.parametrize("method", ["around", "soft"])
def test_new_rows_are_saved_and_belong_to_the_adapter(make, method: str, tmp_path: Path) -> None:
    model = peftcore.apply(make(1), method)
    disturb(model, "default", seed=1)
    wanted = tiny.logits(model, input_ids=TOKENS)
    peftcore.save(model, tmp_path / "once")
    again = make(2)
    base = tiny.logits(again, input_ids=TOKENS)
    peftcore.load(again, tmp_path / "once", trainable=True)
    assert torch.equal(tiny.logits(again, input_ids=TOKENS), wanted)
    trained = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    assert trained and not any("weight" in name for name in trained)
    with peftcore.disabled(again):
        assert torch.equal(tiny.logits(again, input_ids=TOKENS), base)
    peftcore.save(again, tmp_path / "twice")
    third = peftcore.load(make(3), tmp_path / "twice")
    assert torch.equal(tiny.logits(third, input_ids=TOKENS), wanted)
    peftcore.remove(again)
    assert torch.equal(tiny.logits(again, input_ids=TOKENS), base)


def test_the_error_for_a_base_that_was_not_resized_names_the_way(make, tmp_path: Path) -> None:
    peftcore.save(peftcore.apply(make(1), "around"), tmp_path)
    with pytest.raises(
        peftcore.CheckpointError, match=r"resized vocabulary, so resize.*model.resize_token_embeddings\(100\)"
    ):
        peftcore.load(make(1, 96), tmp_path)


def test_new_rows_of_which_nothing_tells_are_another_base(make, tmp_path: Path) -> None:
    """The checkpoint is gone, so no file holds the new rows; a load with other ones is refused."""
    model = peftcore.apply(make(1), "around")
    model.config._name_or_path = ""
    peftcore.save(model, tmp_path / "adapter")
    peftcore.load(make(1), tmp_path / "adapter")
    with pytest.raises(peftcore.CheckpointError, match=r"another base: the values of .*new rows of a vocabulary"):
        peftcore.load(make(2), tmp_path / "adapter")
