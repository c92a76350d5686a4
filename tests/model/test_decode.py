"""Decoding behind the latent cache equals Hugging Face transformers' own, by the golden vectors of `DECODE_CASES`.

As in `test_golden`, identity is a matter of float64, and in float32 the original's expert choices are replayed.
"""

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from golden_files import Golden, as_choice, load_golden, relative_error
from model_cases import DECODE_CASES
from moejax.model import DeepseekV3, latent_cache
from moejax.model.deepseek_v3 import Block, head_logits
from moejax.model.latent_cache import LatentCache
from moejax.model.moe import MoE, Routing
from moejax.model.rope import Angles
from small_models import model_of

# Behind the end of a row, where nobody may look.
PADDING = 3


@pytest.fixture(autouse=True)
def small_key_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention reads even these short cache in several blocks, the last of them ragged."""
    monkeypatch.setattr(latent_cache, "KEY_BLOCK", 7)


@functools.cache
def build(name: str) -> DeepseekV3:
    model = DECODE_CASES[name].model
    return model_of(model.config, model.tensors())


def extend(
    model: DeepseekV3,
    tokens_BT: jax.Array,
    cache: list[LatentCache],
    start_B: jax.Array,
    choices: list[jax.Array | None] | None,
    dtype: str,
) -> tuple[jax.Array, list[LatentCache]]:
    return model.extend(tokens_BT, cache, start_B, dtype, choices)


# Functions of this module's own, as what JAX compiles with small blocks is kept by the function.
extend_jitted = jax.jit(extend, static_argnames="dtype")


@jax.jit
def head(model: DeepseekV3, hidden_BTD: jax.Array) -> jax.Array:
    return model.logits(hidden_BTD)


@jax.jit
def draft(
    model: DeepseekV3, following_BT: jax.Array, hidden_BTD: jax.Array, cache: LatentCache, start_B: jax.Array
) -> tuple[jax.Array, LatentCache]:
    drafted, cache = model.extend_draft(following_BT, hidden_BTD, cache, start_B)
    return head_logits(drafted, model.head.get_value()), cache


class Call(NamedTuple):
    """Which positions of each row go through the model at once; some may lie behind the row's prompt."""

    at_BT: NDArray[Any]
    is_real_BT: NDArray[Any]


def calls(golden: Golden) -> Iterator[Call]:
    """All prompts at once, then every row's tokens one by one."""
    prompt_B1, length = golden["prompts"][:, None], golden["prompts"].max()
    at_BT = np.broadcast_to(np.arange(length), (len(prompt_B1), length))
    yield Call(at_BT, at_BT < prompt_B1)
    for step in range(golden["tokens"].shape[1] - length):
        yield Call(prompt_B1 + step, np.ones_like(prompt_B1, bool))


def replayed(model: DeepseekV3, golden: Golden, at_BT: NDArray[Any]) -> list[jax.Array | None]:
    """The original's experts of each layer at these positions."""
    experts_MBTK = np.take_along_axis(golden["experts"], at_BT[None, ..., None], axis=2)
    return [*[None] * model.config.first_k_dense_replace, *map(as_choice, experts_MBTK)]


def decoded(model: DeepseekV3, golden: Golden, dtype: str, replay: bool = False) -> NDArray[Any]:
    """Hidden states (B, T, D) of the golden file's rows, NaN behind their ends."""
    tokens_BT = golden["tokens"]
    batch, length = tokens_BT.shape
    hidden_BTD = np.full((batch, length, model.config.hidden_size), np.nan, dtype)
    cache = model.empty_cache(batch, length, dtype)
    for at_BT, is_real_BT in calls(golden):
        tokens = np.where(is_real_BT, np.take_along_axis(tokens_BT, at_BT, axis=1), PADDING)
        choices = replayed(model, golden, at_BT) if replay else None
        states, cache = extend_jitted(model, tokens, cache, at_BT[:, 0], choices, dtype)
        assert states.dtype == dtype
        hidden_BTD[np.nonzero(is_real_BT)[0], at_BT[is_real_BT]] = np.asarray(states)[is_real_BT]
    return hidden_BTD


