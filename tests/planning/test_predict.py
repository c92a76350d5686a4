import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.planning import predict
from moejax.planning.predict import Curve, LossCurves, Losses, curve_of

amounts = st.floats(0, 1e3)
losses = st.builds(Losses, amounts, amounts, amounts)
POINTS = ((0.01, 0.02), (0.1, 0.15), (0.5, 1.5))


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Without points, or through up to six that ascend."""
    steps = draw(st.lists(st.tuples(st.floats(1.01, 10), st.floats(1.01, 10)), max_size=6))
    sums, together = np.cumprod([(draw(st.floats(1e-6, 1)), draw(st.floats(1e-6, 1))), *steps], axis=0).T.tolist()
    return Curve(tuple(zip(sums, together, strict=True)) if steps else ())


every_curve = st.builds(LossCurves, curves(), curves(), curves())


@given(curves())
def test_a_curve_goes_through_its_points(curve: Curve) -> None:
    for total, together in curve.points:
        assert curve(total) == pytest.approx(together, rel=1e-9)


@given(curves(), st.floats(0, 1))
def test_between_points_it_is_straight_in_the_logarithms(curve: Curve, share: float) -> None:
    for (before, low), (after, high) in pairwise(curve.points):
        total = before ** (1 - share) * after**share
        assert curve(total) == pytest.approx(low ** (1 - share) * high**share, rel=1e-6)


@given(st.floats(1e-9, 1))
def test_beyond_its_points_the_nearest_one_s_ratio_holds(share: float) -> None:
    curve = Curve(POINTS)
    assert curve(0.01 * share) == pytest.approx(0.02 * share)
    assert curve(0.5 / share) == pytest.approx(1.5 / share)


@given(amounts)
def test_without_points_it_is_the_sum(total: float) -> None:
    assert Curve()(total) == total and Curve().slope(total) == 1


@given(curves(), st.lists(st.floats(0, 1e6), min_size=2, max_size=8))
def test_a_larger_sum_never_costs_less(curve: Curve, totals: list[float]) -> None:
    costs = [curve(total) for total in sorted(totals)]
    assert all(less <= more * (1 + 1e-9) for less, more in pairwise(costs))


@pytest.mark.parametrize("total", [0.0, -1.0])
def test_nothing_costs_nothing(total: float) -> None:
    assert Curve(POINTS)(total) == Curve()(total) == 0


def test_the_slope_is_the_derivative() -> None:
    """A power law through two points, whose derivative is known; beyond them the ratio."""
    power = Curve(((0.01, 0.01**1.5), (1.0, 1.0)))
    for total in (0.02, 0.1, 0.7):
        assert power.slope(total) == pytest.approx(1.5 * total**0.5, rel=0.01)
    curve = Curve(POINTS)
    assert [curve.slope(total) for total in (0.0, 1e-3, 5.0)] == pytest.approx([2, 2, 3])


def test_a_curve_of_measurements_leaves_out_what_does_not_ascend() -> None:
    sums, together = [0.3, 0.0, 0.1, 0.2, 0.2, 0.4], [0.5, 0.0, 0.2, 0.1, 0.3, -0.1]
    assert curve_of(sums, together) == Curve(((0.1, 0.2), (0.2, 0.3), (0.3, 0.5)))
    assert curve_of([], []) == curve_of([0.0], [0.0]) == Curve()


@given(losses)
def test_without_curves_all_losses_lie_between_the_larger_family_and_the_sum(own: Losses) -> None:
    rounding, pruning = own.others + own.experts, own.pruning
    together = LossCurves().together(own)
    assert max(rounding, pruning) * (1 - 1e-9) <= together <= (rounding + pruning) * (1 + 1e-9)
    if min(rounding, pruning) > 1e-3 * max(rounding, pruning) > 0:
        assert max(rounding, pruning) < together < rounding + pruning
    assert LossCurves().together(own._replace(pruning=0.0)) == pytest.approx(rounding)
    assert LossCurves().together(Losses(0.0, 0.0, pruning)) == pytest.approx(pruning)


@given(losses, st.sampled_from([1.0, 1.3, 2.0, 60.0]))
def test_losses_together_are_their_equation(own: Losses, exponent: float) -> None:
    """At exponent 1 the sum, at a large one the larger."""
    scaled = Losses(*(value / 1e3 for value in own))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "_EXPONENT", exponent)
        found = LossCurves(experts=Curve(((1.0, 2.0),)), pruning=Curve(((1.0, 0.5),))).together(scaled)
    rounding, pruning = scaled.others + 2 * scaled.experts, 0.5 * scaled.pruning
    assert found == pytest.approx(math.pow(rounding**exponent + pruning**exponent, 1 / exponent), abs=1e-15)
    if exponent == 1:
        assert found == pytest.approx(rounding + pruning)
    if exponent == 60 and max(rounding, pruning) > 1e-3:
        assert found == pytest.approx(max(rounding, pruning), rel=0.012)


@given(every_curve, losses, st.sampled_from(Losses._fields), st.floats(1, 100))
def test_more_of_any_loss_never_costs_less(every: LossCurves, own: Losses, family: str, factor: float) -> None:
    more = own._replace(**{family: factor * getattr(own, family)})
    assert every.together(own) <= every.together(more) * (1 + 1e-9)


def test_what_rounding_experts_weighs() -> None:
    every = LossCurves(others=Curve(((1.0, 2.0),)), experts=Curve(POINTS), pruning=Curve(((1.0, 9.0),)))
    assert every.expert_weight(Losses(0.3, 5.0, 0.1)) == pytest.approx(1.5)
    assert LossCurves().expert_weight(Losses(0.3, 5.0, 0.1)) == 1
    # Steeper than its ratio, because the ratio grows.
    assert 2 < LossCurves(experts=Curve(POINTS)).expert_weight(Losses(0.3, 0.3, 0.1)) < 5
