"""Adapters worked into the weights, exactly or not at all, and taken out again."""
