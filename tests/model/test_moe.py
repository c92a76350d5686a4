"""The mixture of experts against loops over tokens in NumPy, in float64."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model_cases import BASE
from moejax.formats import ExpertWeights, Fp8Blocks, IntFormat, Leaf, dense, gather_experts, select_experts
from moejax.formats.group_format import encode
from moejax.kernels.hadamard_matrix import hadamard_matrix
from moejax.model import Config, DeepseekV3, config_from_hf
from moejax.model.leaves import Taps, named_leaves
from moejax.model.moe import ExpertRun, MoE, Routing
from moejax.model.steps import run_block

Array = NDArray[Any]

PROJECTIONS = ("gate", "up", "down")
D, F, E, G, T = 64, 96, 12, 4, 20
SIZES = {"hidden_size": D, "moe_intermediate_size": F, "n_routed_experts": E, "n_group": G, "topk_group": 2}
CONFIG = config_from_hf(BASE | SIZES)
UNNORMALIZED = config_from_hf(BASE | SIZES | {"norm_topk_prob": False})
ONE_GROUP = config_from_hf(BASE | SIZES | {"n_group": 1, "topk_group": 1})

choose = jax.jit(MoE.choose)
forward = jax.jit(MoE.__call__)
quick_dense = jax.jit(dense, static_argnums=1)
quick_encode = jax.jit(encode, static_argnums=2)


@jax.jit
def routed_output(moe: MoE, x_TD: jax.Array) -> tuple[Routing, jax.Array, ExpertRun]:
    assert moe.experts is not None
    routing = moe.route(x_TD)
    return routing, *moe.experts(x_TD, routing)


def random_moe(seed: int, config: Config = CONFIG, bias_mean: float = 0.0) -> MoE:
    """A layer in float32 with ragged groups, in no order, of two experts and more."""
    random = np.random.RandomState(seed)

    def matrices(*shape: int) -> jax.Array:
        return jnp.asarray(random.randn(*shape) / shape[-1] ** 0.5, jnp.float32)

    group_E = np.concatenate([np.repeat(np.arange(config.n_group), 2), random.randint(config.n_group, size=E)])[:E]
    leaves: dict[str, Any] = {
        "router": 2 * matrices(E, D),
        "bias": jnp.asarray(bias_mean + 0.3 * random.randn(E), jnp.float32),
        "group_id": jnp.asarray(random.permutation(group_E), jnp.int32),
        "routing_scale": jnp.asarray(0.8, jnp.float32),
    }
    for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        leaves[f"experts.{name}"] = gather_experts([*matrices(E, *shape)])
        leaves[f"shared.{name}"] = matrices(*shape)
    return MoE(config, leaves.__getitem__)


def with_leaves(moe: MoE, changed: dict[str, Any]) -> MoE:
    """The layer with some other weights."""
    return MoE(moe.config, (named_leaves(moe) | changed).__getitem__, moe.experts_per_token)


def without(moe: MoE, experts: Sequence[int]) -> MoE:
    """The layer in which nobody can choose these experts."""
    out = jnp.asarray(experts, jnp.int32)
    return with_leaves(moe, {"bias": moe.bias.get_value().at[out].set(-jnp.inf)})


def inputs(seed: int, tokens: int = T) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).randn(1, tokens, D))


def route_by_hand(moe: MoE, score_E: Array) -> dict[int, float]:
    """One token's experts and their weights from its scores."""
    config, bias_E, group_E = moe.config, wide(moe.bias.get_value()), np.asarray(moe.group_id.get_value())
    choice = {e: score_E[e] + bias_E[e] for e in range(len(score_E))}
    members = {g: [e for e in choice if config.n_group == 1 or group_E[e] == g] for g in range(config.n_group)}
    group_score = {g: sum(sorted(choice[e] for e in own)[-2:]) for g, own in members.items()}
    best = sorted(members, key=group_score.__getitem__)[-config.topk_group :]
    allowed = [e for g in best for e in members[g]]
    chosen = sorted(allowed, key=choice.__getitem__)[-moe.experts_per_token :]
    total = sum(score_E[e] for e in chosen) if config.norm_topk_prob else 1.0
    scale = config.routed_scaling_factor * float(moe.routing_scale.get_value())
    return {e: score_E[e] / total * scale for e in chosen}


