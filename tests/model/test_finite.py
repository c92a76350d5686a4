"""Numbers that are not finite stop every walk at the block where they appear, and name the matrix and the expert."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.calibrate import calibrate
from moejax.errors import InputError
from moejax.evaluate.divergence import evaluate
from moejax.formats import ExpertWeights, dense
from moejax.generate.decode import generate, generate_batch
from moejax.generate.from_disk import PartByPart
from moejax.generate.speculative import Speculation
from moejax.model import DeepseekV3, named_leaves
from moejax.model.finite import all_finite
from moejax.model.sliced import sliced
from moejax.model.source import ModelSource
from moejax.pipeline.variants import Variants
from small_models import CHUNKS, CONFIG, small_model

# What becomes of one weight whose exponent loses a bit.
HUGE = 1e37


@cache
def dense_leaves() -> dict[str, Any]:
    """Of the small model, all in float32, so that every damaged one is compiled alike."""

    def unpacked(leaf: Any) -> Any:
        if isinstance(leaf, ExpertWeights):
            return replace(leaf, buckets=(dense(leaf.buckets[0], jnp.float32),))
        return leaf if isinstance(leaf, jax.Array) and leaf.dtype == jnp.int32 else dense(leaf, jnp.float32)

    return {name: unpacked(leaf) for name, leaf in named_leaves(small_model()).items()}


def damaged(name: str, expert: int | None = None, by: float = HUGE) -> DeepseekV3:
    """The small model with one row of one matrix far too large."""
    matrix = dense_leaves()[name]
    if isinstance(matrix, ExpertWeights):
        (bucket,) = matrix.buckets
        assert isinstance(bucket, jax.Array)
        matrix = replace(matrix, buckets=(bucket.at[expert, 3].mul(by),))
    else:
        matrix = matrix.at[..., 3, :].mul(by)
    return DeepseekV3(CONFIG, (dense_leaves() | {name: matrix}).__getitem__)


def refusal(model: DeepseekV3) -> str:
    with pytest.raises(InputError) as error:
        evaluate(model, CHUNKS, batch=2)
    return str(error.value)


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
@pytest.mark.parametrize(("expert", "by"), [(2, -HUGE), (7, HUGE)])
def test_an_expert_and_its_projection_are_named(projection: str, expert: int, by: float) -> None:
    message = refusal(damaged(f"layers.2.mlp.experts.{projection}", expert, by))
    assert re.fullmatch(
        rf"layers\.2: the output of mlp\.experts\.{projection} of expert {expert} reaches \d\S*e\+3\d, too much to "
        "be squared and summed in float32; a checkpoint whose weights are sound is needed",
        message,
    )


@pytest.mark.parametrize("name", ["q_a", "kv_a", "v_b", "o"])
def test_a_matrix_of_attention_is_named(name: str) -> None:
    """Behind the first two are norms, which would take what has no square for zeros."""
    assert refusal(damaged(f"layers.0.self_attn.{name}")).startswith(f"layers.0: the output of self_attn.{name} ")


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_matrix_of_a_dense_layer_is_named(name: str) -> None:
    assert refusal(damaged(f"layers.0.mlp.{name}")).startswith(f"layers.0: the output of mlp.{name} ")


@pytest.mark.parametrize(
    ("norm", "behind"),
    [("input_norm", "self_attn.q_a"), ("self_attn.q_a_norm", "self_attn.q_b"), ("post_attention_norm", "mlp.gate")],
)
def test_what_a_norm_makes_is_named_by_what_takes_it(norm: str, behind: str) -> None:
    gain = {f"layers.0.{norm}": jnp.full_like(dense_leaves()[f"layers.0.{norm}"], 3e38)}
    message = refusal(DeepseekV3(CONFIG, (dense_leaves() | gain).__getitem__))
    assert message.startswith(f"layers.0: the input of {behind} ")


def test_an_mtp_block_is_named() -> None:
    assert refusal(damaged("mtp.0.block.mlp.shared.down")).startswith("mtp.0: the output of block.mlp.shared.down ")
    assert refusal(damaged("mtp.0.block.mlp.experts.down", 5)).startswith(
        "mtp.0: the output of block.mlp.experts.down of expert 5 "
    )


def run_along(model: DeepseekV3) -> None:
    """As the model that variants are compared with."""
    variants = Variants(CONFIG, CHUNKS)
    variants.embedding(model.embed.get_value())
    for index, layer in enumerate(model.layers):
        variants.block(index, sliced(layer))


def test_embedding_and_head_are_named() -> None:
    leaves = dense_leaves() | {"embed": dense_leaves()["embed"].at[int(CHUNKS[0, 1]), 3].set(HUGE)}
    model = DeepseekV3(CONFIG, leaves.__getitem__)
    assert refusal(model).startswith("the output of embed reaches 1e+37")
    for own in (lambda: calibrate(model, CHUNKS, batch=2), lambda: run_along(model)):
        with pytest.raises(InputError, match=r"^the output of embed reaches 1e\+37"):
            own()
    assert refusal(damaged("head", by=float("inf"))).startswith("the output of the head is not finite")


def test_every_walk_stops() -> None:
    model = damaged("layers.2.mlp.experts.down", 7)
    walks = [
        lambda: calibrate(model, CHUNKS, batch=2),
        lambda: run_along(model),
        lambda: list(generate(model, CHUNKS[0], 2)),
        lambda: list(generate(PartByPart(ModelSource(model)), CHUNKS[0], 2)),
        lambda: list(Speculation(model, CHUNKS[0], 2)),
    ]
    for own in walks:
        with pytest.raises(InputError, match=r"^layers\.2: the output of mlp\.experts\.down of expert \d+ reaches"):
            own()


def test_only_the_sequence_that_is_not_finite_ends_a_batch() -> None:
    """It is the one that is looked at, whichever it is; one that has come to its end, and padding, do not count."""
    leaves = dense_leaves() | {"embed": dense_leaves()["embed"].at[90, 3].set(HUGE)}
    model = DeepseekV3(CONFIG, leaves.__getitem__)
    with pytest.raises(InputError, match=r"^the output of embed reaches 1e\+37"):
        list(generate_batch(model, [[1, 2], [1, 90]], 2))
    padded = leaves | {"embed": dense_leaves()["embed"].at[0, 3].set(HUGE)}
    model = DeepseekV3(CONFIG, padded.__getitem__)
    assert len(list(generate_batch(model, [[1, 2, 3, 4], [1]], 1))) == 1


def test_a_norm_hides_nothing() -> None:
    """A row of large numbers is finite, but its norm is not: it would be taken for zeros."""
    x_D = jnp.full(64, 1e19)
    assert all_finite(x_D / 10) and not all_finite(x_D * 10) and not all_finite(x_D.at[0].set(jnp.nan))
    assert not all_finite(x_D.astype(jnp.bfloat16) * 10)


def test_what_is_traced_passes() -> None:
    shapes = jax.eval_shape(lambda model: calibrate(model, np.zeros((1, 8), np.int32)), small_model())
    assert shapes.tokens.shape == ()
