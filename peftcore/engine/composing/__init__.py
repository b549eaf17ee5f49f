"""Adapters made from adapters: weighted sums, low-rank approximations, and values replaced in place."""
