"""Stages of `benchmarks/card.py`. What starts and watches their processes needs the standard library alone."""
