"""One pass over calibration text: statistics of every weight's input, layer by layer."""

from moejax.calibrate.following import Following
from moejax.calibrate.observe import calibrate
from moejax.calibrate.statistics import BlockStatistics, ExpertStatistics, Inputs, Statistics

__all__ = ["BlockStatistics", "ExpertStatistics", "Following", "Inputs", "Statistics", "calibrate"]