def forward_by_hand(moe: MoE, x_TD: Array) -> Array:
    """Every token through its experts, one at a time, and through the shared expert."""
    leaves = named_leaves(moe)
    router, *shared = (wide(leaves[name]) for name in ("router", "shared.gate", "shared.up", "shared.down"))
    experts = matrices_by_expert(moe)
    y_TD = []
    for x_D in x_TD:
        y_D = swiglu(x_D, *shared)
        for e, weight in route_by_hand(moe, sigmoid(router @ x_D)).items():
            y_D = y_D + weight * swiglu(x_D, *experts[e])
        y_TD.append(y_D)
    return np.stack(y_TD)


def matrices_by_expert(moe: MoE) -> list[tuple[Array, ...]]:
    """Gate, up and down of every expert."""
    weights = [named_leaves(moe)[f"experts.{name}"] for name in PROJECTIONS]
    assert all(len(projection.buckets) == 1 for projection in weights)
    return [*zip(*(wide(projection.buckets[0])[projection.index_E] for projection in weights), strict=True)]


def swiglu(x_D: Array, gate: Array, up: Array, down: Array) -> Array:
    a = gate @ x_D
    return down @ (a * sigmoid(a) * (up @ x_D))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def wide(leaf: Leaf) -> Array:
    return np.asarray(float64(leaf))


def float64(leaf: Leaf) -> jax.Array:
    return quick_dense(leaf, jnp.dtype(jnp.float64))


def as_dictionaries(routing: Routing) -> list[dict[int, float]]:
    pairs = zip(routing.experts_TK.tolist(), routing.weights_TK.tolist(), strict=True)
    return [dict(zip(experts, weights, strict=True)) for experts, weights in pairs]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("config", [CONFIG, UNNORMALIZED, ONE_GROUP], ids=["normalized", "not", "one group"])
@given(seed=st.integers(0, 2**16), bias_mean=st.sampled_from([0.0, -1.5, 1.0]), pruned=st.integers(0, 2))
def test_routing_is_that_of_a_loop_over_tokens(config: Config, seed: int, bias_mean: float, pruned: int) -> None:
    moe = random_moe(seed, config, bias_mean)
    group_E = np.asarray(moe.group_id.get_value())
    # A group keeps two experts at least, as a pruned layer does.
    crowded = [e for e in range(E) if np.count_nonzero(group_E == group_E[e]) > 2 + pruned]
    out = crowded[:pruned]
    moe = without(moe, out)
    scores_TE = np.random.RandomState(seed + 1).rand(T, E)
    routed = as_dictionaries(choose(moe, jnp.asarray(scores_TE)))
    for token, score_E in zip(routed, scores_TE, strict=True):
        expected = route_by_hand(moe, score_E)
        assert token.keys() == expected.keys() and not token.keys() & set(out)
        np.testing.assert_allclose([token[e] for e in expected], list(expected.values()), rtol=1e-12)
        if config.norm_topk_prob:
            assert np.isclose(sum(token.values()), 0.8 * config.routed_scaling_factor)


@pytest.mark.usefixtures("x64")
def test_negative_choices_are_never_beaten_by_experts_of_other_groups() -> None:
    moe = random_moe(0, bias_mean=-3.0)
    group_E = np.asarray(moe.group_id.get_value())
    experts_TK = np.asarray(choose(moe, jnp.asarray(np.random.RandomState(1).rand(T, E))).experts_TK)
    assert all(len(set(group_E[experts])) <= CONFIG.topk_group for experts in experts_TK)


