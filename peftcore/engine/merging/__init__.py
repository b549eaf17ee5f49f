"""Merge adapters into the weights, checking that the result is equivalent, and unmerge them.

- `merge.py`: the public functions `merge`, `merge_error` and `unmerge`, which write the merged weights and restore the
  original ones
- `merged_layers.py`: computes the merged parameters of each module (`can_merge`, `changes_nothing`)
- `merge_check.py`: compares the outputs of a module before and after merging
"""
