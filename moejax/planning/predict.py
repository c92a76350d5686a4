"""What the losses of a plan come to together: predicted mean KL divergence from sums of single costs.

Single costs are measured one weight, or one layer's pruning, at a time. Roughly rounded experts were seen to lose up to
twice their sum together, and pruning to cost less where the survivors are rough (tools/bench/RESULTS.md). So sums are
kept by family, a curve per family says what a sum really costs, and

    KL = ((others + experts)^a + pruning^a)^(1/a)

with the families' curves applied. a = 1 would be the plain sum, infinity the larger of the two.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Between 1 and 1.6 fits what was measured on small models (tools/bench/RESULTS.md).
_EXPONENT = 1.3
_TINY = 1e-12


class Losses(NamedTuple):
    """Summed costs by family: rounding of weights outside the routed experts, of the routed experts, and pruning."""

    others: float
    experts: float
    pruning: float


@dataclass(frozen=True)
class Curve:
    """From a sum of single costs to what they cost together, through measured points (sum, together), both ascending.

    Between points linear in the logarithms; outside of them the nearest point's ratio holds. Without points, the sum.
    """

    points: tuple[tuple[float, float], ...] = ()

    def __call__(self, total: float) -> float:
        if not self.points or total <= 0:
            return max(total, 0.0)
        sums, together = np.log(np.asarray(self.points)).T
        return float(total * np.exp(np.interp(np.log(total), sums, together - sums)))

    def slope(self, total: float) -> float:
        """How much one unit of single costs more costs there; exactly 1 without points."""
        if not self.points:
            return 1.0
        total = max(total, _TINY)
        return (self(1.01 * total) - self(total)) / (0.01 * total)


def curve_of(sums: list[float], together: list[float]) -> Curve:
    """The curve through what was measured: what costs nothing, or less than a smaller sum, is left out."""
    points: list[tuple[float, float]] = []
    for point in sorted(zip(sums, together, strict=True)):
        if min(point) > _TINY and (not points or (point[0] > points[-1][0] and point[1] > points[-1][1])):
            points.append(point)
    return Curve(tuple(points))


@dataclass(frozen=True)
class LossCurves:
    """A curve per family; without any, costs are taken as they are."""

    others: Curve = Curve()
    experts: Curve = Curve()
    pruning: Curve = Curve()

    def together(self, losses: Losses) -> float:
        """Predicted mean KL, nats."""
        rounding = self.others(losses.others) + self.experts(losses.experts)
        return float((rounding**_EXPONENT + self.pruning(losses.pruning) ** _EXPONENT) ** (1 / _EXPONENT))

    def expert_weight(self, losses: Losses) -> float:
        """What a unit of cost of rounding experts weighs against one of other weights."""
        return self.experts.slope(losses.experts) / self.others.slope(losses.others)
