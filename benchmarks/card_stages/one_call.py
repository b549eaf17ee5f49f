"""Run one call of tests/card/runtime.py under a tool such as compute-sanitizer.

python -m card_stages.one_call NAME
"""

import sys

import torch
from card.runtime import CALLS
from card.table import Place

if __name__ == "__main__":
    CALLS[sys.argv[1]](Place(torch.device("cuda"))).run()
    torch.cuda.synchronize()