@pytest.mark.usefixtures("x64")
def test_replayed_choices_get_the_weights_of_their_scores() -> None:
    moe, scores_TE = random_moe(0), jnp.asarray(np.random.RandomState(1).rand(T, E))
    own = choose(moe, scores_TE)
    np.testing.assert_array_equal(choose(moe, scores_TE, own.experts_TK).weights_TK, own.weights_TK)
    first_TK = jnp.tile(jnp.arange(3), (T, 1))
    replayed = choose(moe, scores_TE, first_TK)
    np.testing.assert_array_equal(replayed.experts_TK, first_TK)
    share_TK = scores_TE[:, :3] / scores_TE[:, :3].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(replayed.weights_TK, 2.5 * 0.8 * share_TK, rtol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tokens", [1, T])
@pytest.mark.parametrize("experts_per_token", [1, 3])
def test_the_output_is_that_of_a_loop_over_tokens(tokens: int, experts_per_token: int) -> None:
    whole = random_moe(2)
    moe = MoE(CONFIG, named_leaves(whole).__getitem__, experts_per_token)
    x_BTD = inputs(3, tokens)
    y_BTD = forward(moe, x_BTD)
    assert y_BTD.shape == x_BTD.shape
    np.testing.assert_allclose(y_BTD[0], forward_by_hand(moe, np.asarray(x_BTD[0])), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_an_expert_may_take_every_token() -> None:
    moe = random_moe(4)
    favoured = jnp.where(moe.group_id.get_value() == 1, 10.0, 0.0)
    moe = with_leaves(moe, {"bias": moe.bias.get_value() + favoured})
    x_BTD = inputs(5)
    np.testing.assert_allclose(forward(moe, x_BTD)[0], forward_by_hand(moe, np.asarray(x_BTD[0])), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_order_of_experts_does_not_matter() -> None:
    moe, x_BTD = random_moe(6), inputs(7)
    order, leaves = np.random.RandomState(8).permutation(E), named_leaves(moe)
    permuted = {name: leaves[name][order] for name in ("router", "bias", "group_id")}
    for name in PROJECTIONS:
        permuted[f"experts.{name}"] = select_experts(leaves[f"experts.{name}"], order.tolist())
    np.testing.assert_allclose(forward(with_leaves(moe, permuted), x_BTD), forward(moe, x_BTD), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_experts_in_buckets_of_several_formats_are_their_dense_values() -> None:
    moe, x_BTD = random_moe(9), inputs(10)
    formats = {"experts.gate": "bf16 int4", "experts.up": "int2 int4 fp8", "experts.down": "fp8 int3"}
    packed = {name: in_formats(named_leaves(moe)[name], formats[name].split()) for name in formats}
    mixed = with_leaves(moe, {name: gather_experts(leaves) for name, leaves in packed.items()})
    assert [len(named_leaves(mixed)[name].buckets) for name in formats] == [2, 3, 2]
    dequantized = {name: gather_experts([*map(float64, leaves)]) for name, leaves in packed.items()}
    expected = forward_by_hand(with_leaves(moe, dequantized), np.asarray(x_BTD[0]))
    np.testing.assert_allclose(forward(mixed, x_BTD)[0], expected, rtol=0, atol=1e-12)
    assert np.abs(forward(moe, x_BTD)[0] - expected).max() > 1e-3


@pytest.mark.usefixtures("x64")
def test_an_expert_that_nobody_chose_does_not_matter() -> None:
    out, x_BTD = [2, 7], inputs(12)
    moe = without(random_moe(11), out)
    wild = {}
    for name in PROJECTIONS:
        weights = named_leaves(moe)[f"experts.{name}"]
        huge = weights.buckets[0].at[weights.index_E[jnp.asarray(out)]].set(1e30)
        wild[f"experts.{name}"] = ExpertWeights((huge,), weights.bucket_E, weights.index_E)
    np.testing.assert_array_equal(forward(with_leaves(moe, wild), x_BTD), forward(moe, x_BTD))


@pytest.mark.usefixtures("x64")
def test_the_experts_show_what_happened_inside_them() -> None:
    moe = random_moe(13)
    routing, y_TD, inside = jax.tree.map(np.asarray, routed_output(moe, inputs(14)[0]))
    assert np.all(np.diff(inside.expert_R) >= 0)
    assert np.array_equal(
        np.bincount(inside.expert_R, minlength=E), np.bincount(routing.experts_TK.ravel(), minlength=E)
    )
    experts = matrices_by_expert(moe)
    for e, x_D, a_F, b_F, y_D in zip(
        inside.expert_R, inside.x_RD, inside.gate_RF, inside.up_RF, inside.y_RD, strict=True
    ):
        gate, up, down = experts[e]
        np.testing.assert_allclose(a_F, gate @ x_D, atol=1e-12)
        np.testing.assert_allclose(b_F, up @ x_D, atol=1e-12)
        np.testing.assert_allclose(y_D, swiglu(x_D, gate, up, down), atol=1e-12)
    np.testing.assert_allclose(inside.hidden_RF, inside.gate_RF * sigmoid(inside.gate_RF) * inside.up_RF, atol=1e-12)
    np.testing.assert_allclose(inside.weight_R @ inside.y_RD, y_TD.sum(axis=0), atol=1e-12)


def test_equal_blocks_share_one_compilation(tiny_model: DeepseekV3) -> None:
    x_BTD = tiny_model.embedded(jnp.arange(7)[None])
    by = tiny_model.angles(jnp.arange(7), x_BTD.dtype)
    compiled_before = run_block._cache_size()  # type: ignore[attr-defined]
    y_BTD = x_BTD
    for block in tiny_model.layers:
        y_BTD = run_block(block, y_BTD, by)
    assert y_BTD.shape == x_BTD.shape
    assert [isinstance(block.mlp, MoE) for block in tiny_model.layers] == [False, True, True, True, True]
    assert run_block._cache_size() - compiled_before == 2  # type: ignore[attr-defined]


def in_formats(weights: ExpertWeights, formats: list[str]) -> list[Leaf]:
    """Expert e in the e-th of the formats, which repeat."""
    return [in_format(weights.expert(e), formats[e % len(formats)]) for e in range(E)]


def in_format(leaf: Leaf, name: str) -> Leaf:
    matrix = quick_dense(leaf, jnp.dtype(jnp.float32))
    if name == "bf16":
        return matrix.astype(jnp.bfloat16)
    if name.startswith("int"):
        bits, groups = int(name[3:]), matrix.shape[1] // 32
        scale = jnp.max(jnp.abs(matrix.reshape(-1, groups, 32)), axis=-1) / 2 ** (bits - 1)
        return quick_encode(matrix, scale, IntFormat(bits, 32))
    blocks = -(-matrix.shape[0] // 48), -(-matrix.shape[1] // 48)
    scale = jnp.asarray(np.random.RandomState(0).rand(*blocks) + 0.5, jnp.float32)
    return Fp8Blocks(matrix.astype(jnp.float8_e4m3fn), scale, (48, 48))


@pytest.mark.usefixtures("x64")
def test_down_may_take_the_rotated_products() -> None:
    """Where the config says so, hidden H / sqrt(F), and what calibration sees is what `down` takes."""
    config, rotation_FF = (
        config_from_hf(BASE | SIZES | {"down_input_transform": "hadamard"}),
        hadamard_matrix(F) / F**0.5,
    )
    moe, x_TD = random_moe(15, config), inputs(16)[0]
    own = {name: leaf for name, leaf in named_leaves(moe).items() if name.endswith("down")}
    turned = jax.tree.map(lambda a: a @ rotation_FF.T if a.ndim > 1 else a, own)
    y_TD, taps = jax.jit(tapped)(moe, x_TD)
    np.testing.assert_allclose(y_TD, forward_by_hand(with_leaves(moe, turned), np.asarray(x_TD)), atol=1e-6)
    run, shared = taps["experts"], [x_TD @ wide(own.get_value()).T for own in (moe.shared.gate, moe.shared.up)]
    for taken, gate, up in ((run.hidden_RF, run.gate_RF, run.up_RF), (taps["shared.down"], *shared)):
        np.testing.assert_allclose(taken, gate * sigmoid(np.asarray(gate)) * up @ rotation_FF, atol=1e-6)


def tapped(moe: MoE, x_TD: jax.Array) -> tuple[jax.Array, Taps]:
    taps: Taps = {}
    return moe(x_TD[None], taps=taps)[0], taps
