from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import random_leaf
from moejax.formats import ExpertWeights, Leaf, format_name, gather_experts, payload_bytes, select_experts

FORMATS = ["int3g32", "bf16", "ternaryg32", "fp8b32x32", "int3g32", "int2g64", "bf16", "ternaryg32"]
EXPERTS = [random_leaf(f"{name}[40,64]", seed) for seed, name in enumerate(FORMATS)]


def assert_same(leaf: Leaf, expected: Leaf) -> None:
    """Equal formats and equal bytes."""
    assert format_name(leaf) == format_name(expected)
    for a, b in zip(jax.tree.leaves(leaf), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_holds(weights: ExpertWeights, experts: Sequence[Leaf]) -> None:
    """Every expert is found through the slot table, and no slot is empty or used twice."""
    assert weights.num_experts == len(experts)
    assert weights.shape == (len(experts), 40, 64)
    for e, expected in enumerate(experts):
        assert_same(weights.expert(e), expected)
    slots = list(zip(weights.bucket_E.tolist(), weights.index_E.tolist(), strict=True))
    assert sorted(slots) == [(b, i) for b, bucket in enumerate(weights.buckets) for i in range(bucket.shape[0])]
    assert payload_bytes(weights.buckets) == sum(payload_bytes(expert) for expert in experts)


def test_gather_keeps_every_expert() -> None:
    weights = gather_experts(EXPERTS)
    assert_holds(weights, EXPERTS)
    assert [format_name(bucket) for bucket in weights.buckets] == [
        "bf16",
        "fp8b32x32",
        "int2g64",
        "int3g32",
        "ternaryg32",
    ]


@pytest.mark.parametrize("keep", [[0, 1, 2, 3, 4, 5, 6, 7], [7, 0, 3], [5, 2, 4, 1], [4], [7, 5, 2]])
def test_select_keeps_every_expert(keep: list[int]) -> None:
    assert_holds(select_experts(gather_experts(EXPERTS), keep), [EXPERTS[e] for e in keep])


def test_select_twice() -> None:
    weights = select_experts(select_experts(gather_experts(EXPERTS), [6, 5, 4, 3, 2]), [0, 2, 4])
    assert_holds(weights, [EXPERTS[e] for e in (6, 4, 2)])


def test_one_bucket_may_be_traced() -> None:
    experts = [random_leaf("fp8b32x32[40,64]", seed) for seed in range(5)]
    keep = [4, 0, 2]
    assert_holds(
        jax.jit(lambda weights: select_experts(weights, keep))(gather_experts(experts)), [experts[e] for e in keep]
    )


def test_slots_are_int32() -> None:
    weights = gather_experts(EXPERTS)
    assert weights.bucket_E.dtype == weights.index_E.dtype == jnp.int32


def test_is_a_pytree() -> None:
    weights = gather_experts(EXPERTS)
    abstract = jax.eval_shape(lambda weights: weights, weights)
    assert abstract.shape == weights.shape
    assert_holds(jax.jit(lambda weights: weights)(weights), EXPERTS)
