"""Mixtures of experts whose weights are parameters `[experts, out, in]`: what is known of them, and their forward."""

from peftcore.experts.forward import Thin, experts_forward
from peftcore.experts.layout import ExpertsLayout, experts_layout

__all__ = ["ExpertsLayout", "Thin", "experts_forward", "experts_layout"]
