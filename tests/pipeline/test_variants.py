from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model import DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.pipeline.job import Prepared
from moejax.pipeline.variants import Variants
from moejax.pipeline.working_copy import dense_block

# By variant, what is off in it.
OFF = {
    "nothing": [],
    "a dense layer": ["layers.0.mlp.down"],
    "experts": ["layers.1.mlp.experts.up"],
    "the last layer": ["layers.2.self_attn.o"],
    "embedding": ["embed"],
    "head": ["head"],
    "much": ["embed", "head", "layers.0.self_attn.v_b", "layers.2.mlp.shared.down"],
}


def noisy(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array
    values = np.asarray(array, np.float32)
    noise = np.random.RandomState(0).randn(*values.shape) * values.std() / 4
    return jnp.asarray(values + noise, array.dtype)


@pytest.fixture(scope="module")
def models(original: DeepseekV3) -> dict[str, DeepseekV3]:
    """Every variant, with the weights that differ off by about a quarter."""
    leaves = named_leaves(original)
    return {
        name: DeepseekV3(original.config, (leaves | {own: jax.tree.map(noisy, leaves[own]) for own in off}).__getitem__)
        for name, off in OFF.items()
    }


def differs(name: str, part: str) -> bool:
    return any(own.startswith(part) for own in OFF[name])


def begin(variants: Variants, original: DeepseekV3, models: dict[str, DeepseekV3]) -> None:
    own = ((name, model.embed.get_value()) for name, model in models.items() if differs(name, "embed"))
    variants.embedding(original.embed.get_value(), own)


def pass_block(variants: Variants, index: int, original: DeepseekV3, models: dict[str, DeepseekV3]) -> None:
    def changed(model: DeepseekV3) -> Block:
        return dense_block(model.layers[index])

    own = ((name, changed(model)) for name, model in models.items() if differs(name, f"layers.{index}."))
    variants.block(index, dense_block(original.layers[index]), own)


def end(variants: Variants, original: DeepseekV3, models: dict[str, DeepseekV3]) -> dict[str, float]:
    heads = ((name, model.head.get_value()) for name, model in models.items() if differs(name, "head"))
    return variants.divergences(original.norm.get_value(), original.head.get_value(), heads)


def test_variants_diverge_as_evaluation_measures(
    prepared: Prepared,
    original: DeepseekV3,
    models: dict[str, DeepseekV3],
    divergence: Callable[[DeepseekV3], float],
) -> None:
    """Whatever differs in them, and wherever: one alone, and several at once."""
    variants = Variants(original.config, prepared.trials.calibrated.held_out)
    begin(variants, original, models)
    for index in range(3):
        pass_block(variants, index, original, models)
    found = end(variants, original, models)
    assert found.keys() == OFF.keys() - {"nothing"}  # which has not differed, so it is the model
    for name, own in found.items():
        assert own == pytest.approx(divergence(models[name]), rel=0.01) and own > 1e-3, name


def test_they_go_on_from_what_was_kept(prepared: Prepared, original: DeepseekV3, models: dict[str, DeepseekV3]) -> None:
    some = {name: models[name] for name in ("experts", "embedding", "the last layer")}
    unbroken, broken = (Variants(original.config, prepared.trials.calibrated.held_out) for _ in range(2))
    begin(unbroken, original, some)
    for index in range(2):
        pass_block(unbroken, index, original, some)
    kept = {name: np.array(own) for name, own in unbroken.arrays().items()}
    broken.restore(kept)
    results = []
    for variants in (unbroken, broken):
        pass_block(variants, 2, original, some)
        results.append(end(variants, original, some))
    assert results[0] == results[1] and len(results[0]) == 3


def test_what_the_experts_take_in_is_asked_before_the_block(prepared: Prepared, original: DeepseekV3) -> None:
    variants = Variants(original.config, prepared.trials.calibrated.held_out)
    variants.embedding(original.embed.get_value())
    variants.block(0, dense_block(original.layers[0]))
    x_TD = variants.experts_input(dense_block(original.layers[1]))
    assert x_TD.shape == (512, 128)
    norm2_T = np.mean(np.square(np.asarray(x_TD) / np.asarray(original.layers[1].post_attention_norm.get_value())), -1)
    np.testing.assert_allclose(norm2_T, 1, rtol=0.02)
