"""Training runs: the memory forecast, the run and its report."""
