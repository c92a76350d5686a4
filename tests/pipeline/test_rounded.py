from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import pytest

from moejax.calibrate import ExpertStatistics, Inputs
from moejax.formats import ExpertWeights, Leaf
from moejax.pipeline.job import Prepared
from moejax.pipeline.rounded import RoundedWeights
from moejax.pipeline.working_copy import one_bucket
from moejax.planning import KEEP
from moejax.transforms.rounder import Projection

INPUTS = Inputs(jnp.ones(1))


@dataclass
class Counting:
    """Rounds each to a matrix of ten bytes, all its number, and keeps the numbers it was asked for."""

    asked: list[int] = field(default_factory=list)

    def matrix(self, name: str, leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
        self.asked.append(0)
        return jnp.full(10, 0, jnp.uint8)

    def experts(self, of: Projection, some: Sequence[int], target: str) -> list[Leaf]:
        self.asked += [of.members[k] for k in some]
        return [jnp.full(10, of.members[k], jnp.uint8) for k in some]


@pytest.fixture(scope="module")
def statistics(prepared: Prepared) -> ExpertStatistics:
    assert prepared.trials.statistics.known is not None
    (found,) = (own.experts for own in prepared.trials.statistics.known.blocks[-1:])
    assert found is not None
    return found


def first(leaf: Leaf) -> int:
    assert isinstance(leaf, jax.Array)
    return int(leaf[0])


def experts(statistics: ExpertStatistics, members: Sequence[int]) -> Projection:
    weights: ExpertWeights = one_bucket(jnp.zeros((len(members), 1, 1)))
    return Projection("layers.1.mlp.experts.up", members, weights, statistics)


def test_a_matrix_is_rounded_once_to_every_format() -> None:
    rounds = Counting()
    rounder, leaf = RoundedWeights(1 << 20, rounds), jnp.zeros((1, 1))
    once = rounder.matrix("layers.0.mlp.up", leaf, INPUTS, "int2g128")
    assert rounder.matrix("layers.0.mlp.up", leaf, INPUTS, "int2g128") is once and len(rounds.asked) == 1
    rounder.matrix("layers.0.mlp.up", leaf, INPUTS, "int3g128")
    rounder.matrix("layers.1.mlp.up", leaf, INPUTS, "int2g128")
    assert len(rounds.asked) == 3


def test_of_several_only_those_not_known_are_rounded(statistics: ExpertStatistics) -> None:
    rounds = Counting()
    rounder = RoundedWeights(1 << 20, rounds)
    assert list(map(first, rounder.experts(experts(statistics, [4, 5, 6]), range(3), "int2g128"))) == [4, 5, 6]
    other = experts(statistics, [7, 6, 5, 8])
    assert list(map(first, rounder.experts(other, [0, 1, 2, 3], "int2g128"))) == [7, 6, 5, 8]
    assert rounds.asked == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(("most_bytes", "remembered"), [(0, 0), (9, 0), (10, 1), (29, 2), (30, 3)])
def test_what_has_no_room_is_rounded_again(statistics: ExpertStatistics, most_bytes: int, remembered: int) -> None:
    rounds = Counting()
    rounder = RoundedWeights(most_bytes, rounds)
    for _ in range(2):
        assert list(map(first, rounder.experts(experts(statistics, range(3)), range(3), "int2g128"))) == [0, 1, 2]
    assert len(rounds.asked) == 6 - remembered


def test_what_is_kept_is_what_is_given_each_time(statistics: ExpertStatistics) -> None:
    rounder, of = RoundedWeights(1 << 20), experts(statistics, [4])
    rounder.matrix("layers.0.mlp.up", jnp.zeros((1, 1)), INPUTS, KEEP)
    rounder.experts(of, [0], KEEP)
    as_stored = jnp.zeros((1, 1), jnp.bfloat16)
    assert rounder.matrix("layers.0.mlp.up", as_stored, INPUTS, KEEP) is as_stored
    stored = Projection(of.name, of.members, one_bucket(as_stored[None]), of.statistics)
    (kept,) = rounder.experts(stored, [0], KEEP)
    assert isinstance(kept, jax.Array) and kept.dtype == jnp.bfloat16
