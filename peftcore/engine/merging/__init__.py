"""Merge adapters into the weights, exactly or not at all, and unmerge them.

It imports `adaptation` and the record of adapters. Public: `merge`, `merge_error` and `unmerge` (merge.py), `mergeable`
and `changes_nothing` (merged_layers.py), and for plugins what a layer computes (merge_check.py).
"""
