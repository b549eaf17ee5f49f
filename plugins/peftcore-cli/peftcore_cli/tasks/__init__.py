"""Tasks: encode rows as tensors, train and evaluate. A task with its own inputs or loss has its own module."""
