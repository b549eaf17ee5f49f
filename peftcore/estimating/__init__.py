"""Whether a training step fits, where its memory goes, and how long it takes: by running it without memory."""

from peftcore.estimating.choosing import Suggestion, Way, suggest
from peftcore.estimating.devices import CARDS, Device, device_of, memory_here
from peftcore.estimating.following import NotFollowed
from peftcore.estimating.prediction import Estimate, estimate
from peftcore.estimating.step import Step

__all__ = [
    "CARDS",
    "Device",
    "Estimate",
    "NotFollowed",
    "Step",
    "Suggestion",
    "Way",
    "device_of",
    "estimate",
    "memory_here",
    "suggest",
]
