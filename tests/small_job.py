"""A main job on the small checkpoint that has been done, for tests to look at."""

from dataclasses import dataclass
from pathlib import Path

from moejax.evaluate.divergence import Evaluation
from moejax.pipeline.compress import Planned


@dataclass(frozen=True)
class Job:
    """What was asked for and what came of it."""

    budget: int
    planned: Planned
    written: int
    output: Path
    evaluation: Evaluation
