"""Adapters made from adapters: weighted sums and low-rank approximations.

It imports `adaptation`, `merging` and the record of adapters. Public: `combine` (combining.py), `convert`
(converting.py), and for files and exporters the factors of adapters (low_rank.py) and their `difference`
(compatibility.py).
"""
