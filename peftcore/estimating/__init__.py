"""Memory and time of a training step, predicted by running it on meta tensors."""

from peftcore.estimating.choosing import Suggestion, Way, suggest
from peftcore.estimating.devices import CARDS, Device, device_of, memory_here
from peftcore.estimating.following import NotFollowed
from peftcore.estimating.prediction import Estimate, estimate
from peftcore.estimating.ranges import Range
from peftcore.estimating.step import Step

__all__ = [
    "CARDS",
    "Device",
    "Estimate",
    "NotFollowed",
    "Range",
    "Step",
    "Suggestion",
    "Way",
    "device_of",
    "estimate",
    "memory_here",
    "suggest",
]
