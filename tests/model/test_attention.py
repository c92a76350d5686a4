"""The latent cache: absorbed attention behind it equals expanded attention over the whole prompt, in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model_cases import BASE, Config, random_tensors, write_hf_checkpoint
from moejax.checkpoint.huggingface import open_huggingface
from moejax.formats.arrays import abstract_array
from moejax.model import DeepseekV3
from moejax.model import attention as own
from moejax.model.workspace import step_bytes

BATCH, TOKENS, CACHED = 2, 9, 12

extend = jax.jit(DeepseekV3.extend, static_argnames="dtype")
hidden = jax.jit(DeepseekV3.hidden, static_argnames="dtype")


@pytest.fixture(scope="module", params=["q_lora", "no_q_lora"])
def dense_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DeepseekV3:
    """Two layers without experts, which would take most of the time to compile."""
    q_lora_rank = BASE["q_lora_rank"] if request.param == "q_lora" else None
    changes = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "q_lora_rank": q_lora_rank}
    return random_model(tmp_path_factory.mktemp("dense"), BASE | changes)


@pytest.fixture(scope="module")
def sparse_model(tmp_path_factory: pytest.TempPathFactory) -> DeepseekV3:
    """One layer with experts."""
    changes = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
    return random_model(tmp_path_factory.mktemp("sparse"), BASE | changes)


def random_model(folder: Path, config: Config) -> DeepseekV3:
    write_hf_checkpoint(folder, config, random_tensors(config, seed=20))
    checkpoint = open_huggingface(folder)
    assert checkpoint.config.yarn is not None
    return DeepseekV3(checkpoint.config, checkpoint.leaf)


def prompt(model: DeepseekV3) -> jax.Array:
    return jnp.asarray(np.random.RandomState(0).randint(model.config.vocab_size, size=(BATCH, TOKENS)))


def starts(*start: int) -> jax.Array:
    """One start for all sequences, or one for each."""
    return jnp.broadcast_to(jnp.asarray(start, jnp.int32), BATCH)


def hidden_in_pieces(model: DeepseekV3, tokens_BT: jax.Array, pieces: list[int]) -> jax.Array:
    """The prompt's hidden states, `pieces` tokens at a time through a cache with room to spare."""
    cache, start, parts = model.empty_cache(BATCH, CACHED, jnp.float64), 0, []
    for piece in pieces:
        tokens = tokens_BT[:, start : start + piece]
        part, cache = extend(model, tokens, cache, starts(start), dtype=jnp.float64)
        parts.append(part)
        start += piece
    return jnp.concatenate(parts, axis=1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("pieces", [[TOKENS], [1] * TOKENS, [4, 1, 4]], ids=["at once", "one by one", "unevenly"])
def test_a_prompt_through_the_cache_gives_the_same_hidden_states(dense_model: DeepseekV3, pieces: list[int]) -> None:
    tokens_BT = prompt(dense_model)
    expected = hidden(dense_model, tokens_BT, dtype=jnp.float64)
    np.testing.assert_allclose(hidden_in_pieces(dense_model, tokens_BT, pieces), expected, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_a_prompt_through_the_cache_gives_the_same_hidden_states_behind_experts(sparse_model: DeepseekV3) -> None:
    tokens_BT = prompt(sparse_model)
    expected = hidden(sparse_model, tokens_BT, dtype=jnp.float64)
    np.testing.assert_allclose(hidden_in_pieces(sparse_model, tokens_BT, [3, 3, 3]), expected, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_cache_holds_latents_and_rope_keys_alone(dense_model: DeepseekV3) -> None:
    cache = dense_model.empty_cache(BATCH, CACHED, jnp.float64)
    numbers = dense_model.config.kv_lora_rank + dense_model.config.qk_rope_head_dim
    assert len(cache) == len(dense_model.layers)
    assert all(layer.rows.size == BATCH * CACHED * numbers and layer.scale is None for layer in cache)
    _, extended = extend(dense_model, prompt(dense_model)[:, :4], cache, starts(2), dtype=jnp.float64)
    assert jax.tree.map(jnp.shape, extended) == jax.tree.map(jnp.shape, cache)
    for part in jax.tree.leaves(extended):
        is_written = np.any(part != 0, axis=(0, 2))
        np.testing.assert_array_equal(is_written, [2 <= position < 6 for position in range(CACHED)])


@pytest.mark.usefixtures("x64")
def test_a_token_changes_no_earlier_state_and_no_other_row(dense_model: DeepseekV3) -> None:
    tokens_BT, position = prompt(dense_model), 5
    changed_BT = tokens_BT.at[0, position].set((tokens_BT[0, position] + 1) % dense_model.config.vocab_size)
    before, after = (hidden(dense_model, tokens, dtype=jnp.float64) for tokens in (tokens_BT, changed_BT))
    is_changed_BT = np.abs(before - after).max(axis=-1) > 1e-9
    expected_BT = np.zeros((BATCH, TOKENS), bool)
    expected_BT[0, position:] = True
    np.testing.assert_array_equal(is_changed_BT, expected_BT)


@pytest.mark.usefixtures("x64")
def test_a_token_changes_no_earlier_logits_behind_experts(sparse_model: DeepseekV3) -> None:
    tokens_BT = prompt(sparse_model)
    changed_BT = tokens_BT.at[:, -1].set((tokens_BT[:, -1] + 1) % sparse_model.config.vocab_size)
    states = [hidden(sparse_model, tokens, dtype=jnp.float64) for tokens in (tokens_BT, changed_BT)]
    before, after = map(sparse_model.logits, states)
    np.testing.assert_allclose(after[:, :-1], before[:, :-1], rtol=0, atol=1e-9)
    assert np.abs(after - before)[:, -1].max(axis=-1).min() > 1e-9


@pytest.mark.parametrize("dense_model", ["q_lora"], indirect=True)
def test_a_cache_in_bfloat16_gives_nearly_the_same(dense_model: DeepseekV3) -> None:
    tokens_BT = prompt(dense_model)
    cache = dense_model.empty_cache(BATCH, CACHED, jnp.bfloat16)
    states, cache = extend(dense_model, tokens_BT, cache, starts(0), dtype=jnp.float32)
    assert states.dtype == jnp.float32 and cache[0].rows.dtype == jnp.bfloat16
    expected = hidden(dense_model, tokens_BT, dtype=jnp.float32)
    assert 1e-4 < float(jnp.max(jnp.abs(states - expected)) / jnp.std(expected)) < 0.05


@pytest.mark.parametrize("queries", [4, 5, 8])
def test_queries_that_attend_block_by_block_attend_alike(
    sparse_model: DeepseekV3, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, tokens_BT = sparse_model.layers[0].self_attn, prompt(sparse_model)
    x_BTD, by = sparse_model.embedded(tokens_BT), sparse_model.angles(jnp.arange(tokens_BT.shape[1]), jnp.float32)
    expected, blocks = attention(x_BTD, by), -(-tokens_BT.shape[1] // queries)
    assert blocks > 1
    monkeypatch.setattr(own, "QUERIES", queries)
    np.testing.assert_allclose(attention(x_BTD, by), expected, rtol=1e-5, atol=1e-6)


def test_what_attention_takes_grows_with_its_tokens_not_their_square(sparse_model: DeepseekV3) -> None:
    def taken(length: int) -> int:
        x_1TD = abstract_array((1, length, sparse_model.config.hidden_size), jnp.float32)
        by = jax.eval_shape(lambda: sparse_model.angles(jnp.arange(length), jnp.dtype(jnp.float32)))
        return step_bytes(jax.jit(lambda block, x, by: block.self_attn(x, by)), sparse_model.layers[0], x_1TD, by)

    assert taken(16 * own.QUERIES) < 2.5 * taken(8 * own.QUERIES)
