"""Facts seen on a model: small inputs that it takes, and what one forward with them does."""

from peftcore.observation.bypass import asked_for_dtype, bypassed, rewritten
from peftcore.observation.inputs import example_inputs
from peftcore.observation.tracing import Trace, observe, trace

__all__ = ["Trace", "asked_for_dtype", "bypassed", "example_inputs", "observe", "rewritten", "trace"]
