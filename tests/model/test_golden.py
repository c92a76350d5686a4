"""Equality with Hugging Face transformers, by the golden vectors that `tools/make_golden.py` wrote.

Top-K is discontinuous, so identity is a matter of float64; in float32 the original's expert choices are replayed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from golden_files import Golden, as_choice, load_golden, relative_error
from model_cases import CASES
from moejax.model import DeepseekV3
from moejax.model.deepseek_v3 import Block
from moejax.model.leaves import Taps
from moejax.model.moe import MoE, Routing
from moejax.model.rope import Angles

draft_logits = jax.jit(DeepseekV3.draft_logits)
head_logits = jax.jit(DeepseekV3.logits)


class Run(NamedTuple):
    """What a golden file holds, computed by our model; `experts` in ascending order, as there."""

    hidden: NDArray[Any]
    logits: NDArray[Any]
    experts: NDArray[Any]
    weights: NDArray[Any]


@jax.jit
def run_block(
    block: Block, x_BTD: jax.Array, by: Angles, choice_TK: jax.Array | None
) -> tuple[jax.Array, Routing | None]:
    taps: Taps = {}
    y_BTD = block(x_BTD, by, choice_TK, taps)
    return y_BTD, block.mlp.route(taps["mlp.router"], choice_TK) if isinstance(block.mlp, MoE) else None


def run(model: DeepseekV3, golden: Golden, dtype: jax.typing.DTypeLike, replay: bool = False) -> Run:
    """The golden file's tokens through the model, with `replay` along its expert choices."""
    tokens_BT = jnp.asarray(golden["tokens"])
    x_BTD = model.embedded(tokens_BT, dtype)
    by = model.angles(jnp.arange(tokens_BT.shape[1]), x_BTD.dtype)
    hidden: list[jax.Array] = []
    routings: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for layer in model.layers:
        is_replayed = replay and isinstance(layer.mlp, MoE)
        choice_TK = as_choice(golden["experts"][len(routings)]) if is_replayed else None
        x_BTD, routing = run_block(layer, x_BTD, by, choice_TK)
        hidden.append(x_BTD)
        if routing is not None:
            routings.append(sorted_routing(routing, golden["experts"].shape[1:]))
    experts, weights = map(np.stack, zip(*routings, strict=True))
    return Run(np.stack(hidden), np.asarray(head_logits(model, x_BTD)), experts, weights)


def sorted_routing(routing: Routing, shape: tuple[int, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Experts in ascending order and their weights, both (B, T, K)."""
    experts_TK, weights_TK = map(np.asarray, routing)
    order_TK = np.argsort(experts_TK, axis=-1)
    experts, weights = (np.take_along_axis(array, order_TK, axis=-1) for array in (experts_TK, weights_TK))
    return experts.reshape(shape), weights.reshape(shape)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_float64_is_hugging_face_to_1e_9(build_case: Callable[[str], DeepseekV3], name: str) -> None:
    golden, model = load_golden(name), build_case(name)
    ours = run(model, golden, jnp.float64)
    assert ours.logits.dtype == np.float64
    np.testing.assert_array_equal(ours.experts, golden["experts"])
    np.testing.assert_allclose(ours.weights, golden["weights"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.hidden, golden["hidden"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.logits, golden["logits"], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_float64_drafts_are_hugging_faces_to_1e_9(build_case: Callable[[str], DeepseekV3]) -> None:
    golden, model = load_golden("mtp"), build_case("mtp")
    drafted = draft_logits(model, jnp.asarray(golden["tokens"]), jnp.asarray(golden["hidden"][-1]))
    np.testing.assert_allclose(drafted, golden["mtp_logits"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_hugging_face_to_1e_4(build_case: Callable[[str], DeepseekV3], name: str) -> None:
    golden = load_golden(name)
    ours = run(build_case(name), golden, jnp.float32, replay=True)
    assert ours.logits.dtype == np.float32
    assert relative_error(ours.weights, golden["weights"]) < 1e-4
    assert relative_error(ours.hidden, golden["hidden"]) < 1e-4
    assert relative_error(ours.logits, golden["logits"]) < 1e-4


def test_tiny_float32_is_hugging_face_to_1e_4(tiny_model: DeepseekV3) -> None:
    golden = load_golden("tiny")
    ours = run(tiny_model, golden, jnp.float32, replay=True)
    assert relative_error(ours.weights, golden["weights"]) < 1e-4
    assert relative_error(ours.logits[:, golden["positions"]], golden["logits"]) < 1e-4
    logsumexp = jax.nn.logsumexp(jnp.asarray(ours.logits), axis=-1)
    np.testing.assert_allclose(logsumexp, golden["logsumexp"], rtol=0, atol=1e-4)


def test_tiny_routes_at_most_one_decision_in_a_thousand_differently(tiny_model: DeepseekV3) -> None:
    golden = load_golden("tiny")
    ours = run(tiny_model, golden, jnp.float32)
    is_shared = (ours.experts[..., :, None] == golden["experts"][..., None, :]).any(axis=-1)
    assert np.count_nonzero(~is_shared) <= 0.001 * is_shared.size


def test_tiny_bfloat16_logits_stay_within_a_tenth_of_their_deviation(tiny_model: DeepseekV3) -> None:
    golden = load_golden("tiny")
    ours = run(tiny_model, golden, jnp.bfloat16, replay=True)
    assert ours.hidden.dtype == jnp.bfloat16 and ours.logits.dtype == np.float32
    assert 1e-4 < relative_error(ours.logits[:, golden["positions"]], golden["logits"]) < 0.1
