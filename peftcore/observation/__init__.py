"""Facts seen on a model: small inputs that it takes, and what one forward with them does."""

from peftcore.observation.inputs import example_inputs
from peftcore.observation.trace import Trace, trace

__all__ = ["Trace", "example_inputs", "trace"]
