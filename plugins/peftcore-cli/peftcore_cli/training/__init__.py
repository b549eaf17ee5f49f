"""Training runs: the forecast before a run, the run itself, and what it reports."""
