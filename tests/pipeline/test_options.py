from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.calibrate import calibrate
from moejax.checkpoint.load import open_checkpoint
from moejax.errors import InputError
from moejax.formats import ExpertWeights, IntFormat, payload_bytes
from moejax.model import DeepseekV3, config_from_hf, named_leaves
from moejax.pipeline.check import require_original
from moejax.pipeline.options import (
    allowed_counts,
    limited_counts,
    moe_blocks,
    options,
    order_of_pruning,
    quantizable,
)
from moejax.pipeline.recipe import Recipe
from moejax.planning.allocate import plan_of_choice
from moejax.planning.menus import Menus
from moejax.planning.plan import KEEP, PROJECTIONS
from moejax.planning.solve import Choice, choice_bytes
from moejax.transforms.compress import compress
from small_checkpoint import CONFIG as RAW_CONFIG

# Groups that divide rows of 128 inputs, and one that is longer.
RECIPE = Recipe(formats=(IntFormat(1, 64), IntFormat(2, 128), IntFormat(3, 64), IntFormat(8, 128), IntFormat(4, 256)))
CONFIG = config_from_hf(RAW_CONFIG)


@pytest.fixture(scope="module")
def model(small: Path) -> DeepseekV3:
    """The small checkpoint's model in shapes alone."""
    return require_original(open_checkpoint(small)).abstract_model()


@pytest.fixture(scope="module")
def tiny_model(tiny: Path) -> DeepseekV3:
    return require_original(open_checkpoint(tiny)).abstract_model()


def row(costs: Menus, name: str) -> dict[str, tuple[int, float]]:
    """Bytes and cost of one weight by format."""
    n, menu = costs.names.index(name), costs.tensors
    return dict(zip(menu.formats, zip(menu.bytes_NF[n].tolist(), menu.cost_NF[n].tolist(), strict=True), strict=True))


