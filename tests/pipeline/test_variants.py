from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model import DeepseekV3, named_leaves
from moejax.model import sliced as slices
from moejax.model.moe import Experts
from moejax.model.sliced import SlicedBlock, sliced
from moejax.pipeline.crossing import AlternativeOf, Inside, Run
from moejax.pipeline.job import Prepared
from moejax.pipeline.room import Room
from moejax.pipeline.variants import Changed, Variants
from moejax.pipeline.working_copy import dense_experts, dense_trunk

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
    variants.embedding(original.embed.get_value(), ((name, variants.used_rows(leaf)) for name, leaf in own))


def pass_block(variants: Variants, index: int, original: DeepseekV3, models: dict[str, DeepseekV3]) -> None:
    def changed(name: str) -> Changed:
        trunk = sliced(models[name].layers[index]).trunk
        return Changed(lambda: dense_trunk(trunk), name if differs(name, f"layers.{index}.mlp.experts") else None)

    def alternatives(members: Sequence[int], experts: Experts) -> AlternativeOf:
        def of(name: Any) -> Experts:
            if name is None:
                return dense_experts(experts)
            return dense_experts(sliced(models[name].layers[index]).experts_of(members))

        return of

    own = ((name, changed(name)) for name in models if differs(name, f"layers.{index}."))
    variants.block(index, dense(original, index), own, alternatives)


def dense(model: DeepseekV3, index: int) -> SlicedBlock:
    block = sliced(model.layers[index])
    return replace(block, trunk=dense_trunk(block.trunk))


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


def test_slices_hardly_change_them_and_how_many_go_together_not_at_all(
    prepared: Prepared, original: DeepseekV3, models: dict[str, DeepseekV3], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokens_BT = original.config, prepared.trials.calibrated.held_out

    def found(within: int) -> dict[str, float]:
        variants = Variants(config, tokens_BT, Room(within=within))
        begin(variants, original, models)
        for index in range(3):
            pass_block(variants, index, original, models)
        return end(variants, original, models)

    in_one = found(1 << 30)
    monkeypatch.setattr(slices, "MOST_NUMBERS", 5 * 3 * config.hidden_size * config.moe_intermediate_size)
    assert len(sliced(original.layers[1]).ranges) == 3
    together, one_by_one = found(1 << 30), found(1)
    assert together == one_by_one
    for name, own in in_one.items():
        assert together[name] == pytest.approx(own, rel=1e-3), name


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


def test_other_runs_see_what_the_model_has_within_the_block(prepared: Prepared, original: DeepseekV3) -> None:
    """What its experts take when they begin, what it puts out when they end."""
    variants = Variants(original.config, prepared.trials.calibrated.held_out)
    variants.embedding(original.embed.get_value())
    variants.block(0, dense(original, 0))
    seen: dict[str, Any] = {}

    def begin() -> Inside:
        seen["x_TD"] = variants.within.normed_TD  # type: ignore[union-attr]
        return variants.within

    def end(inside: Inside, routed_TD: jax.Array | None) -> None:
        assert variants.routed_TD is not None and routed_TD is not None
        np.testing.assert_array_equal(routed_TD, variants.routed_TD)
        seen["y_BTD"] = variants.output

    variants.block(1, dense(original, 1), [Run(begin, end)])
    np.testing.assert_array_equal(seen["y_BTD"], variants.original)
    x_TD = seen["x_TD"]
    assert x_TD.shape == (512, 128)
    norm2_T = np.mean(np.square(np.asarray(x_TD) / np.asarray(original.layers[1].post_attention_norm.get_value())), -1)
    np.testing.assert_allclose(norm2_T, 1, rtol=0.02)


def test_rows_of_other_tokens_have_another_name(prepared: Prepared, original: DeepseekV3) -> None:
    """Rounders remember by name."""
    tokens_BT = prepared.trials.calibrated.held_out
    names = [Variants(original.config, own).rows_name for own in (tokens_BT, tokens_BT[:, ::-1], tokens_BT[:, :5])]
    assert names[0] == names[1] != names[2]
