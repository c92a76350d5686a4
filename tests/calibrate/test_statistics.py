"""Every sum that calibration remembers against the same sum in NumPy and float64, token by token."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leaf_oracle import to_numpy
from moejax.calibrate import ExpertStatistics, calibrate
from moejax.calibrate.calibration import _observe_trunk
from moejax.calibrate.expert_statistics import (
    EXPERT_PRODUCTS_BYTES,
    PRIOR_TOKENS,
    PRIOR_TOKENS_PER_INPUT,
    LayerSums,
    _shrunk_hessian,
    expert_statistics,
    joined,
)
from moejax.formats import ExpertWeights
from moejax.formats.arrays import abstract_array
from moejax.model import named_leaves
from moejax.model.moe import ExpertRun
from seen_by_blocks import (
    BLOCKS,
    MOE_BLOCKS,
    Array,
    expert_sums,
    matrices_by_expert,
    measured,
    rms_norm,
    seen,
    silu,
    statistics_with_hessians,
)
from small_models import CHUNKS, CONFIG, first_layers, small_model, small_statistics

D, E = CONFIG.hidden_size, CONFIG.n_routed_experts
# Sums, and a peak; what is chosen by them comes last.
FIELDS = [field.name for field in dataclasses.fields(ExpertStatistics)][:-2]  # the last two are chosen, not summed


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
        hessian_II = x.reshape(tokens, -1).T @ x.reshape(tokens, -1) / tokens
        largest = np.diag(hessian_II).max()
        np.testing.assert_allclose(sums.input_hessian(own), hessian_II, rtol=2e-5, atol=2e-6 * largest, err_msg=own)


def test_the_first_block_sees_the_normed_embeddings() -> None:
    leaves = {name: to_numpy(leaf) for name, leaf in named_leaves(small_model()).items() if ".experts." not in name}
    x_BTD = rms_norm(leaves["embed"][CHUNKS], leaves["layers.0.input_norm"])
    for name in ("q_a", "kv_a"):
        own = measured("layers.0").input2[f"self_attn.{name}"]
        np.testing.assert_allclose(own, np.sum(x_BTD**2, axis=(0, 1)), rtol=1e-5)


def test_the_head_s_input_and_the_tokens() -> None:
    statistics, normed_BTD = statistics_with_hessians(), seen()[1]
    assert statistics.tokens == CHUNKS.size
    np.testing.assert_allclose(statistics.head_input2, np.sum(normed_BTD**2, axis=(0, 1)), rtol=2e-5)
    count_C = [np.count_nonzero(token == CHUNKS) for token in range(CONFIG.vocab_size)]
    np.testing.assert_array_equal(statistics.count_C, count_C)
    normed_TD = normed_BTD.reshape(-1, D)
    np.testing.assert_allclose(statistics.head_hessian(), normed_TD.T @ normed_TD / CHUNKS.size, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", MOE_BLOCKS)
def test_expert_sums_are_those_of_a_loop_over_tokens(name: str) -> None:
    sums = measured(name).experts
    assert sums is not None
    expected = expert_sums(seen()[0][name])
    assert expected["count_E"].sum() == sums.count_E.sum() == measured(name).tokens * CONFIG.num_experts_per_tok
    found = {name: getattr(sums, name) for name in FIELDS if name != "layer"}
    found |= {name: found[name][0] for name in ("x_EDD", "hidden_EFF")}
    found |= {name: getattr(sums.layer, name) for name in ("tokens", "count", "gate2", "x2_D", "hidden2_F")}
    found |= {name: getattr(sums.layer, name) for name in ("x_DD", "hidden_FF")}
    for field in found:
        atol = 1e-6 * max(1, np.abs(expected[field]).max())
        np.testing.assert_allclose(found[field], expected[field], rtol=1e-4, atol=atol, err_msg=field)


def test_a_dense_block_has_no_expert_sums() -> None:
    assert measured("layers.0").experts is None


def test_batches_do_not_change_the_sums_and_the_last_may_be_smaller() -> None:
    compiled = _observe_trunk._cache_size()  # type: ignore[attr-defined]
    one_by_one, two_and_one = (calibrate(first_layers(1), CHUNKS[:3], batch, hessians=True) for batch in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), one_by_one, two_and_one)
    assert _observe_trunk._cache_size() == compiled + 2  # type: ignore[attr-defined]


def test_without_hessians_none_is_collected_and_the_rest_is_the_same() -> None:
    without, with_hessians = small_statistics(), statistics_with_hessians()
    assert without.head_products is None
    for own, other in zip(without.blocks, with_hessians.blocks, strict=True):
        assert own.products is None
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), own.input2, other.input2)
        if own.experts is not None:
            assert own.experts.x_EDD == own.experts.hidden_EFF == ()
            assert own.experts.layer.x_DD is None and own.experts.layer.hidden_FF is None
            for name in set(FIELDS) - {"x_EDD", "hidden_EFF", "layer"}:
                np.testing.assert_allclose(getattr(own.experts, name), getattr(other.experts, name), rtol=1e-5)


def random_run(experts: list[int], seed: int) -> ExpertRun:
    """Rows for these experts, D = 4 and F = 3."""
    random, rows = np.random.RandomState(seed), len(experts)
    inside = (jnp.asarray(random.randn(rows, size), jnp.float32) for size in (4, 3, 3, 3, 4))
    tokens, chosen = jnp.arange(rows), jnp.asarray(experts)
    return ExpertRun(tokens, chosen, jnp.asarray(random.rand(rows), jnp.float32), *inside)


def test_statistics_of_two_batches_merge_into_those_of_both() -> None:
    """Expert 3 is chosen in the first batch only, expert 4 in the second, expert 5 in neither."""
    runs = random_run([0, 0, 1, 2, 3, 3, 3], 0), random_run([0, 1, 1, 2, 4], 1)
    in_order = np.argsort(np.concatenate([run.expert_R for run in runs]), kind="stable")
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts)[in_order], *runs)
    both = expert_statistics(together, 6, EXPERT_PRODUCTS_BYTES)
    first, second = (expert_statistics(run, 6, EXPERT_PRODUCTS_BYTES) for run in runs)
    assert both.x_EDD and both.hidden_EFF
    for merged in (first.merged(second), second.merged(first)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, both)
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
    sums: dict[str, Any] = {name: count_E for name in FIELDS if name.endswith("_E")} | {"gate2_E": gate2_E}
    sums |= {"gate_slope2_EF": count_E, "up_slope2_EF": count_E}
    layer: dict[str, Any] = {"tokens": count_E.sum(), "count": count_E.sum(), "gate2": gate2_E.sum()}
    for name, axis, size in (("x", "D", 5), ("hidden", "F", 4)):
        roots_EII = random.randn(len(count_E), size, size)
        own_EII = gate2_E[:, None, None] * (roots_EII @ roots_EII.swapaxes(1, 2))
        diagonal_EI = np.diagonal(own_EII, axis1=1, axis2=2)
        sums |= {f"{name}_E{axis}{axis}": (own_EII,), f"{name}2_E{axis}": diagonal_EI}
        layer |= {f"{name}_{axis}{axis}": own_EII.sum(axis=0), f"{name}2_{axis}": diagonal_EI.sum(axis=0)}
    float32 = partial(jax.tree.map, partial(jnp.asarray, dtype=jnp.float32))
    return ExpertStatistics(layer=LayerSums(**float32(layer)), **float32(sums))


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


@pytest.mark.parametrize(("projection", "field"), [("gate", "x_EDD"), ("up", "x_EDD"), ("down", "hidden_EFF")])
def test_few_tokens_draw_a_hessian_toward_the_layer_s(projection: str, field: str) -> None:
    sums = random_sums(np.asarray([0.0, 4, 32, 1e6]))
    hessian_EII = np.stack([np.asarray(sums.input_hessian(projection, e), np.float64) for e in range(4)])
    sums_EII, gate2_E = np.asarray(getattr(sums, field)[0], np.float64), np.asarray(sums.gate2_E, np.float64)
    layer_II = sums_EII.sum(axis=0) / gate2_E.sum()
    np.testing.assert_allclose(hessian_EII[0], layer_II, rtol=1e-5)
    np.testing.assert_allclose(hessian_EII[3], sums_EII[3] / gate2_E[3], rtol=1e-3)
    # The layer's mean counts like that many tokens with the layer's mean squared gate weight.
    prior = PRIOR_TOKENS_PER_INPUT * len(layer_II) * gate2_E.sum() / np.asarray(sums.count_E).sum()
    for e in (1, 2):
        share = gate2_E[e] / (gate2_E[e] + prior)
        expected_II = share * sums_EII[e] / gate2_E[e] + (1 - share) * layer_II
        np.testing.assert_allclose(hessian_EII[e], expected_II, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projection", ["gate", "down"])
def test_a_hessian_s_diagonal_is_the_second_moment_where_no_prior_tells_them_apart(projection: str) -> None:
    """Of an expert without tokens both are the layer's, of one with many its own."""
    sums = random_sums(np.asarray([0.0, 100, 1e7]))
    for e in (0, 2):
        diagonal_I = np.diagonal(sums.input_hessian(projection, e))
        np.testing.assert_allclose(diagonal_I, sums.input_second_moment(projection)[e], rtol=1e-4)


