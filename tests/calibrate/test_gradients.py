"""What outputs are weighed by: gradients of the whole model at once are the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import OutputWeights, gradients, output_weights, weighing_outputs
from moejax.errors import InputError
from moejax.model import DeepseekV3
from moejax.model.deepseek_v3 import head_logits
from moejax.model.norm import rms_norm
from moejax.model.rope import angles
from moejax.sharding import take
from seen_by_blocks import statistics_with_hessians
from small_models import CONFIG, small_model

CHUNKS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, size=(3, 8)).astype(np.int32)
BATCH, SEED = 2, 5
Errors = list[tuple[jax.Array, jax.Array]]


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    return small_model()


def loss(
    model: DeepseekV3, tokens_BT: jax.Array, key: jax.Array, errors: list[tuple[jax.Array, jax.Array]]
) -> jax.Array:
    """-log p(y) with errors in the hidden states behind attention and behind every block."""
    by = angles(CONFIG, jnp.arange(tokens_BT.shape[1]), jnp.float32)
    x_BTD = take(model.embed.get_value(), tokens_BT, jnp.float32)
    for block, (attended, behind) in zip(model.layers, errors, strict=True):
        x_BTD = block.attended(x_BTD, by) + attended
        x_BTD = x_BTD + block.mlp(block.normed(x_BTD)) + behind
    logits = head_logits(rms_norm(x_BTD, model.norm.get_value(), CONFIG.rms_norm_eps), model.head.get_value())
    drawn = jax.vmap(jax.random.categorical)(jax.random.split(key, len(logits)), jax.lax.stop_gradient(logits))
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], -1))


def expected(model: DeepseekV3) -> list[OutputWeights]:
    sums = [np.zeros((2, CONFIG.hidden_size, CONFIG.hidden_size)) for _ in model.layers]
    for n, start in enumerate(range(0, len(CHUNKS), BATCH)):
        tokens_BT = jnp.asarray(CHUNKS[start : start + BATCH])
        nothing = jnp.zeros((*tokens_BT.shape, CONFIG.hidden_size))
        key = jax.random.fold_in(jax.random.key(SEED), n)
        gradients = jax.grad(loss, argnums=3)(model, tokens_BT, key, [(nothing, nothing)] * len(model.layers))
        for total, own in zip(sums, gradients, strict=True):
            total += [np.einsum("btd,bte->de", g, g) for g in np.asarray(own, np.float64)]
    return [OutputWeights(*(own / CHUNKS.size)) for own in sums]


def test_they_are_those_of_the_whole_model(model: DeepseekV3) -> None:
    found = output_weights(model, CHUNKS, BATCH, seed=SEED)
    for own, other in zip(found, expected(model), strict=True):
        for name in OutputWeights._fields:
            scale = np.abs(getattr(other, name)).max()
            np.testing.assert_allclose(getattr(own, name), getattr(other, name), atol=1e-4 * scale)


def test_the_seed_decides(model: DeepseekV3) -> None:
    one, again, other = (output_weights(model, CHUNKS, BATCH, seed=seed)[0].behind_DD for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.allclose(one, other)


def test_only_what_gives_hidden_states_is_weighed(model: DeepseekV3) -> None:
    statistics, weights = statistics_with_hessians(), output_weights(model, CHUNKS, BATCH)
    weighed = weighing_outputs(statistics, weights)
    for n, own in enumerate(weighed.blocks):
        has = n < len(weights)
        by = {name: own.inputs(name).output_hessian for name in own.input2 if name not in ("mlp.router",)}
        found = {name for name, output in by.items() if output is not None}
        downs = {name for name in by if name in ("mlp.down", "mlp.shared.down")}
        assert found == ({"self_attn.o", *downs} if has else set())
        if has:
            assert by["self_attn.o"] is weights[n].attended_DD and all(
                by[name] is weights[n].behind_DD for name in downs
            )
        if own.experts is not None:
            assert (own.experts.inputs("down", 0).output_hessian is None) == (not has)
            assert own.experts.inputs("up", 0).output_hessian is None


def test_gradients_that_are_not_finite_are_refused(model: DeepseekV3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_of_predictions", lambda x_BTD, *_: jnp.full_like(x_BTD, jnp.inf))
    last = len(model.layers) - 1
    with pytest.raises(
        InputError, match=rf"^layers\.{last}: the gradient of the loss, attended, is not finite; a check"
    ):
        output_weights(model, CHUNKS, BATCH)


def test_tokens_that_are_none_are_refused(model: DeepseekV3) -> None:
    with pytest.raises(InputError, match="is none of the model's"):
        output_weights(model, CHUNKS + CONFIG.vocab_size)
