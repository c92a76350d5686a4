"""Every sum that calibration remembers against the same sum in NumPy and float64, token by token."""

import dataclasses
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from leaf_oracle import to_numpy
from moejax.calibrate import BlockStatistics, ExpertStatistics, calibrate
from moejax.calibrate.statistics import PRIOR_TOKENS, expert_statistics
from moejax.formats import ExpertWeights
from moejax.model import DeepseekV3, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.leaves import Taps
from moejax.model.moe import ExpertRun, MoE, Routing
from moejax.model.rope import Rotation
from quick_jit import quick_jit
from small_models import CHUNKS, CONFIG, first_layers, small_model, small_statistics

Array = NDArray[Any]

D, E = CONFIG.hidden_size, CONFIG.n_routed_experts
FIELDS = [field.name for field in dataclasses.fields(ExpertStatistics)]
BLOCKS = ["layers.0", "layers.1", "layers.2", "mtp.0"]
MOE_BLOCKS = BLOCKS[1:]


class Seen(NamedTuple):
    """A block, the inputs of its weights by name over all chunks, and where its tokens went."""

    block: Block
    inputs: dict[str, Array]
    routing: Routing | None


@quick_jit
def observe(block: Block, x_BTD: jax.Array, by: Rotation) -> tuple[jax.Array, Taps, Routing | None]:
    taps: Taps = {}
    y_BTD = block(x_BTD, by, taps=taps)
    taps.pop("mlp.experts", None)
    return y_BTD, taps, block.mlp.route(taps["mlp.router"]) if isinstance(block.mlp, MoE) else None


@cache
def seen() -> tuple[dict[str, Seen], Array]:
    """What every block of the small model sees in CHUNKS, and the final norm's output."""
    model, tokens_BT = small_model(), jnp.asarray(CHUNKS)
    x_BTD, blocks = model.embedded(tokens_BT), {}
    by = model.rotation(jnp.arange(tokens_BT.shape[1]), x_BTD.dtype)
    for i, layer in enumerate(model.layers):
        x_BTD, taps, routing = observe(layer, x_BTD, by)
        blocks[f"layers.{i}"] = Seen(layer, as_numpy(taps), routing)
    normed_BTD = np.asarray(model.normed(x_BTD), np.float64)
    blocks["mtp.0"] = seen_by_mtp(model, normed_BTD, by)
    return blocks, normed_BTD


def seen_by_mtp(model: DeepseekV3, normed_BTD: Array, by: Rotation) -> Seen:
    """The same of the MTP block, which takes each next token's embedding beside the hidden state, both normed.

    The last token has no next one; it is run nevertheless, for the sake of the shape, and cut off what was seen.
    """
    mtp = model.mtp[0]
    leaves = {name: to_numpy(leaf) for name, leaf in named_leaves(mtp).items() if not name.startswith("block.")}
    following_BTD = to_numpy(model.embed.get_value())[np.roll(CHUNKS, -1, axis=1)]
    both = rms_norm(following_BTD, leaves["enorm"]), rms_norm(normed_BTD, leaves["hnorm"])
    eh_input = np.concatenate(both, axis=-1)
    _, taps, routing = observe(mtp.block, jnp.asarray(eh_input @ leaves["eh_proj"].T, jnp.float32), by)
    inputs = {
        name: x.reshape(*CHUNKS.shape, -1)[:, :-1] for name, x in (as_numpy(taps) | {"eh_proj": eh_input}).items()
    }
    assert routing is not None
    cut = (own.reshape(*CHUNKS.shape, -1)[:, :-1].reshape(-1, own.shape[-1]) for own in routing)
    return Seen(mtp.block, inputs, Routing(*cut))


def rms_norm(x: Array, gain: Array) -> Array:
    return gain * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.rms_norm_eps)


def as_numpy(taps: Taps) -> dict[str, Array]:
    return {name: np.asarray(x, np.float64) for name, x in taps.items()}


def measured(name: str) -> BlockStatistics:
    return small_statistics().blocks[BLOCKS.index(name)]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_second_moment_of_every_matrix_s_input(name: str) -> None:
    inputs, sums = seen()[0][name].inputs, measured(name)
    leaves = named_leaves(seen()[0][name].block).items()
    matrices = {own for own, leaf in leaves if not isinstance(leaf, ExpertWeights) and leaf.ndim > 1}
    assert sums.input2.keys() == inputs.keys() == matrices | ({"eh_proj"} if name == "mtp.0" else set())
    tokens = CHUNKS.size - (len(CHUNKS) if name == "mtp.0" else 0)
    assert sums.tokens == tokens
    for own, x in inputs.items():
        input2_I = np.sum(x.reshape(tokens, -1) ** 2, axis=0)
        np.testing.assert_allclose(sums.input2[own], input2_I, rtol=2e-5, err_msg=own)
        np.testing.assert_allclose(sums.input_second_moment(own), input2_I / tokens, rtol=2e-5, err_msg=own)


