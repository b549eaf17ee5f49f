"""Merge adapters into the weights, exactly or not at all, and unmerge them."""