@pytest.mark.parametrize("name", MOE_BLOCKS)
@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_experts_hessians_are_symmetric_and_positive(name: str, projection: str) -> None:
    sums = measured(name).experts
    assert sums is not None
    for e in range(E):
        hessian_II = np.asarray(sums.input_hessian(projection, e), np.float64)
        np.testing.assert_array_equal(hessian_II, hessian_II.T)
        eigenvalues = np.linalg.eigvalsh(hessian_II)
        assert eigenvalues[0] > -1e-6 * eigenvalues[-1] and eigenvalues[-1] > 0


def test_hessians_of_all_experts_compile_once_and_in_a_loop() -> None:
    sums = random_sums(np.asarray([0.0, 4, 32, 100, 7]))
    compiled = _shrunk_hessian._cache_size()  # type: ignore[attr-defined]
    each = [sums.input_hessian(projection, e) for projection in ("gate", "up") for e in range(5)]
    assert _shrunk_hessian._cache_size() <= compiled + 1  # type: ignore[attr-defined]
    looped = jax.lax.map(partial(sums.input_hessian, "up"), jnp.arange(5))
    np.testing.assert_allclose(looped, each[5:], rtol=1e-6)


def test_a_layer_that_no_token_reached_has_finite_hessians() -> None:
    np.testing.assert_array_equal(random_sums(np.zeros(3)).input_hessian("down", 1), np.zeros((4, 4)))


