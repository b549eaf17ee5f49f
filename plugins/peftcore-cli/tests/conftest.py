"""Fixtures of the command line, which plugins with commands share."""

from support.command_fixtures import bert, labelled, llama, quick_pictures, reviews, run
from support.toys import toys

__all__ = ["bert", "labelled", "llama", "quick_pictures", "reviews", "run", "toys"]
