"""Tiny models in folders, files of examples, and a way to run commands, as tests/cli has them."""

from support.command_fixtures import bert, labelled, llama, quick_pictures, reviews, run

__all__ = ["bert", "labelled", "llama", "quick_pictures", "reviews", "run"]
