"""The cases on a card, one test each; without a card `test_card.py` runs those that the emulator runs."""

import pytest
import torch

from card.table import Case, Place, Skip, all_cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("case", all_cases() if torch.cuda.is_available() else [None], ids=str)
def test_case(case: Case) -> None:
    try:
        case.run(Place(torch.device("cuda")))
    except Skip as reason:
        pytest.skip(str(reason))
