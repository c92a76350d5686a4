"""What the solver is told of the small checkpoint, beside what evaluation measures of models changed by hand."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.calibrate import Inputs
from moejax.calibrate.expert_statistics import ExpertStatistics
from moejax.checkpoint.json_file import read_json_object
from moejax.formats import ExpertWeights, dense, parse_format
from moejax.model import Config, DeepseekV3, config_from_hf, named_leaves
from moejax.model.deepseek_v3 import Block
from moejax.model.leaves import Taps, Weight
from moejax.model.moe import MoE
from moejax.model.steps import run_block
from moejax.pipeline.job import Prepared
from moejax.pipeline.measure import measure
from moejax.pipeline.measured import BlockMeasures, Measured, Pruned
from moejax.pipeline.options import options, quantizable
from moejax.pipeline.prices import LayerPruning, Prices, PruningProbe, _interpolated
from moejax.pipeline.probes import EXPERTS_DOWN, EXPERTS_WIDE, QUERIES, VALUES, changes_of, family_of, rounding_probes
from moejax.pipeline.recipe import Recipe
from moejax.pipeline.work import NOT_KEPT
from moejax.pipeline.working_copy import one_bucket
from moejax.planning import KEEP, BlockPlan, Plan
from moejax.planning.menus import Menu, Menus
from moejax.planning.plan import PROJECTIONS
from moejax.progress import silent
from moejax.resources import config_path
from moejax.transforms.prune import PruningError, masked_bias, pruning_scores
from moejax.transforms.rounding import round_weight
from small_job import RECIPE

Diverges = Callable[[DeepseekV3], float]
EVERY = tuple(range(12))
# Pruning alone, which is quick to measure.
PRUNING_ALONE = Recipe(formats=())


@pytest.fixture(scope="module")
def costs(prepared: Prepared) -> Menus:
    return prepared.problem.costs


@pytest.fixture(scope="module")
def free(original: DeepseekV3) -> Menus:
    return options(original, RECIPE)


def menus(costs: Menus) -> list[Menu]:
    return [costs.tensors, *(menu for block in costs.experts.values() for menu in block.menus.values())]


def statistics_of(prepared: Prepared, block: int) -> ExpertStatistics:
    assert prepared.trials.statistics.known is not None
    sums = prepared.trials.statistics.known.blocks[block].experts
    assert sums is not None
    return sums


def rounded(prepared: Prepared, original: DeepseekV3, name: str, target: str) -> Weight:
    """A weight in a format, by the second moments of its inputs."""
    leaf, to = named_leaves(original)[name], parse_format(target)
    known = prepared.trials.statistics.known
    assert known is not None
    if name in ("embed", "head"):
        moment = jnp.ones(128) if name == "embed" else known.head_input2 / known.tokens
        return round_weight(dense(leaf, jnp.dtype(jnp.float32)), Inputs(moment), to)
    layer, own = int(name.split(".")[1]), name.split(".", 2)[2]
    if isinstance(leaf, ExpertWeights):
        moment_EI = statistics_of(prepared, layer).input_second_moment(own.rpartition(".")[2])
        each = [round_weight(dense(leaf.expert(e), jnp.dtype(jnp.float32)), Inputs(moment_EI[e]), to) for e in EVERY]
        return one_bucket(jnp.stack([dense(own, jnp.dtype(jnp.float32)) for own in each]))
    moment = known.blocks[layer].input_second_moment(own)
    return round_weight(dense(leaf, jnp.dtype(jnp.float32)), Inputs(moment), to)


def changed(original: DeepseekV3, new: dict[str, Weight]) -> DeepseekV3:
    return DeepseekV3(original.config, (named_leaves(original) | new).__getitem__)


def masked(original: DeepseekV3, layer: int, pruned: np.ndarray) -> dict[str, Weight]:
    bias = named_leaves(original)[f"layers.{layer}.mlp.bias"]
    return {f"layers.{layer}.mlp.bias": masked_bias(bias, np.isin(np.arange(12), pruned))}


def cost_of(costs: Menus, name: str, target: str) -> float:
    """Of a weight, or of a projection of all experts of a layer."""
    if ".experts." in name:
        menu = costs.experts[int(name.split(".")[1])].menus[name.rpartition(".")[2]]
        return float(np.sum(menu.cost_NF[:, menu.formats.index(target)]))
    return float(costs.tensors.cost_NF[costs.names.index(name), costs.tensors.formats.index(target)])


def test_every_option_has_a_cost_and_only_they_have(costs: Menus, free: Menus) -> None:
    assert costs.names == free.names and costs.experts.keys() == free.experts.keys() == {1, 2, 3}
    for measured, allowed in zip(menus(costs), menus(free), strict=True):
        np.testing.assert_array_equal(measured.bytes_NF, allowed.bytes_NF)
        np.testing.assert_array_equal(np.isfinite(measured.cost_NF), np.isfinite(allowed.cost_NF))
        assert np.all(measured.cost_NF >= 0)
        assert np.all(measured.cost_NF[:, -1] == 0)


def test_formats_that_are_not_allowed_are_measured_too(prepared: Prepared, free: Menus) -> None:
    """Plans that the recipe forbids can be predicted with them; here every format fits every weight."""
    assert np.any(np.isinf(free.tensors.cost_NF))
    assert all(np.all(np.isfinite(menu.cost_NF)) for menu in menus(prepared.costs))


def test_more_bits_cost_less(costs: Menus) -> None:
    for menu in menus(costs):
        # Forbidden formats of few bits are infinite, and differences of them are no numbers.
        with np.errstate(invalid="ignore"):
            assert not np.any(np.diff(menu.cost_NF, axis=1) > 0)
            assert np.all(menu.cost_NF[:, -2] < menu.cost_NF[:, menu.formats.index("int4g128")])


@pytest.mark.parametrize(
    ("names", "target"),
    [
        (["layers.1.self_attn.kv_a", "layers.1.self_attn.v_b", "layers.1.self_attn.o"], "int3g128"),
        (["layers.2.self_attn.q_a", "layers.2.self_attn.q_b", "layers.2.self_attn.k_b"], "int3g128"),
        (["layers.0.mlp.down"], "int3g128"),
        (["layers.1.mlp.shared.gate", "layers.1.mlp.shared.up"], "int3g128"),
        (["layers.2.mlp.experts.gate", "layers.2.mlp.experts.up"], "int2g128"),
        (["layers.1.mlp.experts.down"], "int2g128"),
        (["embed"], "int3g128"),
        (["head"], "int3g128"),
    ],
)
def test_a_familys_costs_at_the_probed_format_sum_to_their_true_divergence(
    prepared: Prepared, original: DeepseekV3, divergence: Diverges, names: list[str], target: str
) -> None:
    model = changed(original, {name: rounded(prepared, original, name, target) for name in names})
    total = sum(cost_of(prepared.costs, name, target) for name in names)
    assert total == pytest.approx(divergence(model), rel=2e-3)


def test_within_a_family_a_weight_costs_what_it_spoils_of_the_blocks_output(
    prepared: Prepared, original: DeepseekV3
) -> None:
    names = ["layers.1.self_attn.kv_a", "layers.1.self_attn.v_b", "layers.1.self_attn.o"]
    x_BTD = embedded = named_leaves(original)["embed"][jnp.asarray(prepared.trials.calibrated.held_out)]
    by = original.angles(jnp.arange(embedded.shape[1]), jnp.dtype(jnp.float32))
    x_BTD = run_block(original.layers[0], jnp.asarray(x_BTD, jnp.float32), by)

    def output(block: Block) -> np.ndarray:
        return np.asarray(run_block(block, x_BTD, by), np.float64)

    y_BTD, spoiled = output(original.layers[1]), {}
    for name in names:
        new = {name.split(".", 2)[2]: rounded(prepared, original, name, "int3g128")}
        error_BTD = output(original.layers[1].with_leaves(new)) - y_BTD
        spoiled[name] = np.mean(np.sum(error_BTD**2, -1) / np.sum(y_BTD**2, -1))
    for name in names[1:]:
        ratio = cost_of(prepared.costs, name, "int3g128") / cost_of(prepared.costs, names[0], "int3g128")
        assert ratio == pytest.approx(spoiled[name] / spoiled[names[0]], rel=0.01)


def test_mtp_blocks_take_the_last_layers_scales(costs: Menus) -> None:
    """Their errors are their own, so costs differ, but not by orders of magnitude from those of equal weights."""
    for projection in PROJECTIONS:
        own, last = (costs.experts[block].menus[projection].cost_NF[:, 0].sum() for block in (3, 2))
        assert last / 10 < own < last * 10
    for name in ("self_attn.q_a", "self_attn.o", "mlp.shared.down"):
        own, last = (cost_of(costs, f"{block}.{name}", "int4g128") for block in ("mtp.0.block", "layers.2"))
        assert last / 10 < own < last * 10
    assert cost_of(costs, "mtp.0.eh_proj", "int4g128") > 0


def test_what_is_measured_is_not_changed(prepared: Prepared) -> None:
    for name, leaf in named_leaves(prepared.trials.source.block(1).whole()).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, prepared.checkpoint.leaf(f"layers.1.{name}"))


def test_experts_go_in_the_order_in_which_reap_needs_them_least(prepared: Prepared) -> None:
    # Of 24 peaks only the largest is above the 99.5th percentile: one expert is spared.
    peaks = {index: np.asarray(statistics_of(prepared, index).peak_E) for index in (1, 2)}
    spared = max((float(peak), index, e) for index, peak_E in peaks.items() for e, peak in enumerate(peak_E))[1:]
    for index, menu in prepared.costs.experts.items():
        score_E = pruning_scores(statistics_of(prepared, index), "reap")
        assert (index, spared[1]) != spared or spared[1] not in menu.order
        assert np.all(np.diff(score_E[menu.order]) >= 0)
        for group in range(3):
            kept = np.setdiff1d(np.arange(4 * group, 4 * group + 4), menu.order)
            gone = np.intersect1d(np.arange(4 * group, 4 * group + 4), menu.order)
            needed = [e for e in kept if (index, e) != spared]
            assert len(kept) == 2 and score_E[needed].min() >= score_E[gone].max()


def test_pruning_costs_what_masking_does(prepared: Prepared, original: DeepseekV3, divergence: Diverges) -> None:
    peaks = {index: np.max(np.asarray(statistics_of(prepared, index).peak_E)) for index in (1, 2)}
    spared = max(peaks, key=peaks.__getitem__)
    for index in (1, 2):
        menu = prepared.costs.experts[index]
        assert len(menu.pruning_cost) == len(menu.order) + 1 == 7
        assert menu.pruning_cost[0] == 0 and np.all(np.diff(menu.pruning_cost) >= 0) and menu.pruning_cost[1] > 0
        for count in (2, 3, 5, 6):
            found = divergence(changed(original, masked(original, index, menu.order[:count])))
            # An expert that is spared was not while pruning was tried; between what is probed, by what is spoiled.
            is_probed = index != spared and count != 5
            assert menu.pruning_cost[count] == pytest.approx(found, rel=2e-3 if is_probed else 0.5), count


def test_every_count_of_a_small_layer_is_tried(prepared: Prepared) -> None:
    found = [(probe.block, probe.pruned) for own in prepared.pruning.values() for probe in own.probes]
    assert found == [(block, count) for block in (1, 2) for count in range(1, 7)]
    assert not prepared.pruning[3].probes


def test_a_layers_errors_are_those_of_its_outputs(prepared: Prepared, original: DeepseekV3) -> None:
    x_BTD = jnp.asarray(named_leaves(original)["embed"][jnp.asarray(prepared.trials.calibrated.held_out)], jnp.float32)
    by = original.angles(jnp.arange(x_BTD.shape[1]), jnp.dtype(jnp.float32))
    taps: Taps = {}
    block = original.layers[1]
    block(run_block(original.layers[0], x_BTD, by), by, taps=taps)
    x_TD, mlp = taps["mlp.router"], block.mlp
    assert isinstance(mlp, MoE)
    for probe in prepared.pruning[1].probes[::3]:
        pruned = prepared.pruning[1].order[: probe.pruned]
        bias = masked(original, 1, pruned)["layers.1.mlp.bias"]
        without = mlp.with_leaves({"bias": bias})
        assert mlp.experts is not None
        routing = mlp.route(x_TD)
        outputs = (mlp.experts(x_TD, moe.route(x_TD))[0] for moe in (mlp, without))
        y_TD, changed_TD = (np.asarray(own, np.float64) for own in outputs)
        lost_TK = np.isin(routing.experts_TK, pruned)
        weights_TK = np.asarray(routing.weights_TK, np.float64)
        assert probe.error.rerouted == pytest.approx(np.sum((changed_TD - y_TD) ** 2) / np.sum(y_TD**2), rel=1e-3)
        assert probe.error.gate_lost == pytest.approx(weights_TK[lost_TK].sum() / weights_TK.sum(), rel=1e-4)
        gate2_lost = (weights_TK[lost_TK] ** 2).sum() / (weights_TK**2).sum()
        assert probe.error.gate2_lost == pytest.approx(gate2_lost, rel=1e-4)
        assert probe.rerouting_ratio == pytest.approx(probe.error.rerouted / gate2_lost, rel=1e-4)


def test_nothing_lost_is_no_ratio_to_divide_by() -> None:
    nothing = PruningProbe(1, 1, 0.0, PruningError(0.0, 0.0, 0.0, 0.0))  # type: ignore[arg-type]
    assert nothing.rerouting_ratio == 0


@given(st.lists(st.floats(-1e-6, 10, allow_subnormal=False), min_size=1, max_size=6), st.integers(0, 20))
def test_costs_between_probes_never_fall(divergences: list[float], more: int) -> None:
    error = PruningError(*[jnp.float32(0)] * 4)
    counts = np.cumsum(np.arange(1, len(divergences) + 1))
    probes = tuple(PruningProbe(1, int(n), kl, error) for n, kl in zip(counts, divergences, strict=True))
    cost = _interpolated(probes, int(counts[-1]) + more)
    assert cost.shape == (counts[-1] + more + 1,) and cost[0] == 0
    assert np.all(np.diff(cost) >= 0)
    for n, kl in zip(counts, np.maximum.accumulate([max(divergences[0], 0.0), *divergences[1:]]), strict=True):
        assert cost[n] == max(kl, 0.0)
    if len(counts) > 1:
        assert cost[2] == pytest.approx((cost[1] + cost[3]) / 2)


def test_mtp_blocks_take_the_last_layers_costs_of_pruning(prepared: Prepared) -> None:
    np.testing.assert_array_equal(prepared.pruning[3].cost, prepared.pruning[2].cost)
    assert not np.array_equal(prepared.pruning[2].cost, prepared.pruning[1].cost)


def pruning_by(prepared: Prepared, recipe: Recipe) -> dict[int, LayerPruning]:
    own = prepared.trials
    found = measure(own.source, recipe, own.calibrated, own.statistics.on_the_way, own.rounder, NOT_KEPT, silent)
    return Prices(found, prepared.shapes.config, recipe).pruning()


def test_experts_go_in_the_order_of_the_recipes_criterion(prepared: Prepared) -> None:
    recipe = replace(PRUNING_ALONE, criterion="frequency", share_kept=0.5, protect_super_experts=False)
    for index, own in pruning_by(prepared, recipe).items():
        score_E = pruning_scores(statistics_of(prepared, index), "frequency")
        assert np.all(np.diff(score_E[own.order]) >= 0) and len(own.order) == 6
        assert np.any(own.order != prepared.pruning[index].order)


@pytest.mark.parametrize(
    ("recipe", "counts"),
    [
        (replace(PRUNING_ALONE, share_kept=0.7), {3}),
        (replace(PRUNING_ALONE, groups="equal"), {0, 3, 6}),
        (replace(PRUNING_ALONE, share_kept=1.0), {0}),
    ],
    ids=["0.7", "equal", "all"],
)
def test_only_counts_that_the_recipe_allows_have_a_cost(prepared: Prepared, recipe: Recipe, counts: set[int]) -> None:
    for block, own in pruning_by(prepared, recipe).items():
        assert set(np.flatnonzero(np.isfinite(own.cost)).tolist()) == counts
        assert [probe.pruned for probe in own.probes] == (sorted(counts - {0}) if block < 3 else [])
        for probe in own.probes:
            assert own.cost[probe.pruned] == max(probe.divergence, 0) > 0
        if recipe.groups == "equal":
            for count in counts:
                assert len(set(np.bincount(own.order[:count] // 4, minlength=3).tolist())) == 1


def plan_of(
    original: DeepseekV3, others: str = KEEP, experts: str = KEEP, keep: dict[int, list[int]] | None = None
) -> Plan:
    """All layers alike, the MTP block as it is."""
    names = list(quantizable(original))
    blocks = []
    for layer in range(3):
        own = [name.removeprefix(f"layers.{layer}.") for name in names if name.startswith(f"layers.{layer}.")]
        formats = dict.fromkeys(own, others) if others != KEEP else {}
        if layer == 0:
            blocks.append(BlockPlan(formats))
            continue
        kept = tuple(keep[layer]) if keep else EVERY
        blocks.append(BlockPlan(formats, kept, dict.fromkeys(PROJECTIONS, (experts,) * len(kept)), 3))
    untouched = BlockPlan({}, EVERY, dict.fromkeys(PROJECTIONS, (KEEP,) * 12), 3)
    return Plan(others, others, (*blocks, untouched))


def together(prepared: Prepared, kind: str, total: float) -> float:
    """What a curve has at a sum."""
    points = {round(own, 9): value for own, value in getattr(prepared.problem.curves, kind).points}
    assert round(total, 9) in points, (total, points)
    return points[round(total, 9)]


def test_every_kind_of_loss_has_points_whose_sums_and_divergences_rise(prepared: Prepared) -> None:
    curves = prepared.problem.curves
    for curve, most in ((curves.others, 3), (curves.experts, 3), (curves.pruning, 2)):
        assert 1 <= len(curve.points) <= most
        assert np.all(np.diff(np.asarray(curve.points), axis=0) > 0)


def test_points_are_what_rounding_and_pruning_everything_does(
    prepared: Prepared, original: DeepseekV3, planned_model: Callable[[Plan], DeepseekV3], divergence: Diverges
) -> None:
    costs = prepared.costs
    of_others, of_experts = (
        divergence(planned_model(plan))
        for plan in (plan_of(original, others="int2g128"), plan_of(original, experts="int1g128"))
    )
    total = sum(cost_of(costs, name, "int2g128") for name in costs.names if not name.startswith("mtp."))
    assert together(prepared, "others", total) == pytest.approx(of_others, rel=2e-3)
    experts = [f"layers.{layer}.mlp.experts.{name}" for layer in (1, 2) for name in PROJECTIONS]
    total = sum(cost_of(costs, name, "int1g128") for name in experts)
    assert together(prepared, "experts", total) == pytest.approx(of_experts, rel=2e-3)


def large_config() -> Config:
    path = config_path("models", "deepseek_v3")
    return config_from_hf(read_json_object(path))


def with_slopes(config: Config, recipe: Recipe, slope_of: Callable[[str, int], float]) -> Measured:
    """Measures as they would be if every family had these slopes, with one weight of each in every layer."""
    own = ("self_attn.q_a", "self_attn.o", "mlp.experts.up", "mlp.experts.down")
    errors = {name: np.asarray([[4.0, 2.0, 1.0]] * 2 if "experts" in name else [4.0, 2.0, 1.0]) for name in own}
    pruned = (Pruned(config.n_routed_experts // 2, PruningError(*[jnp.zeros(())] * 4), 0.5),)
    scores_E = np.arange(config.n_routed_experts, dtype=float)
    block = BlockMeasures(errors, dict.fromkeys(own, 0.25), scores_E, scores_E, pruned, {})
    divergence = {
        change.name: slope_of(family, layer) * 0.25
        for family, by_layer in rounding_probes(config, recipe.formats).items()
        for layer, change in by_layer.items()
    }
    blocks = dict.fromkeys(range(config.num_hidden_layers), block)
    return Measured(blocks, {"embed": errors["self_attn.o"], "head": errors["self_attn.o"]}, divergence)


def test_between_the_layers_that_are_probed_slopes_are_interpolated() -> None:
    config = large_config()
    recipe = Recipe(tuple(map(parse_format, ("int2g128", "int3g128", "int4g128"))))
    slopes = {QUERIES: 3.0, VALUES: 2.0, EXPERTS_WIDE: 5.0, EXPERTS_DOWN: 7.0}

    def slope_of(family: str, layer: int) -> float:
        return slopes.get(family, 1.0) * (100 - layer)

    prices = Prices(with_slopes(config, recipe, slope_of), config, recipe)
    for layer in (0, 1, 17, 40, 60):
        for own in ("self_attn.q_a", "self_attn.o"):
            # Of 0.25 in int3, whose error is 2, twice that in int2.
            expected = slope_of(family_of(own), layer) * 0.25 * np.asarray([2.0, 1.0, 0.5])
            np.testing.assert_allclose(prices.of_weight(layer, own), expected)
    for layer in (3, 17, 60):
        # Of 0.25 in int2, whose error is 4 for both experts.
        expected = slope_of(EXPERTS_DOWN, layer) * 0.25 / 2 * np.asarray([[1.0, 0.5, 0.25]] * 2)
        np.testing.assert_allclose(prices.of_weight(layer, "mlp.experts.down"), expected)


def test_super_experts_are_spared_wherever_they_are_known_to_matter() -> None:
    """Two experts put out a hundred times what others do: one in an early layer, one in the last quarter of them."""
    config, recipe = large_config(), Recipe((parse_format("int4g128"),))
    measured = with_slopes(config, recipe, lambda *_: 1.0)
    early, late, expert = 10, 50, 7
    peak_E = np.where(np.arange(config.n_routed_experts) == expert, 100.0, 1.0)
    blocks = {
        i: replace(own, peak_E=peak_E if i in (early, late) else np.ones(config.n_routed_experts))
        for i, own in measured.blocks.items()
    }

    def spared(recipe: Recipe) -> list[int]:
        pruning = Prices(replace(measured, blocks=blocks), config, recipe).pruning()
        return [i for i, own in pruning.items() if expert not in own.order]

    assert spared(recipe) == [early]
    assert spared(replace(recipe, protect_super_experts=False)) == []


def test_there_are_as_many_probes_however_many_experts_and_layers() -> None:
    config, formats = large_config(), RECIPE.formats
    larger = replace(config, num_hidden_layers=2 * config.num_hidden_layers, n_routed_experts=512)
    assert len(changes_of(config, formats)) == len(changes_of(larger, formats)) <= 8 * (7 + 3) + 2 + 8
