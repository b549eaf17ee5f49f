"""Tasks: how rows become tensors, and what is measured. Each task with inputs or a loss of its own has a module."""
