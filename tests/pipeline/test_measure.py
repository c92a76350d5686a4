import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.formats import dense, parse_int_format
from moejax.model import named_leaves
from moejax.pipeline.compress import Prepared
from moejax.pipeline.options import Settings, options
from moejax.pipeline.working_copy import one_bucket, with_leaves
from moejax.planning.costs import Costs, Menu
from moejax.planning.plan import PROJECTIONS
from moejax.transforms.prune import expert_scores, masked_bias
from moejax.transforms.quantize import quantize

BLOCKS = ("mtp.0.block", "layers.2")


@pytest.fixture(scope="module")
def costs(prepared: Prepared) -> Costs:
    return prepared.costs


@pytest.fixture(scope="module")
def free(prepared: Prepared) -> Costs:
    return options(prepared.model, Settings())


def menus(costs: Costs) -> list[Menu]:
    return [costs.tensors, *(menu for block in costs.experts.values() for menu in block.menus.values())]


def test_every_option_has_a_cost_and_only_they_have(costs: Costs, free: Costs) -> None:
    assert costs.names == free.names and costs.experts.keys() == free.experts.keys() == {1, 2, 3}
    for measured, allowed in zip(menus(costs), menus(free), strict=True):
        np.testing.assert_array_equal(measured.bytes_NF, allowed.bytes_NF)
        np.testing.assert_array_equal(np.isfinite(measured.cost_NF), np.isfinite(allowed.cost_NF))
        assert np.all(measured.cost_NF >= 0)
        assert np.all(measured.cost_NF[:, -1] == 0)


def test_more_bits_cost_less(costs: Costs) -> None:
    for menu in menus(costs):
        # Forbidden formats of few bits are infinite, and differences of them are no numbers.
        with np.errstate(invalid="ignore"):
            assert not np.any(np.diff(menu.cost_NF, axis=1) > 0)
            assert np.all(menu.cost_NF[:, -2] < menu.cost_NF[:, 3])


def test_a_weights_cost_at_the_probed_format_is_its_true_divergence(prepared: Prepared) -> None:
    name, own = "layers.1.self_attn.o", "self_attn.o"
    moment = prepared.statistics.blocks[1].input_second_moment(own)
    weight = named_leaves(prepared.probe.blocks[1])[own]
    rounded = dense(quantize(weight, moment, parse_int_format("int3g128")), jnp.dtype(jnp.float32))
    changed = with_leaves(prepared.probe.blocks[1], {own: rounded})
    n, menu = prepared.costs.names.index(name), prepared.costs.tensors
    cost = menu.cost_NF[n, menu.formats.index("int3g128")]
    assert cost == pytest.approx(prepared.probe.divergence_of_block(1, changed), rel=1e-3)


def test_the_experts_costs_at_the_probed_format_sum_to_their_true_divergence(prepared: Prepared) -> None:
    sums, block = prepared.statistics.blocks[2].experts, prepared.probe.blocks[2]
    assert sums is not None
    moment_EI = sums.input_second_moment("up")
    experts = named_leaves(block)["mlp.experts.up"].buckets[0]
    rounded = [quantize(w, moment_EI[e], parse_int_format("int2g128")) for e, w in enumerate(experts)]
    stacked = one_bucket(jnp.stack([dense(w, jnp.dtype(jnp.float32)) for w in rounded]))
    divergence = prepared.probe.divergence_of_block(2, with_leaves(block, {"mlp.experts.up": stacked}))
    menu = prepared.costs.experts[2].menus["up"]
    assert np.sum(menu.cost_NF[:, menu.formats.index("int2g128")]) == pytest.approx(divergence, rel=1e-3)


def test_experts_go_in_the_order_in_which_reap_needs_them_least(prepared: Prepared) -> None:
    for index, menu in prepared.costs.experts.items():
        sums = prepared.statistics.blocks[index].experts
        assert sums is not None
        score_E = expert_scores(sums, "reap")
        assert np.all(np.diff(score_E[menu.order]) >= 0)
        for group in range(3):
            kept = np.setdiff1d(np.arange(4 * group, 4 * group + 4), menu.order)
            gone = np.intersect1d(np.arange(4 * group, 4 * group + 4), menu.order)
            assert len(kept) == 2 and score_E[kept].min() >= score_E[gone].max()


def test_pruning_costs_what_masking_does(prepared: Prepared) -> None:
    for index in (1, 2):
        menu, block = prepared.costs.experts[index], prepared.probe.blocks[index]
        assert len(menu.pruning_cost) == len(menu.order) + 1 == 7
        assert menu.pruning_cost[0] == 0 and np.all(np.diff(menu.pruning_cost) >= 0) and menu.pruning_cost[1] > 0
        bias = masked_bias(named_leaves(block)["mlp.bias"], np.isin(np.arange(12), menu.order))
        divergence = prepared.probe.divergence_of_block(index, with_leaves(block, {"mlp.bias": bias}))
        assert menu.pruning_cost[-1] == pytest.approx(divergence, rel=1e-3)


def test_mtp_blocks_take_the_last_layers_scales(prepared: Prepared, costs: Costs) -> None:
    """Their errors are their own, so costs differ, but not by orders of magnitude from those of equal weights."""
    np.testing.assert_array_equal(costs.experts[3].pruning_cost, costs.experts[2].pruning_cost)
    for projection in PROJECTIONS:
        own, last = (costs.experts[block].menus[projection].cost_NF[:, 0].sum() for block in (3, 2))
        assert last / 10 < own < last * 10
    for name in ("self_attn.q_a", "self_attn.o", "mlp.shared.down"):
        own, last = (costs.tensors.cost_NF[costs.names.index(f"{block}.{name}"), 3] for block in BLOCKS)
        assert last / 10 < own < last * 10
    assert costs.tensors.cost_NF[costs.names.index("mtp.0.eh_proj"), 3] > 0


def test_what_is_measured_is_not_changed(prepared: Prepared) -> None:
    for name, leaf in named_leaves(prepared.model).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, prepared.checkpoint.leaf(name))
