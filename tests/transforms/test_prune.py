import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moejax.calibrate import ExpertStatistics
from moejax.errors import InputError
from moejax.formats import ExpertWeights, describe
from moejax.model import named_leaves
from moejax.model.config import Config
from moejax.model.moe import MoE, Routing
from moejax.transforms.prune import (
    CRITERIA,
    gate_scores,
    masked_bias,
    min_per_group,
    prune,
    pruning_order,
    pruning_scores,
    super_experts,
)
from small_models import CONFIG, small_model

Array = NDArray[Any]

E, G = CONFIG.n_routed_experts, CONFIG.n_group
GROUP = np.arange(E) // (E // G)
seeds = st.integers(0, 2**32 - 1)


@jax.jit
def run(moe: MoE, x_TD: jax.Array) -> tuple[jax.Array, Routing]:
    return moe(x_TD[None])[0], moe.route(x_TD)


def moe_layer(bias_mean: float = 0.0) -> MoE:
    """A layer whose experts are FP8, with the mean of its router's bias moved."""
    mlp = small_model().layers[1].mlp
    assert isinstance(mlp, MoE)
    return with_bias(mlp, mlp.bias.get_value() + bias_mean)


def with_bias(moe: MoE, bias_E: jax.Array) -> MoE:
    return MoE(moe.config, (named_leaves(moe) | {"bias": bias_E}).__getitem__, moe.experts_per_token)


def random_keep(random: np.random.RandomState, count: int) -> list[int]:
    """So many experts in ascending order, two of every group among them."""
    sure = np.concatenate([random.choice(np.flatnonzero(g == GROUP), 2, replace=False) for g in range(G)])
    others = random.choice(np.setdiff1d(np.arange(E), sure), count - len(sure), replace=False)
    return sorted([*sure.tolist(), *others.tolist()])


def statistics_of(count_E: Array, random: np.random.RandomState) -> ExpertStatistics:
    """Sums over so many tokens per expert; those that scores do not look at are empty."""
    sums: dict[str, Array] = {field.name: np.zeros(0) for field in dataclasses.fields(ExpertStatistics)[:-1]}
    sums["count_E"] = count_E
    sums["weight_E"] = count_E * random.uniform(0.1, 0.9, len(count_E))
    sums["weighted_norm_E"] = count_E * random.uniform(0.1, 9, len(count_E))
    sums["norm2_E"] = count_E * random.uniform(0.1, 9, len(count_E))
    arrays: dict[str, Any] = {name: jnp.asarray(own, jnp.float32) for name, own in sums.items()}
    return ExpertStatistics(**arrays)


def scores_by_hand(statistics: ExpertStatistics, criterion: str, alpha: float) -> list[float]:
    count_E, weight_E, weighted_norm_E, norm2_E = (
        np.asarray(own, np.float64).tolist()
        for own in (statistics.count_E, statistics.weight_E, statistics.weighted_norm_E, statistics.norm2_E)
    )
    frequency = [n / sum(count_E) for n in count_E]
    if criterion == "frequency":
        return frequency
    if criterion == "gate_mass":
        return weight_E
    if criterion in ("reap", "msan"):
        sums = weighted_norm_E if criterion == "reap" else norm2_E
        return [total / n if n else 0.0 for total, n in zip(sums, count_E, strict=True)]
    mean_weight = [total / n if n else 0.0 for total, n in zip(weight_E, count_E, strict=True)]
    unit = [[(own - min(part)) / (max(part) - min(part)) for own in part] for part in (frequency, mean_weight)]
    return [alpha * f + (1 - alpha) * s for f, s in zip(*unit, strict=True)]


def by_expert(leaf: Any) -> Any:
    """Of experts in one bucket its NumPy arrays in order of expert, of another weight the weight as it is."""
    if not isinstance(leaf, ExpertWeights):
        return leaf
    (bucket,) = leaf.buckets
    return jax.tree.map(lambda a: np.asarray(a)[np.asarray(leaf.index_E)], bucket)


def assert_same_bits(found: Any, expected: Any) -> None:
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (own.shape, own.dtype) == (other.shape, other.dtype)
        assert np.asarray(own).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("criterion", CRITERIA)
