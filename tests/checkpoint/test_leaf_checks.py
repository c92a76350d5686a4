from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import random_leaf
from model_cases import BASE
from moejax.checkpoint.leaf_checks import check_arrays, check_indices
from moejax.errors import InputError
from moejax.formats import ExpertWeights
from moejax.model import config_from_hf

CONFIG = config_from_hf(BASE | {"n_group": 4})
PATH = Path("folder")


def experts(places: list[tuple[int, int]]) -> ExpertWeights:
    """Experts in these slots of two buckets, of three and of two."""
    bucket_E, index_E = np.array(places, np.int32).T
    buckets = random_leaf("bf16[3,4,4]"), random_leaf("f32[2,4,4]")
    return ExpertWeights(buckets, jnp.asarray(bucket_E), jnp.asarray(index_E))


@pytest.mark.parametrize("places", [[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], [(1, 1), (0, 2), (0, 0), (1, 0), (0, 1)]])
def test_every_expert_may_have_any_slot(places: list[tuple[int, int]]) -> None:
    check_indices(PATH, "layers.1.mlp.experts.gate", experts(places), CONFIG)


@pytest.mark.parametrize(
    "places",
    [
        [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)],
        [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)],
        [(0, 0), (0, 1), (0, 2), (1, 0), (-1, 1)],
        [(0, 0), (0, 1), (0, -1), (1, 0), (1, 1)],
        [(0, 0), (0, 1), (0, 1), (1, 0), (1, 1)],
        [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1)],
        [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2**31 - 1)],
    ],
)
def test_slots_that_are_none_or_are_used_twice_are_refused(places: list[tuple[int, int]]) -> None:
    with pytest.raises(InputError, match=r"folder: a.experts.up does not give each of its experts a place of its own"):
        check_indices(PATH, "a.experts.up", experts(places), CONFIG)


@pytest.mark.parametrize(("groups", "is_right"), [([0, 3, 1, 1], True), ([0, 4], False), ([-1, 0], False)])
def test_groups_are_those_of_the_config(groups: list[int], is_right: bool) -> None:
    if is_right:
        check_indices(PATH, "layers.1.mlp.group_id", jnp.asarray(groups), CONFIG)
    else:
        with pytest.raises(InputError, match=r"folder: layers.1.mlp.group_id names a group that is none of the 4"):
            check_indices(PATH, "layers.1.mlp.group_id", jnp.asarray(groups), CONFIG)


def test_arrays_have_the_shapes_and_dtypes_of_the_manifest() -> None:
    array = jnp.zeros((2, 3), jnp.float32)
    check_arrays(PATH, "norm", [array], [jax.ShapeDtypeStruct((2, 3), jnp.float32)])
    for shape, dtype in [((3, 2), jnp.float32), ((6,), jnp.float32), ((2, 3), jnp.int32)]:
        with pytest.raises(InputError, match=r"norm holds float32\(2, 3\); its manifest names"):
            check_arrays(PATH, "norm", [array], [jax.ShapeDtypeStruct(shape, dtype)])
