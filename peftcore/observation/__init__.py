"""Facts seen on a model: small inputs that it takes, and what one forward with them does."""

from peftcore.observation.inputs import example_inputs

__all__ = ["example_inputs"]
