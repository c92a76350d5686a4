import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.formats import dense, parse_group_format
from moejax.model import named_leaves
from moejax.pipeline.compress import Prepared
from moejax.pipeline.options import options
from moejax.pipeline.working_copy import one_bucket, with_leaves
from moejax.planning.costs import Costs, Menu
from moejax.planning.plan import PROJECTIONS
from moejax.transforms.quantize import quantize
from small_job import RECIPE

BLOCKS = ("mtp.0.block", "layers.2")


@pytest.fixture(scope="module")
def costs(prepared: Prepared) -> Costs:
    return prepared.problem.costs


@pytest.fixture(scope="module")
def free(prepared: Prepared) -> Costs:
    return options(prepared.model, RECIPE)


def menus(costs: Costs) -> list[Menu]:
    return [costs.tensors, *(menu for block in costs.experts.values() for menu in block.menus.values())]


def test_every_option_has_a_cost_and_only_they_have(costs: Costs, free: Costs) -> None:
    assert costs.names == free.names and costs.experts.keys() == free.experts.keys() == {1, 2, 3}
    for measured, allowed in zip(menus(costs), menus(free), strict=True):
        np.testing.assert_array_equal(measured.bytes_NF, allowed.bytes_NF)
        np.testing.assert_array_equal(np.isfinite(measured.cost_NF), np.isfinite(allowed.cost_NF))
        assert np.all(measured.cost_NF >= 0)
        assert np.all(measured.cost_NF[:, -1] == 0)


def test_formats_that_are_not_allowed_are_measured_too(prepared: Prepared, free: Costs) -> None:
    """Plans that the recipe forbids can be predicted with them; here every format fits every weight."""
    assert np.any(np.isinf(free.tensors.cost_NF))
    assert all(np.all(np.isfinite(menu.cost_NF)) for menu in menus(prepared.costs))


def test_more_bits_cost_less(costs: Costs) -> None:
    for menu in menus(costs):
        # Forbidden formats of few bits are infinite, and differences of them are no numbers.
        with np.errstate(invalid="ignore"):
            assert not np.any(np.diff(menu.cost_NF, axis=1) > 0)
            assert np.all(menu.cost_NF[:, -2] < menu.cost_NF[:, menu.formats.index("int4g128")])


def test_a_weights_cost_at_the_probed_format_is_its_true_divergence(prepared: Prepared) -> None:
    name, own = "layers.1.self_attn.o", "self_attn.o"
    moment = prepared.trial.statistics.blocks[1].input_second_moment(own)
    weight = named_leaves(prepared.trial.probe.blocks[1])[own]
    rounded = dense(quantize(weight, moment, parse_group_format("int3g128")), jnp.dtype(jnp.float32))
    changed = with_leaves(prepared.trial.probe.blocks[1], {own: rounded})
    n, menu = prepared.costs.names.index(name), prepared.costs.tensors
    cost = menu.cost_NF[n, menu.formats.index("int3g128")]
    assert cost == pytest.approx(prepared.trial.probe.divergence_of_block(1, changed), rel=1e-3)


def test_the_experts_costs_at_the_probed_format_sum_to_their_true_divergence(prepared: Prepared) -> None:
    sums, block = prepared.trial.statistics.blocks[2].experts, prepared.trial.probe.blocks[2]
    assert sums is not None
    moment_EI = sums.input_second_moment("up")
    experts = named_leaves(block)["mlp.experts.up"].buckets[0]
    rounded = [quantize(w, moment_EI[e], parse_group_format("int2g128")) for e, w in enumerate(experts)]
    stacked = one_bucket(jnp.stack([dense(w, jnp.dtype(jnp.float32)) for w in rounded]))
    divergence = prepared.trial.probe.divergence_of_block(2, with_leaves(block, {"mlp.experts.up": stacked}))
    menu = prepared.costs.experts[2].menus["up"]
    assert np.sum(menu.cost_NF[:, menu.formats.index("int2g128")]) == pytest.approx(divergence, rel=1e-3)


def test_mtp_blocks_take_the_last_layers_scales(prepared: Prepared, costs: Costs) -> None:
    """Their errors are their own, so costs differ, but not by orders of magnitude from those of equal weights."""
    bits4 = costs.tensors.formats.index("int4g128")
    for projection in PROJECTIONS:
        own, last = (costs.experts[block].menus[projection].cost_NF[:, 0].sum() for block in (3, 2))
        assert last / 10 < own < last * 10
    for name in ("self_attn.q_a", "self_attn.o", "mlp.shared.down"):
        own, last = (costs.tensors.cost_NF[costs.names.index(f"{block}.{name}"), bits4] for block in BLOCKS)
        assert last / 10 < own < last * 10
    assert costs.tensors.cost_NF[costs.names.index("mtp.0.eh_proj"), bits4] > 0


def test_what_is_measured_is_not_changed(prepared: Prepared) -> None:
    for name, leaf in named_leaves(prepared.model).items():
        jax.tree.map(np.testing.assert_array_equal, leaf, prepared.checkpoint.leaf(name))
