"""One thread for tiny matrices: more only wait for one another, ten times as long on a busy machine."""

from collections.abc import Iterator

import pytest
import torch
from support.command_fixtures import llama, reviews, run

__all__ = ["llama", "reviews", "run"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