def test_experts_share_their_layer_s_products_where_their_own_take_too_much() -> None:
    """Of an expert, x takes 4*4 and hidden 3*3 numbers of four bytes."""
    run = random_run([0, 0, 1, 2, 3, 3, 3], 0)
    own, one, none = (
        joined([expert_statistics(run, 6, max_bytes)], jnp.float32(5)) for max_bytes in (4 * 16, 4 * 16 - 1, 4 * 9 - 1)
    )
    assert own.x_EDD and own.hidden_EFF
    assert not one.x_EDD and one.hidden_EFF
    assert not none.x_EDD and not none.hidden_EFF
    assert none.layer.x_DD is not None and none.layer.hidden_FF is not None
    np.testing.assert_allclose(none.layer.x_DD, jnp.sum(own.x_EDD[0], axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(none.layer.hidden_FF, jnp.sum(own.hidden_EFF[0], axis=0), rtol=1e-5, atol=1e-6)
    for e in range(6):
        np.testing.assert_allclose(none.input_hessian("up", e), none.layer.x_DD / jnp.sum(none.gate2_E), rtol=1e-6)
        np.testing.assert_allclose(one.input_hessian("down", e), own.input_hessian("down", e), rtol=1e-5, atol=1e-6)
    # A Hessian is of its expert's own tokens and as many of the layer's as it has inputs, or of all that came.
    np.testing.assert_array_equal(one.input_tokens("down"), jnp.asarray([2, 1, 1, 3, 0, 0]) + 3)
    np.testing.assert_array_equal(one.input_tokens("up"), jnp.full(6, 5))
    assert [one.inputs("up", 3).tokens, one.inputs("down", 3).tokens] == [5, 6]


def test_deepseek_v3_s_experts_have_hessians_of_their_own_for_down_alone() -> None:
    rows, experts, D, F = 8 * 512, 256, 7168, 2048
    inside = (abstract_array((rows, size), jnp.float32) for size in (D, F, F, F, D))
    index_R = abstract_array((rows,), jnp.int32)
    run = ExpertRun(index_R, index_R, abstract_array((rows,), jnp.float32), *inside)
    sums = jax.eval_shape(lambda run: expert_statistics(run, experts, EXPERT_PRODUCTS_BYTES // experts), run)
    assert not sums.x_EDD and sums.layer.x_DD is not None and sums.layer.x_DD.shape == (D, D)
    assert [own.shape for own in sums.hidden_EFF] == [(experts, F, F)]
