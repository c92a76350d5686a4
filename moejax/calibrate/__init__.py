"""One pass over calibration text: statistics of every weight's input, layer by layer."""

from moejax.calibrate.calibration import Calibration, calibrate
from moejax.calibrate.statistics import BlockStatistics, ExpertStatistics, Inputs, Statistics, unseen_experts

__all__ = ["BlockStatistics", "Calibration", "ExpertStatistics", "Inputs", "Statistics", "calibrate", "unseen_experts"]
