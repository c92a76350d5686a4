"""What decoding and routing cannot depend on, on small random models in float64, where no expert's choice can flip."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_cases import BASE, Tensors, random_tensors
from moejax.model import DeepseekV3
from moejax.model.latent_cache import LatentCache
from small_models import model_of

GROUPS, PER_GROUP = 4, 3
RAW_CONFIG = BASE | {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": GROUPS * PER_GROUP,
    "kv_lora_rank": 48,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "qk_nope_head_dim": 4,
}
TENSORS = random_tensors(RAW_CONFIG, seed=1)
BATCH, TOKENS = 3, 12
# Keys and values are expanded for 6 tokens, and not for fewer.
PIECES = (1, 2, 6)
SEEDS = st.integers(0, 2**32 - 1)

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def original() -> DeepseekV3:
    return model_of(RAW_CONFIG, TENSORS)


@jax.jit
def hidden(model: DeepseekV3, tokens_BT: jax.Array) -> jax.Array:
    return model.hidden(tokens_BT, "float64")


@jax.jit
def extend(
    model: DeepseekV3, tokens_BT: jax.Array, cache: list[LatentCache], start_B: jax.Array
) -> tuple[jax.Array, list[LatentCache]]:
    return model.extend(tokens_BT, cache, start_B, "float64")


def random_tokens(seed: int) -> NDArray[np.int_]:
    return np.random.RandomState(seed).randint(RAW_CONFIG["vocab_size"], size=(BATCH, TOKENS))


def splits(tokens: int) -> list[list[int]]:
    """Every way to make `tokens` of PIECES."""
    if tokens == 0:
        return [[]]
    return [[piece, *rest] for piece in PIECES if piece <= tokens for rest in splits(tokens - piece)]


@example(seed=0, pieces=[1] * TOKENS)
@example(seed=0, pieces=[6, *[1] * 6])
@settings(max_examples=12)
@given(seed=SEEDS, pieces=st.sampled_from(splits(TOKENS)))
def test_a_sequence_in_pieces_of_any_size_is_the_sequence_at_once(seed: int, pieces: list[int]) -> None:
    tokens_BT = random_tokens(seed)
    cache, parts, start = original().empty_cache(BATCH, TOKENS, "float64"), [], 0
    for piece in pieces:
        tokens = tokens_BT[:, start : start + piece]
        part, cache = extend(original(), tokens, cache, np.full(BATCH, start))
        parts.append(part)
        start += piece
    np.testing.assert_allclose(np.concatenate(parts, axis=1), hidden(original(), tokens_BT), rtol=0, atol=1e-11)


@settings(max_examples=12)
@given(seed=SEEDS, prompts=st.tuples(*[st.sampled_from((2, 6))] * BATCH), steps=st.just(2))
def test_rows_of_different_lengths_are_each_what_they_are_alone(
    seed: int, prompts: tuple[int, ...], steps: int
) -> None:
    """Behind the shorter prompts lie random tokens."""
    tokens_BT, cache = random_tokens(seed), original().empty_cache(BATCH, TOKENS, "float64")
    padded_BT = np.random.RandomState(seed).permutation(tokens_BT.ravel()).reshape(BATCH, TOKENS)[:, : max(PIECES)]
    for row, prompt in enumerate(prompts):
        padded_BT[row, :prompt] = tokens_BT[row, :prompt]
    states_BTD, cache = extend(original(), padded_BT, cache, np.zeros(BATCH, int))
    batched = [[row[:prompt]] for row, prompt in zip(states_BTD, prompts, strict=True)]
    for step in range(steps):
        start_B = np.array(prompts) + step
        tokens_B1 = np.take_along_axis(tokens_BT, start_B[:, None], axis=1)
        states_BTD, cache = extend(original(), tokens_B1, cache, start_B)
        for own, row in zip(batched, states_BTD, strict=True):
            own.append(row)
    for row, own in enumerate(batched):
        alone = hidden(original(), tokens_BT[row : row + 1, : prompts[row] + steps])
        np.testing.assert_allclose(np.concatenate(own), alone[0], rtol=0, atol=1e-11)


class Reordering(NamedTuple):
    """A new order of the groups, and of the experts within each."""

    groups: list[int]
    within: tuple[list[int], ...]

    def order(self) -> list[int]:
        """Which expert comes to each place."""
        return [PER_GROUP * group + expert for group in self.groups for expert in self.within[group]]


REORDERINGS = st.builds(
    Reordering, st.permutations(range(GROUPS)), st.tuples(*[st.permutations(range(PER_GROUP))] * GROUPS)
)


def reordered(order: list[int]) -> Tensors:
    """The checkpoint with its experts, their router rows and biases in another order."""
    tensors, mlp = dict(TENSORS), "model.layers.1.mlp"
    for name in (f"{mlp}.gate.weight", f"{mlp}.gate.e_score_correction_bias"):
        tensors[name] = TENSORS[name][order]
    for place, expert in enumerate(order):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            name = f"{mlp}.experts.{{}}.{matrix}.weight"
            tensors[name.format(place)] = TENSORS[name.format(expert)]
    return tensors


@settings(max_examples=25)
@given(seed=SEEDS, reordering=REORDERINGS)
def test_the_order_of_groups_and_of_experts_within_them_is_irrelevant(seed: int, reordering: Reordering) -> None:
    tokens_BT, model = random_tokens(seed), model_of(RAW_CONFIG, reordered(reordering.order()))
    np.testing.assert_allclose(hidden(model, tokens_BT), hidden(original(), tokens_BT), rtol=0, atol=1e-12)


def test_to_which_group_an_expert_belongs_is_not() -> None:
    """The test above could not fail otherwise: here the first experts of all groups come first, then the second."""
    order = [PER_GROUP * group + expert for expert in range(PER_GROUP) for group in range(GROUPS)]
    tokens_BT, model = random_tokens(0), model_of(RAW_CONFIG, reordered(order))
    assert np.abs(hidden(model, tokens_BT) - hidden(original(), tokens_BT)).max() > 1e-3