def drafted(model: DeepseekV3, golden: Golden, hidden_BTD: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The MTP block's logits (B, T-1, C), the prompts' positions at once, then one at a time."""
    tokens_BT = golden["tokens"]
    batch, length = tokens_BT.shape
    cache, parts = latent_cache.empty_cache(model.config, batch, length - 1, dtype), []
    starts = [0, *range(int(golden["prompts"][0]) - 1, length)]
    for start, stop in pairwise(starts):
        states_BTD, following_BT = hidden_BTD[:, start:stop], tokens_BT[:, start + 1 : stop + 1]
        part, cache = draft(model, following_BT, states_BTD, cache, np.full(batch, start))
        parts.append(part)
    return np.concatenate(parts, axis=1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["n_group_1", "n_group_4_mtp", "n_group_8_padded"])
def test_float64_is_hugging_face_to_1e_9(name: str) -> None:
    golden, model = load_golden(f"decode_{name}"), build(name)
    hidden_BTD = decoded(model, golden, "float64")
    np.testing.assert_allclose(head(model, hidden_BTD), golden["logits"], rtol=0, atol=1e-9)
    if model.mtp:
        drafts = drafted(model, golden, hidden_BTD, "float64")
        np.testing.assert_allclose(drafts, golden["mtp_logits"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", DECODE_CASES)
def test_float32_is_hugging_face_to_1e_4(name: str) -> None:
    golden, model = load_golden(f"decode_{name}"), build(name)
    hidden_BTD = decoded(model, golden, "float32", replay=True)
    logits, is_real = np.asarray(head(model, hidden_BTD)), ~np.isnan(golden["logits"])
    assert relative_error(logits[is_real], golden["logits"][is_real]) < 1e-4
    if model.mtp:
        drafts = drafted(model, golden, hidden_BTD, "float32")
        assert relative_error(drafts, golden["mtp_logits"]) < 1e-4


@jax.jit
def run_block(
    block: Block, x_BTD: jax.Array, by: Angles, cache: LatentCache, start_B: jax.Array
) -> tuple[jax.Array, LatentCache, list[jax.Array]]:
    """A block behind its cache, and the experts that its router chose."""
    chosen: list[jax.Array] = []
    route = MoE.route

    def listening(moe: MoE, x_TD: jax.Array, choice_TK: jax.Array | None = None) -> Routing:
        routing = route(moe, x_TD, choice_TK)
        chosen.append(routing.experts_TK)
        return routing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoE, "route", listening)
        x_BTD, cache = block.attend_cached(x_BTD, by, cache, start_B)
    return x_BTD, cache, chosen


def test_tiny_in_pieces_routes_at_most_one_decision_in_a_thousand_differently(tiny_model: DeepseekV3) -> None:
    golden, piece = load_golden("tiny"), 8
    tokens_BT, golden_MTK = golden["tokens"], golden["experts"][:, 0]
    cache, pieces = tiny_model.empty_cache(1, tokens_BT.shape[1], "float32"), []
    for start in range(0, tokens_BT.shape[1], piece):
        x_BTD = tiny_model.embedded(jnp.asarray(tokens_BT[:, start : start + piece]))
        by = tiny_model.angles(start + jnp.arange(piece), x_BTD.dtype)
        experts: list[jax.Array] = []
        for n, layer in enumerate(tiny_model.layers):
            x_BTD, cache[n], chosen = run_block(layer, x_BTD, by, cache[n], np.array([start]))
            experts += chosen
        pieces.append(np.stack(experts))
    ours_MTK = np.concatenate(pieces, axis=1)
    is_shared = (ours_MTK[..., :, None] == golden_MTK[..., None, :]).any(axis=-1)
    assert np.count_nonzero(~is_shared) <= 0.001 * is_shared.size
