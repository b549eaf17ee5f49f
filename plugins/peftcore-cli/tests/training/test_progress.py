"""Memory that a run reports."""

import pytest
import torch
from peftcore_cli.training import progress


@pytest.mark.parametrize("used", [0, 7])
def test_memory_is_that_of_the_cards_in_use(monkeypatch: pytest.MonkeyPatch, used: int) -> None:
    """A run on the processor of a machine with cards reports resident bytes; one on cuda:1 that card's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index=0: used * index)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index=0: min(used, 5) * index)
    assert progress.current_memory() == 5 if used else progress.current_memory() > 1e6
    assert progress.peak_memory().get("CUDA memory") == (used or None)
