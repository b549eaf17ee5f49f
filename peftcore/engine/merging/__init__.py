"""Merge adapters into the weights, checking that the result is equivalent, and unmerge them.

It imports `adaptation` and the record of adapters. Public names: `merge`, `merge_error` and `unmerge` (merge.py),
`mergeable` and `changes_nothing` (merged_layers.py), and for plugins functions that test what a layer computes
(merge_check.py).
"""