@given(count_E=st.lists(st.integers(0, 1000), min_size=2, max_size=20, unique=True), seed=seeds)
def test_scores_are_their_formulas(criterion: str, count_E: list[int], seed: int) -> None:
    statistics = statistics_of(np.asarray(count_E, np.float64), np.random.RandomState(seed))
    for alpha in (0.5, 0.2):
        score_E = pruning_scores(statistics, criterion, alpha)
        assert score_E.dtype == np.float64
        np.testing.assert_allclose(score_E, scores_by_hand(statistics, criterion, alpha), rtol=1e-5, atol=1e-6)


@given(count_E=st.lists(st.integers(0, 1000), min_size=2, max_size=20, unique=True), seed=seeds)
def test_scores_of_gate_weights_alone_are_the_same(count_E: list[int], seed: int) -> None:
    statistics = statistics_of(np.asarray(count_E, np.float64), np.random.RandomState(seed))
    sums = np.asarray(statistics.count_E, np.float64), np.asarray(statistics.weight_E, np.float64)
    for alpha in (0.5, 0.2):
        scores = gate_scores(*sums, alpha)
        assert set(scores) == {"frequency", "paper", "gate_mass"} < set(CRITERIA)
        for criterion, score_E in scores.items():
            np.testing.assert_allclose(score_E, scores_by_hand(statistics, criterion, alpha), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(score_E, pruning_scores(statistics, criterion, alpha))


def test_scores_of_experts_that_no_token_chose() -> None:
    scores = gate_scores(np.zeros(3), np.zeros(3))
    assert [own.tolist() for own in scores.values()] == [[0.0] * 3] * 3


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("count", [0.0, 7.0])
def test_experts_that_are_all_alike_score_alike(criterion: str, count: float) -> None:
    alike = jax.tree.map(lambda own: jnp.full(4, count), statistics_of(np.ones(4), np.random.RandomState(0)))
    score_E = pruning_scores(alike, criterion)
    assert np.all(np.isfinite(score_E)) and len(set(score_E.tolist())) == 1


def test_an_unknown_criterion_is_named() -> None:
    message = "unknown pruning criterion 'l2'; accepted are frequency, paper, gate_mass, reap, msan"
    with pytest.raises(InputError, match=message):
        pruning_scores(statistics_of(np.ones(4), np.random.RandomState(0)), "l2")


@pytest.mark.parametrize(
    ("n_group", "topk_group", "experts_per_token", "expected"),
    [(8, 4, 8, 2), (8, 4, 9, 3), (8, 2, 8, 4), (4, 1, 3, 3), (4, 4, 1, 2), (1, 1, 8, 8), (1, 1, 1, 1)],
)
def test_the_least_that_a_group_keeps(n_group: int, topk_group: int, experts_per_token: int, expected: int) -> None:
    config: Config = dataclasses.replace(CONFIG, n_group=n_group, topk_group=topk_group)
    assert min_per_group(config, experts_per_token) == expected


def test_super_experts_are_far_above_the_others_and_not_in_the_last_quarter() -> None:
    """400 experts in 4 decoder layers: the 99.5th percentile of their peaks is just above the third highest."""
    peaks = {block: np.random.RandomState(block).uniform(1, 2, 100).astype(np.float32) for block in range(4)}
    peaks[4] = np.full(100, 9000, np.float32)  # an MTP block

    def found() -> list[tuple[int, int]]:
        return [(block, e) for block, own_E in super_experts(peaks, 4).items() for e in np.flatnonzero(own_E).tolist()]

    peaks[0][7], peaks[2][3], peaks[3][5] = 500, 300, 1000
    assert found() == [(0, 7)]
    peaks[3][5] = 1.5
    assert found() == [(0, 7), (2, 3)]
    # More than a tenth of the highest peak, and less.
    peaks[2][3] = 51
    assert found() == [(0, 7), (2, 3)]
    peaks[2][3] = 49
    assert found() == [(0, 7)]


@given(st.lists(st.integers(0, 4), min_size=8, max_size=8), st.integers(1, 8), seeds)
def test_super_experts_are_their_equation(scales: list[int], num_layers: int, seed: int) -> None:
    random = np.random.RandomState(seed)
    peaks = {block: 10.0**scale * random.rand(60) for block, scale in enumerate(scales)}
    of_layers = np.sort(np.concatenate([peaks[block] for block in range(num_layers)]))
    place = 0.995 * (len(of_layers) - 1)
    low, high = of_layers[int(place)], of_layers[int(place) + 1]
    percentile = low + (place - int(place)) * (high - low)
    for block, found_E in super_experts(peaks, num_layers).items():
        assert found_E.shape == (60,) and found_E.dtype == bool
        for found, peak in zip(found_E, peaks[block], strict=True):
            assert found == (peak > percentile and peak > of_layers[-1] / 10 and block / num_layers < 0.75)


@pytest.mark.parametrize("num_layers", [0, 4])
def test_without_peaks_nobody_is_super(num_layers: int) -> None:
    """Neither experts that no token chose, nor those of an MTP block behind dense layers."""
    found = super_experts({num_layers: np.ones(8)} | {block: np.zeros(8) for block in range(num_layers)}, num_layers)
    assert len(found) == num_layers + 1 and not any(own_E.any() for own_E in found.values())


class Layer(NamedTuple):
    """What an order is made of."""

    score_E: Array
    group_E: Array
    keep_per_group: int
    protected_E: NDArray[np.bool_] | None


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Up to four ragged groups in no order, with equal scores among their experts."""
    experts = draw(st.integers(2, 24))
    random = np.random.RandomState(draw(seeds))
    score_E = np.asarray(draw(st.lists(st.integers(0, 9), min_size=experts, max_size=experts)), np.float64)
    protected_E = draw(st.none() | st.just(random.rand(experts) < 0.3))
    group_E = random.randint(draw(st.integers(1, 4)), size=experts)
    return Layer(score_E, group_E, draw(st.integers(1, 4)), protected_E)


def prunable(layer: Layer) -> Array:
    """How many experts each group can lose, 0 for a number that is no group's."""
    size_G = np.bincount(layer.group_E)
    unprotected_G = np.bincount(layer.group_E, weights=None if layer.protected_E is None else ~layer.protected_E)
    return np.minimum(np.maximum(size_G - layer.keep_per_group, 0), unprotected_G).astype(int)


def assert_least_needed_first_within_groups(layer: Layer, order: Array) -> None:
    assert len(set(order.tolist())) == len(order)
    stay = np.setdiff1d(np.arange(len(layer.score_E)), order)
    if layer.protected_E is not None:
        assert not np.any(layer.protected_E[order])
        stay = stay[~layer.protected_E[stay]]
    for group in np.unique(layer.group_E):
        gone = layer.score_E[order[layer.group_E[order] == group]]
        assert np.all(np.diff(gone) >= 0)
        assert np.all(layer.score_E[stay[layer.group_E[stay] == group]] >= max(gone, default=0))


@given(layers())
def test_pruning_stops_at_the_least_of_every_group(layer: Layer) -> None:
    order = pruning_order(*layer)
    assert_least_needed_first_within_groups(layer, order)
    np.testing.assert_array_equal(np.bincount(layer.group_E[order], minlength=len(prunable(layer))), prunable(layer))
    # Over all groups too, the least needed go first; of equals the first.
    assert [*zip(layer.score_E[order], order, strict=True)] == sorted(zip(layer.score_E[order], order, strict=True))


@given(layers())
def test_equal_groups_lose_one_expert_each_per_round(layer: Layer) -> None:
    order = pruning_order(*layer, equal_groups=True)
    assert_least_needed_first_within_groups(layer, order)
    groups = np.unique(layer.group_E)
    assert len(order) == len(groups) * min(prunable(layer)[groups])
    for start in range(0, len(order), len(groups)):
        np.testing.assert_array_equal(np.sort(layer.group_E[order[start : start + len(groups)]]), groups)
    one_group = pruning_order(layer.score_E, 0 * layer.group_E, layer.keep_per_group, layer.protected_E)
    same = pruning_order(layer.score_E, 0 * layer.group_E, layer.keep_per_group, layer.protected_E, equal_groups=True)
    np.testing.assert_array_equal(same, one_group)


def test_protected_experts_count_as_survivors() -> None:
    score_E, group_E = np.asarray([0.0, 1, 2, 3, 4, 5, 6, 7]), np.asarray([0, 0, 0, 0, 1, 1, 1, 1])
    protected_E = np.asarray([True, True, False, False, False, False, False, True])
    assert pruning_order(score_E, group_E, 2, protected_E).tolist() == [2, 3, 4, 5]
    assert pruning_order(score_E, group_E, 2, protected_E, equal_groups=True).tolist() == [2, 4, 3, 5]
    assert pruning_order(score_E, group_E, 1, protected_E).tolist() == [2, 3, 4, 5, 6]
    assert pruning_order(score_E, group_E, 1, protected_E, equal_groups=True).tolist() == [2, 4, 3, 5]
    assert pruning_order(score_E, group_E, 2, np.full(8, True)).tolist() == []


@pytest.mark.parametrize("count", [6, 8])
@pytest.mark.parametrize("bias_mean", [0.0, -1.5])
def test_a_pruned_layer_is_one_with_experts_masked(count: int, bias_mean: float) -> None:
    moe, random = moe_layer(bias_mean), np.random.RandomState(count)
    with jax.enable_x64(True):
        x_TD = jnp.asarray(random.randn(40, CONFIG.hidden_size))
        assert x_TD.dtype == jnp.float64
        whole_TD, _ = run(moe, x_TD)
        for _ in range(4):
            keep = random_keep(random, count)
            pruned_TD, routing = run(prune(moe, keep), x_TD)
            bias_E = masked_bias(moe.bias.get_value(), np.isin(np.arange(E), keep, invert=True))
            masked_TD, masked_routing = run(with_bias(moe, bias_E), x_TD)
            np.testing.assert_array_equal(np.asarray(keep)[routing.experts_TK], masked_routing.experts_TK)
            np.testing.assert_allclose(routing.weights_TK, masked_routing.weights_TK, rtol=1e-12)
            np.testing.assert_allclose(pruned_TD, masked_TD, rtol=0, atol=1e-12)
            assert np.abs(pruned_TD - whole_TD).max() > 1e-3, "no token lost an expert"


@given(seed=seeds)
def test_survivors_keep_their_bytes_and_their_group(seed: int) -> None:
    moe = moe_layer()
    keep = random_keep(np.random.RandomState(seed), 8)
    before, after = named_leaves(moe), named_leaves(prune(moe, keep))
    assert before.keys() == after.keys()
    for name, leaf in after.items():
        own, original = by_expert(leaf), by_expert(before[name])
        is_per_expert = name in ("router", "bias", "group_id") or name.startswith("experts.")
        assert_same_bits(own, jax.tree.map(lambda a: a[np.asarray(keep)], original) if is_per_expert else original)
    np.testing.assert_array_equal(after["group_id"], GROUP[keep])


def test_pruning_works_on_shapes_alone_and_leaves_its_input_alone() -> None:
    moe, keep = moe_layer(), [0, 1, 4, 6, 7, 8, 10]
    before = jax.tree.map(np.array, named_leaves(moe))
    abstract = named_leaves(jax.eval_shape(lambda own: prune(own, keep), moe))
    assert abstract["experts.down"].shape == (len(keep), CONFIG.hidden_size, CONFIG.moe_intermediate_size)
    assert {name: describe(leaf) for name, leaf in abstract.items()} == {
        name: describe(leaf) for name, leaf in named_leaves(prune(moe, keep)).items()
    }
    assert_same_bits(named_leaves(moe), before)


def test_k_stays_and_so_does_the_routing_scale() -> None:
    moe = moe_layer()
    assert prune(moe, range(8)).experts_per_token == moe.experts_per_token == 3
    assert prune(moe, range(8)).routing_scale.get_value() == moe.routing_scale.get_value()
