"""A main job on the small checkpoint that has been done, for tests to look at."""

from dataclasses import dataclass
from pathlib import Path

from moejax.evaluate.divergence import Evaluation
from moejax.formats import parse_format
from moejax.pipeline.job import Planned
from moejax.pipeline.recipe import Recipe

# Fewer than usual: every format is compiled for every shape.
FORMATS = ("int1g128", "ternaryg128", "int2g128", "int3g128", "int4g128", "int8g128")
RECIPE = Recipe(tuple(map(parse_format, FORMATS)))


@dataclass(frozen=True)
class Job:
    """What was asked for and what came of it."""

    budget: int
    planned: Planned
    written: int
    output: Path
    evaluation: Evaluation
