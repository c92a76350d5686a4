from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import pytest

from moejax.calibrate import ExpertStatistics, Inputs
from moejax.formats import ExpertWeights, Leaf
from moejax.pipeline.job import Prepared
from moejax.pipeline.rounded import RoundedWeights
from moejax.pipeline.working_copy import one_bucket
from moejax.planning import KEEP
from moejax.transforms.rounder import Projection, Wanted

INPUTS = Inputs(jnp.ones(1))


@dataclass
class Counting:
    """Rounds each to a matrix of ten bytes, all its number, and keeps the numbers it was asked for."""

    asked: list[int] = field(default_factory=list)

    def matrix(self, name: str, leaf: Leaf, inputs: Inputs, target: str) -> Leaf:
        self.asked.append(0)
        return jnp.full(10, 0, jnp.uint8)

    def experts(self, wanted: Sequence[Wanted]) -> list[list[Leaf]]:
        members = [[own.of.members[k] for k in own.some] for own in wanted]
        self.asked += [e for own in members for e in own]
        return [[jnp.full(10, e, jnp.uint8) for e in own] for own in members]

    @property
    def afresh(self) -> "Counting":
        return self


@pytest.fixture(scope="module")
def statistics(prepared: Prepared) -> ExpertStatistics:
    assert prepared.trials.statistics.known is not None
    (found,) = (own.experts for own in prepared.trials.statistics.known.blocks[-1:])
    assert found is not None
    return found


def first(leaf: Leaf) -> int:
    assert isinstance(leaf, jax.Array)
    return int(leaf[0])


def every(statistics: ExpertStatistics, members: Sequence[int], target: str = "int2g128") -> Wanted:
    """All of some experts."""
    weights: ExpertWeights = one_bucket(jnp.zeros((len(members), 1, 1)))
    of = Projection("layers.1.mlp.experts.up", members, weights, statistics)
    return Wanted(of, range(len(members)), target)


def numbers(rounder: RoundedWeights, *wanted: Wanted) -> list[list[int]]:
    """Which experts come back."""
    return [list(map(first, leaves)) for leaves in rounder.experts(wanted)]


def test_what_rounds_afresh_remembers_nothing() -> None:
    rounder = RoundedWeights(1000, counting := Counting())
    for _ in range(2):
        rounder.afresh.matrix("o", jnp.zeros(1), INPUTS, "int2g128")
    assert counting.asked == [0, 0]


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
    assert numbers(rounder, every(statistics, [4, 5, 6])) == [[4, 5, 6]]
    assert numbers(rounder, every(statistics, [7, 6, 5, 8])) == [[7, 6, 5, 8]]
    assert rounds.asked == [4, 5, 6, 7, 8]
    assert numbers(rounder, every(statistics, [4, 9]), every(statistics, [4], "int3g128"), every(statistics, [5])) == [
        [4, 9],
        [4],
        [5],
    ]
    assert rounds.asked == [4, 5, 6, 7, 8, 9, 4]


@pytest.mark.parametrize(("most_bytes", "remembered"), [(0, 0), (9, 0), (10, 1), (29, 2), (30, 3)])
def test_what_has_no_room_is_rounded_again(statistics: ExpertStatistics, most_bytes: int, remembered: int) -> None:
    rounds = Counting()
    rounder = RoundedWeights(most_bytes, rounds)
    for _ in range(2):
        assert numbers(rounder, every(statistics, range(3))) == [[0, 1, 2]]
    assert len(rounds.asked) == 6 - remembered


def test_what_is_kept_is_what_is_given_each_time(statistics: ExpertStatistics) -> None:
    rounder, wanted = RoundedWeights(1 << 20), every(statistics, [4], KEEP)
    rounder.matrix("layers.0.mlp.up", jnp.zeros((1, 1)), INPUTS, KEEP)
    rounder.experts([wanted])
    as_stored = jnp.zeros((1, 1), jnp.bfloat16)
    assert rounder.matrix("layers.0.mlp.up", as_stored, INPUTS, KEEP) is as_stored
    stored = replace(wanted, of=replace(wanted.of, weights=one_bucket(as_stored[None])))
    ((kept,),) = rounder.experts([stored])
    assert isinstance(kept, jax.Array) and kept.dtype == jnp.bfloat16
