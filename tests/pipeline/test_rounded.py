from collections.abc import Sequence

import jax
import jax.numpy as jnp
import pytest

from moejax.formats import Leaf
from moejax.pipeline.rounded import RoundedWeights


class Counting:
    """Rounds each to a matrix of ten bytes, all its position, and keeps the positions it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, some: Sequence[int]) -> list[Leaf]:
        self.asked += some
        return [jnp.full(10, i, jnp.uint8) for i in some]


def first(leaf: Leaf) -> int:
    assert isinstance(leaf, jax.Array)
    return int(leaf[0])


def test_a_matrix_is_rounded_once_to_every_format() -> None:
    rounder, rounds = RoundedWeights(1 << 20), Counting()
    (once,) = rounder(["layers.0.mlp.up"], "int2g128", rounds)
    assert rounder(["layers.0.mlp.up"], "int2g128", rounds)[0] is once and len(rounds.asked) == 1
    rounder(["layers.0.mlp.up"], "int3g128", rounds)
    rounder(["layers.1.mlp.up"], "int2g128", rounds)
    assert len(rounds.asked) == 3


def test_of_several_only_those_not_known_are_rounded() -> None:
    rounder, rounds = RoundedWeights(1 << 20), Counting()
    assert list(map(first, rounder("abc", "int2g128", rounds))) == [0, 1, 2]
    assert list(map(first, rounder("dcbe", "int2g128", rounds))) == [0, 2, 1, 3]
    assert rounds.asked == [0, 1, 2, 0, 3]


@pytest.mark.parametrize(("most_bytes", "remembered"), [(0, 0), (9, 0), (10, 1), (29, 2), (30, 3)])
def test_what_has_no_room_is_rounded_again(most_bytes: int, remembered: int) -> None:
    rounder, rounds = RoundedWeights(most_bytes), Counting()
    for _ in range(2):
        assert list(map(first, rounder("abc", "int2g128", rounds))) == [0, 1, 2]
    assert len(rounds.asked) == 6 - remembered
