"""One pass over calibration text: statistics of every weight's input, layer by layer."""

from moejax.calibrate.calibration import Calibration, calibrate
from moejax.calibrate.expert_statistics import ExpertStatistics, unseen_experts
from moejax.calibrate.products import Inputs
from moejax.calibrate.statistics import BlockStatistics, Statistics

__all__ = ["BlockStatistics", "Calibration", "ExpertStatistics", "Inputs", "Statistics", "calibrate", "unseen_experts"]