def test_the_first_block_sees_the_normed_embeddings() -> None:
    leaves = {name: to_numpy(leaf) for name, leaf in named_leaves(small_model()).items() if ".experts." not in name}
    x_BTD = rms_norm(leaves["embed"][CHUNKS], leaves["layers.0.input_norm"])
    for name in ("q_a", "kv_a"):
        own = measured("layers.0").input2[f"self_attn.{name}"]
        np.testing.assert_allclose(own, np.sum(x_BTD**2, axis=(0, 1)), rtol=1e-5)


def test_the_head_s_input_and_the_tokens() -> None:
    statistics, normed_BTD = small_statistics(), seen()[1]
    assert statistics.tokens == CHUNKS.size
    np.testing.assert_allclose(statistics.head_input2, np.sum(normed_BTD**2, axis=(0, 1)), rtol=2e-5)
    count_C = [np.count_nonzero(token == CHUNKS) for token in range(CONFIG.vocab_size)]
    np.testing.assert_array_equal(statistics.count_C, count_C)


@pytest.mark.parametrize("name", MOE_BLOCKS)
def test_expert_sums_are_those_of_a_loop_over_tokens(name: str) -> None:
    sums = measured(name).experts
    assert sums is not None
    expected = expert_sums(seen()[0][name])
    assert expected["count_E"].sum() == sums.count_E.sum() == measured(name).tokens * CONFIG.num_experts_per_tok
    for field in FIELDS:
        np.testing.assert_allclose(getattr(sums, field), expected[field], rtol=1e-4, atol=1e-6, err_msg=field)


def test_a_dense_block_has_no_expert_sums() -> None:
    assert measured("layers.0").experts is None


def expert_sums(seen_by: Seen) -> dict[str, Array]:
    """Everything in ExpertStatistics, one token and expert at a time."""
    assert seen_by.routing is not None
    experts, F = matrices_by_expert(seen_by.block), CONFIG.moe_intermediate_size
    shapes = {name: (E, {"D": D, "F": F}[name[-1]]) if name.endswith(("ED", "EF")) else (E,) for name in FIELDS}
    sums = {name: np.zeros(shape) for name, shape in shapes.items()}
    experts_TK, weights_TK = map(np.asarray, seen_by.routing)
    for x_D, chosen_K, weights_K in zip(
        seen_by.inputs["mlp.router"].reshape(-1, D), experts_TK, weights_TK, strict=True
    ):
        for e, g in zip(chosen_K, weights_K.astype(np.float64), strict=True):
            gate, up, down = experts[e]
            a_F, u_F = gate @ x_D, up @ x_D
            f_D = down @ (silu(a_F) * u_F)
            norm = np.linalg.norm(f_D)
            slope_F = (silu(a_F + 1e-5) - silu(a_F - 1e-5)) / 2e-5
            sums["count_E"][e] += 1
            sums["weight_E"][e] += g
            sums["weighted_norm_E"][e] += g * norm
            sums["norm2_E"][e] += norm**2
            sums["gate2_E"][e] += g**2
            sums["x2_ED"][e] += (g * x_D) ** 2
            sums["hidden2_EF"][e] += (g * silu(a_F) * u_F) ** 2
            sums["gate_slope2_EF"][e] += (g * slope_F * u_F) ** 2
            sums["up_slope2_EF"][e] += (g * silu(a_F)) ** 2
            sums["peak_E"][e] = max(sums["peak_E"][e], np.abs(f_D).max())
    return sums


def matrices_by_expert(block: Block) -> list[tuple[Array, ...]]:
    """Gate, up and down of every expert of an original block, whose experts lie in one bucket in order."""
    leaves = named_leaves(block)
    return [*zip(*(to_numpy(leaves[f"mlp.experts.{name}"].buckets[0]) for name in ("gate", "up", "down")), strict=True)]


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def test_batches_do_not_change_the_sums_and_the_last_may_be_smaller() -> None:
    one_by_one, two_and_one = (calibrate(first_layers(1), CHUNKS[:3], batch) for batch in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one_by_one, two_and_one)


def random_run(experts: list[int], seed: int) -> ExpertRun:
    """Rows for these experts, D = 4 and F = 3."""
    random, rows = np.random.RandomState(seed), len(experts)
    inside = (jnp.asarray(random.randn(rows, size), jnp.float32) for size in (4, 3, 3, 3, 4))
    return ExpertRun(jnp.asarray(experts), jnp.asarray(random.rand(rows), jnp.float32), *inside)


def test_statistics_of_two_batches_merge_into_those_of_both() -> None:
    """Expert 3 is chosen in the first batch only, expert 4 in the second, expert 5 in neither."""
    runs = random_run([0, 0, 1, 2, 3, 3, 3], 0), random_run([0, 1, 1, 2, 4], 1)
    both = expert_statistics(jax.tree.map(lambda *parts: jnp.concatenate(parts), *runs), 6)
    first, second = (expert_statistics(run, 6) for run in runs)
    for merged in (first.merged(second), second.merged(first)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), merged, both)
    for e in range(5):
        peak = max(np.abs(run.y_RD[run.expert_R == e]).max(initial=0) for run in runs)
        assert both.peak_E[e] == peak > 0
    assert both.peak_E[5] == 0


