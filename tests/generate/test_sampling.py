"""Sampling against a plain numpy reading of what transformers' warpers do, one after another."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moejax.errors import InputError
from moejax.generate.sampling import GREEDY, Draw, Sampling, check_sampling, sample

VOCABULARY = 13
DRAWS = 400

draw = jax.jit(lambda logits_BC, sampling, keys_B: sample(logits_BC, Draw(sampling, keys_B)))


def allowed(logits_C: NDArray[np.float64], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that may be drawn: temperature, then top-k, then top-p of what is left, then min-p."""
    scaled_C = logits_C / temperature
    order = np.argsort(-scaled_C, kind="stable")
    kept = list(order[: top_k or VOCABULARY])
    weight = np.exp(scaled_C[kept] - scaled_C.max())
    share = weight / weight.sum()
    nucleus = [n for n in range(len(kept)) if share[:n].sum() < top_p]
    return {int(kept[n]) for n in nucleus if share[n] >= min_p * share[0]}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 10, 50]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
)
def test_only_allowed_tokens_are_drawn(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits_C = np.random.RandomState(seed).normal(scale=2, size=VOCABULARY)
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    logits_BC = jnp.broadcast_to(jnp.asarray(logits_C, jnp.float32), (DRAWS, VOCABULARY))
    drawn = np.asarray(draw(logits_BC, Sampling(temperature, top_k, top_p, min_p), keys))
    may = allowed(logits_C, temperature, top_k, top_p, min_p)
    assert set(drawn.tolist()) <= may
    # Those that are likely enough all come up.
    weight_C = np.exp(logits_C / temperature)
    total = sum(weight_C[token] for token in may)
    assert {token for token in may if weight_C[token] / total > 0.04} <= set(drawn.tolist())


def test_frequencies_are_the_renormalized_probabilities() -> None:
    logits_C = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    keys = jax.random.split(jax.random.key(1), 4000)
    logits_BC = jnp.broadcast_to(jnp.asarray(logits_C, jnp.float32), (4000, 4))
    drawn = np.bincount(np.asarray(draw(logits_BC, Sampling(1.0, top_k=3), keys)), minlength=4) / 4000
    np.testing.assert_allclose(drawn, [4 / 9, 3 / 9, 2 / 9, 0], atol=0.035)
    drawn = np.bincount(np.asarray(draw(logits_BC, Sampling(1.0, top_p=0.69), keys)), minlength=4) / 4000
    np.testing.assert_allclose(drawn, [4 / 7, 3 / 7, 0, 0], atol=0.035)


def test_greedy_takes_the_likeliest_whatever_the_key() -> None:
    logits_BC = jnp.asarray(np.random.RandomState(0).normal(size=(5, VOCABULARY)), jnp.float32)
    for seed in (0, 1):
        keys = jax.random.split(jax.random.key(seed), 5)
        np.testing.assert_array_equal(draw(logits_BC, GREEDY, keys), np.argmax(logits_BC, axis=-1))


def test_other_values_compile_nothing_anew() -> None:
    logits_BC, keys = jnp.zeros((1, VOCABULARY)), jax.random.split(jax.random.key(0), 1)
    fresh: Any = jax.jit(lambda logits_BC, sampling, keys_B: sample(logits_BC, Draw(sampling, keys_B)))
    for sampling in (GREEDY, Sampling(0.7), Sampling(1.3, 4, 0.9, 0.1)):
        fresh(logits_BC, sampling, keys)
    assert fresh._cache_size() == 1


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(-0.1), "temperature is -0.1; 0 or a positive number is needed"),
        (Sampling(float("nan")), "temperature is nan; 0 or a positive number is needed"),
        (Sampling(float("inf")), "temperature is inf; 0 or a positive number is needed"),
        (Sampling(1, top_k=-1), "top_k is -1; 0 .all tokens. or a positive integer is needed"),
        (Sampling(1, top_p=0), "top_p is 0; a number above 0, at most 1 is needed"),
        (Sampling(1, top_p=1.1), "top_p is 1.1; a number above 0, at most 1 is needed"),
        (Sampling(1, min_p=1.5), "min_p is 1.5; a number from 0 to 1 is needed"),
    ],
)
def test_values_that_no_distribution_has(sampling: Sampling, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sampling(sampling)
