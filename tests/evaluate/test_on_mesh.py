"""Evaluation and decoding over devices: what one device computes, whatever lies on which."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.evaluate.divergence import evaluate
from moejax.generate.decode import decode_step, generate_batch
from moejax.model import DeepseekV3
from moejax.model.moe import MoE
from moejax.sharding import around, mesh_of, shardings
from native_checkpoint import random_model
from small_models import CHUNKS, small_model


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def placed(model: DeepseekV3, spec: str) -> DeepseekV3:
    return jax.device_put(model, shardings(model, mesh_of(spec)))


@pytest.mark.parametrize("spec", ["tensor=8", "tensor=2,data=4"])
@pytest.mark.parametrize("of", [small_model, random_model])
def test_figures_are_those_of_one_device(of: Any, spec: str, x64: None) -> None:
    """Four chunks, in two batches of which one does not fall into four parts; FP8, pruned and mixed-bit experts."""
    model = of()
    chunks = CHUNKS % model.config.vocab_size
    alone = evaluate(model, chunks, dtype=jnp.float64, batch=4)
    with around(mesh_of(spec)):
        together = evaluate(placed(model, spec), chunks, dtype=jnp.float64, batch=4)
        ragged = evaluate(placed(model, spec), chunks, dtype=jnp.float64, batch=3)
    for own in (together, ragged):
        assert own.ppl == pytest.approx(alone.ppl, rel=1e-9)
        assert own.mtp_ppl == pytest.approx(alone.mtp_ppl, rel=1e-9)


@pytest.mark.parametrize("spec", ["tensor=8", "tensor=4,data=2"])
def test_logits_in_float32_with_choices_replayed(spec: str) -> None:
    model = small_model()
    tokens_BT = jnp.asarray(CHUNKS)
    choices = chosen(model, tokens_BT)
    logits = jax.jit(lambda model: model(tokens_BT, jnp.float32, choices))
    alone = logits(model)
    with around(mesh_of(spec)):
        together = logits(placed(model, spec))
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4 * np.abs(alone).max())


def chosen(model: DeepseekV3, tokens_BT: jax.Array) -> Sequence[jax.Array | None]:
    """The experts that each layer's tokens go to, on one device."""
    x_BTD = model.embedded(tokens_BT)
    by, choices = model.angles(jnp.arange(tokens_BT.shape[1]), x_BTD.dtype), []
    for layer in model.layers:
        normed_TD = layer.normed(layer.attended(x_BTD, by)).reshape(-1, x_BTD.shape[-1])
        choices.append(layer.mlp.route(normed_TD).experts_TK if isinstance(layer.mlp, MoE) else None)
        x_BTD = layer(x_BTD, by)
    return choices


def test_prompts_are_continued_in_parts() -> None:
    model, prompts = small_model(), [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    alone = list(generate_batch(model, prompts, 3))
    with around(mesh_of("tensor=2,data=4")):
        assert list(generate_batch(placed(model, "tensor=2,data=4"), prompts, 3)) == alone


def test_a_step_is_compiled_once_for_all_tokens() -> None:
    model = placed(small_model(), "tensor=2,data=2")
    with around(mesh_of("tensor=2,data=2")):
        tokens = generate_batch(model, [[1, 2, 3], [4, 5, 6]], 6)
        next(tokens), next(tokens)
        before = decode_step._cache_size()  # type: ignore[attr-defined]
        assert len(list(tokens)) == 4
    assert decode_step._cache_size() == before  # type: ignore[attr-defined]
