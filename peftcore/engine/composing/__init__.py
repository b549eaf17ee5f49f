"""Make adapters from existing adapters: weighted sums and low-rank approximations.

It imports `adaptation`, `merging` and the record of adapters. Public names: `combine` (combining.py) and `convert`
(converting.py), and for files and exporters the factors of adapters (low_rank.py) and their `difference`
(compatibility.py).
"""
