"""Cases that prove the CUDA kernels on a card, for `benchmarks/card.py`, which has no pytest, and for pytest."""
