"""Memory of a training step, predicted by running it on meta tensors."""

from peftcore.estimating.choosing import (
    PAGED as PAGED,
    PLAIN as PLAIN,
    Suggestion as Suggestion,
    Way as Way,
    suggest as suggest,
)
from peftcore.estimating.devices import memory_here as memory_here
from peftcore.estimating.following import NotFollowed as NotFollowed
from peftcore.estimating.loop import (
    OPTIMIZERS as OPTIMIZERS,
    make_inputs as make_inputs,
    make_optimizer as make_optimizer,
)
from peftcore.estimating.prediction import Estimate as Estimate, estimate as estimate
from peftcore.estimating.purpose import Purpose as Purpose
from peftcore.estimating.ranges import Range as Range
from peftcore.estimating.step import MIXED as MIXED, Step as Step