def test_bytes_of_every_format(model: DeepseekV3) -> None:
    own = row(options(model, RECIPE), "layers.1.self_attn.kv_a")
    numbers = 160 * 128
    assert own["int1g64"] == (numbers // 8 + numbers // 64 * 2, np.inf)
    assert own["int2g128"] == (numbers // 4 + numbers // 128 * 2, 0)
    assert own["int3g64"] == (numbers * 3 // 8 + numbers // 64 * 2, 0)
    assert own["int8g128"] == (numbers + numbers // 128 * 2, 0)
    assert own["int4g256"] == (numbers // 2 + 160 * 2, 0)
    assert own[KEEP] == (2 * numbers, 0)


@pytest.mark.parametrize("seed", range(3))
def test_bytes_of_a_choice_are_those_of_the_model_it_makes(model: DeepseekV3, seed: int) -> None:
    costs = options(model, RECIPE)
    choice = random_choice(costs, np.random.RandomState(seed))
    plan = plan_of_choice(costs, choice, model.config)
    statistics = jax.eval_shape(lambda m: calibrate(m, np.zeros((1, 8), np.int32)), model)
    compressed = named_leaves(jax.eval_shape(partial(compress, plan=plan), model, statistics=statistics))
    experts = [bucket for leaf in compressed.values() if isinstance(leaf, ExpertWeights) for bucket in leaf.buckets]
    assert choice_bytes(costs, choice) == payload_bytes([experts, [compressed[name] for name in quantizable(model)]])


def random_choice(costs: Menus, random: np.random.RandomState) -> Choice:
    """Any allowed format for every weight, any number of experts pruned."""

    def any_allowed(cost_NF: np.ndarray) -> np.ndarray:
        return np.argmax(np.where(np.isfinite(cost_NF), random.rand(*cost_NF.shape), -1), axis=1)

    pruned = {block: random.randint(len(menu.order) + 1) for block, menu in costs.experts.items()}
    expert = {
        block: {projection: any_allowed(own.cost_NF) for projection, own in menu.menus.items()}
        for block, menu in costs.experts.items()
    }
    return Choice(any_allowed(costs.tensors.cost_NF), pruned, expert)


def test_what_may_be_rounded_is_every_matrix_but_the_routers(model: DeepseekV3) -> None:
    names = set(quantizable(model))
    others = set(named_leaves(model)) - names
    assert {"embed", "head", "layers.0.mlp.gate", "layers.2.self_attn.v_b", "mtp.0.eh_proj"} <= names
    assert all(".experts." in name or name.endswith(("norm", "router", "bias", "_id", "_scale")) for name in others)
    assert options(model, RECIPE).names == tuple(quantizable(model))


def test_floors_of_bits(model: DeepseekV3) -> None:
    costs = options(model, Recipe(min_bits_outer=5, min_bits_block=3))
    allowed = {name: [form for form, (_, cost) in row(costs, name).items() if cost == 0] for name in costs.names}
    last = "layers.2.mlp.shared.up"
    for name in ("embed", "head", last):
        assert allowed[name] == ["int5g128", "int6g128", "int7g128", "int8g128", KEEP]
    for name in ("layers.1.mlp.shared.up", "layers.0.mlp.down", "layers.2.self_attn.o", "mtp.0.block.mlp.shared.up"):
        assert allowed[name] == ["int3g128", "int4g128", "int5g128", "int6g128", "int7g128", "int8g128", KEEP]
    for menu in costs.experts.values():
        assert all(np.all(own.cost_NF == 0) for own in menu.menus.values())


def test_a_format_that_saves_nothing_is_not_allowed(tiny_model: DeepseekV3) -> None:
    """FP8 blocks take a byte a number already, and 8 bits with scales take more."""
    costs = options(tiny_model, Recipe())
    o, embed = row(costs, "layers.1.self_attn.o"), row(costs, "embed")
    assert o[KEEP][0] < o["int8g128"][0] and o["int8g128"][1] == np.inf and o["int6g128"][1] == 0
    assert embed["int8g128"][1] == 0
    gate = costs.experts[1].menus["gate"]
    assert np.all(np.isinf(gate.cost_NF[:, gate.formats.index("int8g128")]))


def test_weights_without_a_format_are_named(model: DeepseekV3, tiny_model: DeepseekV3) -> None:
    assert options(model, RECIPE).without_format == options(tiny_model, Recipe()).without_format == ()
    # The floors allow embedding, head and the last layer's shared expert no two bits.
    shared = [f"layers.2.mlp.shared.{projection}" for projection in PROJECTIONS]
    two_bits = Recipe(formats=(IntFormat(2, 128),))
    assert sorted(options(model, two_bits).without_format) == sorted(["embed", "head", *shared])
    # Eight bits and scales save nothing on FP8.
    eight_bits = options(tiny_model, Recipe(formats=(IntFormat(8, 128),))).without_format
    assert {"layers.0.mlp.down", "layers.4.mlp.experts.up"} <= set(eight_bits)
    assert not {"embed", "head"} & set(eight_bits)


def test_experts_that_can_go(model: DeepseekV3, tiny_model: DeepseekV3) -> None:
    costs = options(model, RECIPE)
    assert list(costs.experts) == moe_blocks(model) == [1, 2, 3]
    for menu in costs.experts.values():
        # 12 experts in 3 groups, of which 2 are chosen, and 3 experts of those: a group keeps 2.
        assert (menu.num_experts, len(menu.order), len(menu.pruning_cost)) == (12, 6, 7)
        assert np.all(np.bincount(np.setdiff1d(np.arange(12), menu.order) // 4) == 2)
        assert set(menu.menus) == set(PROJECTIONS)
    assert {len(menu.order) for menu in options(tiny_model, RECIPE).experts.values()} == {32 - 4 * 2}


def test_a_ternary_code_is_below_two_bits(model: DeepseekV3) -> None:
    for least, cost in ((2, np.inf), (1, 0.0)):
        costs = options(model, Recipe(min_bits_block=least))
        assert row(costs, "layers.1.self_attn.o")["ternaryg128"] == (128 * 7 * 4 + 128 * 2, cost)
        assert row(costs, "head")["ternaryg128"][1] == np.inf
        assert np.all(costs.experts[1].menus["up"].cost_NF == 0)


SCORES: st.SearchStrategy[np.ndarray] = st.permutations(range(12)).map(np.asarray)


def per_group(experts: np.ndarray) -> list[int]:
    """How many of these experts every group of the small checkpoint has."""
    return np.bincount(experts // 4, minlength=3).tolist()


@given(SCORES, st.sets(st.integers(0, 11), max_size=12), st.sampled_from(["ragged", "equal"]))
def test_protected_experts_never_go_and_every_group_keeps_two(
    scores_E: np.ndarray, spared: set[int], groups: str
) -> None:
    protected_E = np.isin(np.arange(12), list(spared))
    recipe = Recipe(groups="equal" if groups == "equal" else "ragged")
    order = order_of_pruning(scores_E, CONFIG, recipe, protected_E)
    assert not spared & set(order.tolist()) and len(set(order.tolist())) == len(order)
    can_go = [min(2, 4 - len(spared & set(range(4 * group, 4 * group + 4)))) for group in range(3)]
    assert per_group(order) == ([min(can_go)] * 3 if groups == "equal" else can_go)
    if groups == "ragged":
        assert np.all(np.diff(scores_E[order]) > 0)


@given(SCORES)
def test_equal_groups_may_lose_only_the_same_number_each(scores_E: np.ndarray) -> None:
    recipe = Recipe(groups="equal")
    order = order_of_pruning(scores_E, CONFIG, recipe)
    allowed = allowed_counts(order, CONFIG, recipe)
    assert allowed.tolist() == [0, np.inf, np.inf, 0, np.inf, np.inf, 0]
    for count in np.flatnonzero(allowed == 0):
        assert len(set(per_group(order[:count]))) == 1


def test_ragged_groups_may_lose_any_number(model: DeepseekV3) -> None:
    assert np.all(allowed_counts(np.arange(6), CONFIG, Recipe()) == 0)
    for menu in options(model, Recipe()).experts.values():
        assert np.all(menu.pruning_cost == 0)


@pytest.mark.parametrize(
    ("share", "groups", "kept"),
    [
        (1.0, "ragged", 12),
        (0.75, "ragged", 9),
        (0.7, "ragged", 9),
        (0.55, "ragged", 7),
        (0.42, "ragged", 6),
        (0.7, "equal", 9),
        (0.76, "equal", 12),
        (0.55, "equal", 9),
        (0.4, "equal", 6),
        (1, "equal", 12),
    ],
)
def test_a_share_of_experts_is_one_number_rounded_up(model: DeepseekV3, share: float, groups: str, kept: int) -> None:
    recipe = Recipe(share_kept=share, groups="equal" if groups == "equal" else "ragged")
    for menu in options(model, recipe).experts.values():
        assert np.flatnonzero(np.isfinite(menu.pruning_cost)).tolist() == [12 - kept]
        assert len(menu.pruning_cost) == 7


@pytest.mark.parametrize(
    ("share", "groups", "kept"), [(0.41, "ragged", 5), (0.25, "ragged", 3), (0.25, "equal", 3), (0.01, "equal", 3)]
)
def test_a_share_below_what_routing_needs_is_refused(model: DeepseekV3, share: float, groups: str, kept: int) -> None:
    recipe = Recipe(share_kept=share, groups="equal" if groups == "equal" else "ragged")
    message = rf"^share_kept {share} keeps {kept} of 12 experts; routing needs at least 6 of them$"
    with pytest.raises(InputError, match=message):
        options(model, recipe)


@pytest.mark.parametrize(
    ("multiple", "groups", "share", "kept"),
    [
        (2, "ragged", None, [12, 10, 8, 6]),
        (4, "ragged", None, [12, 8]),
        (2, "equal", None, [12, 6]),
        # 12 is no multiple of these; all may stay.
        (5, "ragged", None, [12, 10]),
        (7, "ragged", None, [12, 7]),
        (8, "equal", None, [12]),
        (1024, "ragged", None, [12]),
        (4, "ragged", 0.55, [8]),
        (5, "ragged", 0.75, [10]),
        (5, "ragged", 0.9, [12]),
        (2, "equal", 0.7, [12]),
        (4, "ragged", 0.25, None),
    ],
)
def test_as_many_experts_stay_as_are_a_multiple_or_all(
    model: DeepseekV3, multiple: int, groups: str, share: float | None, kept: list[int] | None
) -> None:
    recipe = Recipe(share_kept=share, groups="equal" if groups == "equal" else "ragged", bucket_multiple=multiple)
    if kept is None:
        with pytest.raises(InputError, match=r"^share_kept 0.25 keeps 4 of 12 experts; routing needs at least 6 of"):
            options(model, recipe)
        return
    for menu in options(model, recipe).experts.values():
        assert (12 - np.flatnonzero(np.isfinite(menu.pruning_cost))).tolist() == kept


def test_counts_are_limited_beside_their_costs(model: DeepseekV3) -> None:
    free = options(model, Recipe())
    costly = replace(
        free,
        experts={i: replace(menu, pruning_cost=np.arange(7.0) + i) for i, menu in free.experts.items()},
    )
    limited = limited_counts(costly, CONFIG, Recipe(groups="equal"))
    for i, menu in limited.experts.items():
        assert menu.pruning_cost.tolist() == [i, np.inf, np.inf, 3 + i, np.inf, np.inf, 6 + i]
        assert menu.order is costly.experts[i].order and menu.menus is costly.experts[i].menus
    assert limited.tensors is costly.tensors
    with pytest.raises(InputError, match=r"share_kept 0.25 keeps 3 of 12"):
        limited_counts(costly, CONFIG, Recipe(share_kept=0.25))
