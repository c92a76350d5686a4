"""Many runs through one block: in what order, by which experts, and how often slices are read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.moe import Experts
from moejax.model.sliced import SlicedBlock, enter, leave, sliced, through
from moejax.pipeline.crossing import AlternativeOf, Inside, Run, cross, run_of, unchanged
from small_models import CHUNKS, small_model

MODEL = small_model()
TOKENS = jnp.asarray(CHUNKS[:2])
X_BTD, BY = MODEL.embedded(TOKENS), MODEL.angles(jnp.arange(CHUNKS.shape[1]), jnp.dtype(jnp.float32))


def block(per_slice: int, layer: int = 1) -> SlicedBlock:
    return replace(sliced(MODEL.layers[layer]), per_slice=per_slice)


@pytest.mark.parametrize("per_slice", [5, 12])
@pytest.mark.parametrize("together", [1, 3, 100])
def test_every_run_is_that_of_the_block_with_its_alternative(per_slice: int, together: int) -> None:
    own, other = block(per_slice), sliced(MODEL.layers[2])
    alternatives_asked: list[range] = []

    def alternatives(members: Any, experts: Experts) -> AlternativeOf:
        alternatives_asked.append(members)
        return lambda name: other.experts_of(members) if name == "other" else experts

    found: dict[int, jax.Array] = {}
    runs = [run_of(lambda: own.trunk, X_BTD, BY, found_at(found, n), [None, "other"][n % 2]) for n in range(4)]
    cross(own, runs, alternatives, together)
    plain, changed = (next(through(each, [X_BTD], BY)) for each in (own, replace(own, experts_of=other.experts_of)))
    assert np.abs(plain - changed).max() > 1e-3
    for n in range(4):
        np.testing.assert_allclose(found[n], [plain, changed][n % 2], rtol=1e-5, atol=1e-6)
    waves = 1 if per_slice == 12 else -(-4 // together)
    assert alternatives_asked == own.ranges * waves


@pytest.mark.parametrize("count", [2, 7, 11])
def test_runs_that_meet_the_same_experts_are_what_they_are_alone(count: int) -> None:
    """Bit for bit, whatever their tokens and how many there are and go to experts, if one has sixteen or more."""
    own, other, x_BTD = block(5), sliced(MODEL.layers[2]), jnp.tile(X_BTD, (16, 1, 1))
    trunks = [own.trunk, own.trunk.with_leaves({}, experts_per_token=2)]

    def alternatives(members: Any, experts: Experts) -> AlternativeOf:
        return lambda name: other.experts_of(members) if name == "other" else experts

    def runs(found: dict[int, jax.Array]) -> list[Run]:
        return [
            run_of(
                partial(trunks.__getitem__, n % 3 == 1),
                (1 + n) * x_BTD[: 16 + n % 2],
                BY,
                found_at(found, n),
                "other" if n > 7 else None,
            )
            for n in range(count)
        ]

    together, alone = dict[int, jax.Array](), dict[int, jax.Array]()
    cross(own, runs(together), alternatives, count)
    cross(own, runs(alone), alternatives, 1)
    for n in range(count):
        np.testing.assert_array_equal(together[n], alone[n])


def found_at(found: dict[int, jax.Array], n: int) -> Callable[[jax.Array], None]:
    return lambda y_BTD: found.update({n: y_BTD})


@pytest.mark.parametrize("per_slice", [5, 12])
def test_runs_end_in_their_order_and_the_sum_may_be_scaled(per_slice: int) -> None:
    own, ended = block(per_slice), list[str]()
    sums: dict[str, Any] = {}

    def end(inside: Inside, routed_TD: jax.Array | None) -> None:
        sums["inside"], sums["routed"] = inside, routed_TD
        ended.append("first")

    def scaled(y_BTD: jax.Array) -> None:
        expected = leave(sums["inside"], 0.5 * sums["routed"])
        np.testing.assert_allclose(y_BTD, expected, rtol=1e-6, atol=1e-7)
        ended.append("scaled")

    def scale() -> float:
        assert ended == ["first"]
        return 0.5

    first = Run(lambda: enter(own.trunk, X_BTD, BY), end)
    cross(own, [first, run_of(lambda: own.trunk, X_BTD, BY, scaled, scale=scale)], unchanged, 2)
    assert ended == ["first", "scaled"]


def test_a_dense_block_has_no_slices() -> None:
    found: dict[int, jax.Array] = {}
    own = sliced(MODEL.layers[0])

    def never(members: Sequence[int], experts: Experts) -> AlternativeOf:
        raise AssertionError

    cross(own, [run_of(lambda: own.trunk, X_BTD, BY, found_at(found, 0))], never, 1)
    np.testing.assert_array_equal(found[0], next(through(own, [X_BTD], BY)))
