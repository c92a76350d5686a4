"""One pass over calibration text: statistics of every weight's input, layer by layer."""

from moejax.calibrate.calibration import Calibration, calibrate
from moejax.calibrate.expert_statistics import ExpertStatistics, unseen_experts
from moejax.calibrate.gradients import output_weights, weighing_outputs
from moejax.calibrate.products import Inputs
from moejax.calibrate.statistics import BlockStatistics, OutputWeights, Statistics

__all__ = [
    "BlockStatistics",
    "Calibration",
    "ExpertStatistics",
    "Inputs",
    "OutputWeights",
    "Statistics",
    "calibrate",
    "output_weights",
    "unseen_experts",
    "weighing_outputs",
]
