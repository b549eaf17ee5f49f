"""Whether a training step fits, where its memory goes, and how long it takes: by running it without memory."""

from peftcore.estimating.choosing import Fit, Way, fit
from peftcore.estimating.devices import CARDS, Device, device_of, memory_here
from peftcore.estimating.following import NotFollowed
from peftcore.estimating.prediction import Estimate, estimate
from peftcore.estimating.step import Step

__all__ = [
    "CARDS",
    "Device",
    "Estimate",
    "Fit",
    "NotFollowed",
    "Step",
    "Way",
    "device_of",
    "estimate",
    "fit",
    "memory_here",
]
