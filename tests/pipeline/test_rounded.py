import jax
import jax.numpy as jnp
import pytest

from moejax.pipeline.rounded import RoundedWeights


class Counting:
    """Rounds to a matrix of so many bytes, and counts how often."""

    def __init__(self, size: int):
        self.size, self.calls = size, 0

    def __call__(self) -> jax.Array:
        self.calls += 1
        return jnp.zeros(self.size, jnp.uint8)


def test_a_matrix_is_rounded_once_to_every_format() -> None:
    rounder, rounds = RoundedWeights(), Counting(10)
    first = rounder("layers.0.mlp.up", "int2g128", rounds)
    assert rounder("layers.0.mlp.up", "int2g128", rounds) is first and rounds.calls == 1
    rounder("layers.0.mlp.up", "int3g128", rounds)
    rounder("layers.1.mlp.up", "int2g128", rounds)
    assert rounds.calls == 3


@pytest.mark.parametrize(("max_bytes", "remembered"), [(0, 0), (9, 0), (10, 1), (29, 2), (30, 3)])
def test_what_has_no_room_is_rounded_again(max_bytes: int, remembered: int) -> None:
    rounder, rounds = RoundedWeights(max_bytes), Counting(10)
    for _ in range(2):
        for name in "abc":
            assert rounder(name, "int2g128", rounds).shape == (10,)
    assert rounds.calls == 6 - remembered
