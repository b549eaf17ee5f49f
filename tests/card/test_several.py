"""The cases of two cards, on two processes of the CPU."""

import pytest
import torch

from card import several
from card.table import Place, Skip, all_cases


@pytest.mark.nightly
def test_two_ranks_are_as_one() -> None:
    said = several.run(several.ALL, "gloo")
    assert [each.partition(" off by ")[0] for each in said.split(", ")] == several.ALL


@pytest.mark.parametrize("count", [0, 1])
def test_a_machine_with_one_card_skips_them(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))
    (case, *_) = [case for case in all_cases() if case.function == "on_two_cards"]
    with pytest.raises(Skip, match=f"needs two cards, found {count}"):
        case.run(Place(torch.device("cuda")))