def test_progress_is_told_of_every_layer() -> None:
    told = []

    def progress(steps: Any, name: str) -> Any:
        told.append((len(steps), name))
        return steps

    calibrate(first_layers(1), CHUNKS[:2], batch=2, progress=progress)
    assert told == [(1, "calibrating")]


@pytest.mark.parametrize("name", MOE_BLOCKS)
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_the_output_weight_is_what_an_error_adds(name: str, projection: str) -> None:
    """An error d of one output of a projection, at every token, adds d^2 * output_weight to the layer's error."""
    seen_by, sums = seen()[0][name], measured(name).experts
    assert sums is not None and seen_by.routing is not None
    experts_TK, weights_TK = map(np.asarray, seen_by.routing)
    e, output, d = 4, 7, 1e-5
    gate, up, down = matrices_by_expert(seen_by.block)[e]
    token, k = np.nonzero(experts_TK == e)
    x_TD = seen_by.inputs["mlp.router"].reshape(-1, D)[token]
    nudge = d * (np.arange(len(down if projection == "down" else gate)) == output)

    def run(wrong: str | None) -> Array:
        a_TF = x_TD @ gate.T + (nudge if wrong == "gate" else 0)
        u_TF = x_TD @ up.T + (nudge if wrong == "up" else 0)
        y_TD = (silu(a_TF) * u_TF) @ down.T + (nudge if wrong == "down" else 0)
        return weights_TK[token, k, None].astype(np.float64) * y_TD

    added = np.sum((run(projection) - run(None)) ** 2)
    down_norm2_EF = jnp.stack([jnp.sum(jnp.asarray(own[2]) ** 2, axis=0) for own in matrices_by_expert(seen_by.block)])
    weight_EO = sums.output_weight(projection, down_norm2_EF)
    assert weight_EO.shape == (E, 1 if projection == "down" else CONFIG.moe_intermediate_size)
    weight = float(jnp.broadcast_to(weight_EO, (E, len(nudge)))[e, output])
    assert added == pytest.approx(d**2 * weight, rel=1e-3)


def random_sums(count_E: Array, seed: int = 0) -> ExpertStatistics:
    """Sums of experts with so many tokens each; gate weights lie near 0.3."""
    random = np.random.RandomState(seed)
    gate2_E = count_E * random.uniform(0.05, 0.15, len(count_E))
    sums: dict[str, Array] = {name: count_E for name in FIELDS}
    sums |= {"gate2_E": gate2_E, "x2_ED": gate2_E[:, None] * random.uniform(0.1, 3, (len(count_E), 5))}
    sums |= {"hidden2_EF": gate2_E[:, None] * random.uniform(0.1, 3, (len(count_E), 4))}
    return ExpertStatistics(**{name: jnp.asarray(own, jnp.float32) for name, own in sums.items()})


@pytest.mark.parametrize(("projection", "field"), [("gate", "x2_ED"), ("up", "x2_ED"), ("down", "hidden2_EF")])
def test_few_tokens_are_drawn_toward_the_layer_s_mean(projection: str, field: str) -> None:
    sums = random_sums(np.asarray([0.0, 4, 32, 1e6]))
    moment_EI = np.asarray(sums.input_second_moment(projection), np.float64)
    sums_EI, gate2_E = np.asarray(getattr(sums, field), np.float64), np.asarray(sums.gate2_E, np.float64)
    layer_I = sums_EI.sum(axis=0) / gate2_E.sum()
    np.testing.assert_allclose(moment_EI[0], layer_I, rtol=1e-5)
    np.testing.assert_allclose(moment_EI[3], sums_EI[3] / gate2_E[3], rtol=1e-3)
    # The layer's mean counts like PRIOR_TOKENS tokens with the layer's mean squared gate weight.
    prior = PRIOR_TOKENS * gate2_E.sum() / np.asarray(sums.count_E).sum()
    for e in (1, 2):
        share = gate2_E[e] / (gate2_E[e] + prior)
        own_I = sums_EI[e] / gate2_E[e]
        np.testing.assert_allclose(moment_EI[e], share * own_I + (1 - share) * layer_I, rtol=1e-5)
    assert np.all(moment_EI > 0)


@pytest.mark.parametrize("name", MOE_BLOCKS)
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_second_moments_of_experts_are_finite_and_positive(name: str, projection: str) -> None:
    sums = measured(name).experts
    assert sums is not None
    moment_EI = np.asarray(sums.input_second_moment(projection))
    assert moment_EI.shape == (E, CONFIG.moe_intermediate_size if projection == "down" else D)
    assert np.all(np.isfinite(moment_EI)) and np.all(moment_EI > 0)


def test_a_layer_that_no_token_reached_has_finite_moments() -> None:
    moment_EI = random_sums(np.zeros(3)).input_second_moment("down")
    np.testing.assert_array_equal(moment_EI, np.zeros((3, 4)))
