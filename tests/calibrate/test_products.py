"""Sums of outer products against NumPy in float64, and which weights share one."""

from functools import partial
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moejax.calibrate.products import expert_products, input_name
from moejax.checkpoint.abstract import abstract_original
from moejax.formats.arrays import abstract_array
from moejax.model.deepseek_v3 import Block
from moejax.model.leaves import Taps
from small_models import RAW_CONFIG

Array = NDArray[Any]

ROWS = 600
X_RI = np.random.RandomState(0).randn(ROWS, 3)

by_expert = partial(jax.jit, static_argnums=2)(expert_products)


@given(st.lists(st.integers(0, ROWS), min_size=3, max_size=3))
def test_an_expert_s_rows_may_be_none_or_more_than_a_block(cuts: list[int]) -> None:
    check_products(X_RI, np.diff([0, *sorted(cuts), ROWS]))


@pytest.mark.parametrize("rows_E", [[0, 600, 0, 0], [256, 0, 0, 344], [0, 1, 512, 87], [0, 0, 0, 600]])
def test_rows_in_whole_blocks_and_at_both_ends(rows_E: list[int]) -> None:
    check_products(X_RI, np.asarray(rows_E))


def test_fewer_rows_than_a_block() -> None:
    check_products(X_RI[:5], np.asarray([2, 0, 3, 0]))


def check_products(x_RI: Array, rows_E: Array) -> None:
    """Experts' own and the sum of all; the latter alone where the former take a byte too much."""
    x_RI, bytes_of_own = x_RI.astype(np.float32), 4 * x_RI.shape[1] ** 2
    own_EII, all_II = by_expert(x_RI, rows_E, bytes_of_own)
    parts = np.split(x_RI.astype(np.float64), np.cumsum(rows_E)[:-1])
    assert own_EII is not None
    np.testing.assert_allclose(own_EII, [x.T @ x for x in parts], rtol=1e-5, atol=1e-4)
    none, alone_II = by_expert(x_RI, rows_E, bytes_of_own - 1)
    assert none is None
    for total_II in (all_II, alone_II):
        np.testing.assert_allclose(total_II, x_RI.astype(np.float64).T @ x_RI, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("q_lora_rank", [RAW_CONFIG["q_lora_rank"], None])
@pytest.mark.parametrize("layer", [0, 1])
def test_weights_share_a_sum_exactly_where_they_take_the_same_array(layer: int, q_lora_rank: int | None) -> None:
    model = abstract_original(RAW_CONFIG | {"q_lora_rank": q_lora_rank})
    x_BTD = abstract_array((2, 6, model.config.hidden_size), jnp.float32)

    def check(block: Block, x_BTD: jax.Array) -> None:
        taps: Taps = {}
        block(x_BTD, model.angles(jnp.arange(6), jnp.dtype(jnp.float32)), taps=taps)
        taps.pop("mlp.experts", None)
        assert len(taps) >= 8
        for a, b in combinations(taps, 2):
            assert (taps[a] is taps[b]) == (input_name(a) == input_name(b)), (a, b)

    jax.eval_shape(check, model.layers[layer], x_BTD)
