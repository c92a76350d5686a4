"""A plan carried out on a small model: what every weight becomes, and that nothing else happens."""

import dataclasses
import gc
import weakref
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import subjaxprs

from leaf_oracle import to_numpy
from moejax.calibrate import Inputs, Statistics, calibrate
from moejax.checkpoint.abstract import abstract_original
from moejax.errors import InputError
from moejax.formats import ExpertWeights, GroupedCodes, Leaf, dense, describe, format_name, parse_format, payload_bytes
from moejax.model import DeepseekV3, named_leaves
from moejax.model.moe import MoE
from moejax.model.source import ModelSource
from moejax.planning import KEEP, BlockPlan, Method, Plan
from moejax.planning.plan import PROJECTIONS
from moejax.transforms.choose_damping import choose_damping
from moejax.transforms.compress import Collected, calibrate_and_compress, compress
from moejax.transforms.rounding import round_weight
from seen_by_blocks import statistics_with_hessians
from small_models import CHUNKS, CONFIG, RAW_CONFIG, small_model, small_statistics

HELD_OUT = np.random.RandomState(1).randint(CONFIG.vocab_size, size=(4, 14)).astype(np.int32)
BLOCKS = ["layers.0", "layers.1", "layers.2", "mtp.0.block"]
EVERY_EXPERT = tuple(range(CONFIG.n_routed_experts))
PLAN = Plan(
    embed="int4g64",
    head=KEEP,
    blocks=(
        BlockPlan({"self_attn.q_a": "int4g64", "self_attn.k_b": "int4g32", "mlp.up": KEEP}),
        BlockPlan(
            {"self_attn.q_a": "int2g64", "mlp.shared.gate": "int3g64"},
            keep=(0, 1, 3, 4, 6, 8, 9, 11),
            experts={
                "gate": ("int2g64", KEEP, "int3g64", "int2g64", "int3g64", KEEP, "int2g64", "int3g64"),
                "up": ("int3g64",) * 8,
                "down": (KEEP, "int2g32", "int2g32", KEEP, KEEP, KEEP, "int2g32", "int2g32"),
            },
            experts_per_token=2,
            routing_scale=1.25,
        ),
        BlockPlan(keep=EVERY_EXPERT, experts={name: (KEEP,) * 12 for name in PROJECTIONS}, experts_per_token=3),
        BlockPlan(
            {"eh_proj": "int4g64", "mlp.shared.up": "int3g64"},
            keep=(2, 3, 4, 7, 10, 11),
            experts={"gate": (KEEP,) * 6, "up": ("int2g64", "int3g64") * 3, "down": ("int2g32",) * 6},
            experts_per_token=3,
        ),
    ),
)


def inputs(mtp: bool) -> tuple[DeepseekV3, Plan, Statistics]:
    """Model, plan and statistics, with the MTP block or without."""
    count = CONFIG.num_hidden_layers + mtp
    plan = dataclasses.replace(PLAN, blocks=PLAN.blocks[:count])
    statistics = dataclasses.replace(small_statistics(), blocks=small_statistics().blocks[:count])
    return small_model(mtp), plan, statistics


@cache
def compressed(mtp: bool = True) -> DeepseekV3:
    return compress(*inputs(mtp))


def full_name(index: int, own: str) -> str:
    """What the model calls a weight of a block, or the MTP block's eh_proj, which lies outside its decoder block."""
    return "mtp.0.eh_proj" if own == "eh_proj" else f"{BLOCKS[index]}.{own}"


def rounded(leaf: Leaf, moment: jax.Array, target: str) -> Leaf:
    """What a weight becomes when it is quantized alone."""
    if target == KEEP:
        return leaf
    return round_weight(jnp.asarray(to_numpy(leaf), jnp.float32), Inputs(moment), parse_format(target))


def assert_same_bits(found: Any, expected: Any) -> None:
    jax.tree.map(_assert_same_bits, found, expected)


def _assert_same_bits(found: jax.Array, expected: jax.Array) -> None:
    assert_same_shape(found, expected)
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def assert_same_shape(found: jax.Array, expected: jax.Array) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("mtp", [True, False])
def test_shapes_alone_give_the_result_s_shapes(mtp: bool) -> None:
    model, plan, statistics = inputs(mtp)
    abstract = jax.eval_shape(partial(compress, plan=plan), model, statistics=statistics)
    jax.tree.map(assert_same_shape, abstract, compressed(mtp))
    assert payload_bytes(abstract) == payload_bytes(compressed(mtp)) < payload_bytes(model)


def test_in_a_trace_every_byte_is_the_same() -> None:
    model, plan, statistics = inputs(mtp=True)
    traced = jax.jit(partial(compress, plan=plan))(model, statistics=statistics)
    assert_same_bits(named_leaves(traced), named_leaves(compressed()))


def test_what_is_traced_does_not_grow_with_the_number_of_experts() -> None:
    assert equations(24) == equations(12) > 1000


def equations(num_experts: int) -> int:
    """How many the jaxpr of a compression has, loops' bodies included: a third of the experts pruned, the rest in
    three formats."""
    model = abstract_original(RAW_CONFIG | {"n_routed_experts": num_experts, "num_nextn_predict_layers": 0})
    statistics = jax.eval_shape(lambda m: calibrate(m, np.zeros((1, 8), np.int32)), model)
    keep = tuple(e for e in range(num_experts) if e % 3)
    formats = tuple(("int2g32", "int4g32", "ternaryg32", KEEP)[e % 4] for e in range(len(keep)))
    block = BlockPlan({"self_attn.o": "int4g32"}, keep, dict.fromkeys(PROJECTIONS, formats), 2)
    plan = Plan("int4g64", KEEP, (BlockPlan(), block, block))
    return count_equations(jax.make_jaxpr(partial(compress, plan=plan))(model, statistics=statistics).jaxpr)


def count_equations(jaxpr: Any) -> int:
    return len(jaxpr.eqns) + sum(map(count_equations, subjaxprs(jaxpr)))


def test_every_block_has_the_plan_s_experts() -> None:
    leaves = named_leaves(compressed())
    assert describe(leaves["layers.1.mlp.experts.gate"]) == "fp8b32x64[2,96,64]+int2g64[3,96,64]+int3g64[3,96,64]"
    assert describe(leaves["layers.2.mlp.experts.gate"]) == "fp8b32x64[12,96,64]"
    assert describe(leaves["mtp.0.block.mlp.experts.up"]) == "int2g64[3,96,64]+int3g64[3,96,64]"
    layers = [layer.mlp for layer in compressed().layers]
    experts = [(mlp.num_experts, mlp.experts_per_token) for mlp in layers if isinstance(mlp, MoE)]
    assert experts == [(8, 2), (12, 3)]
    drafting = compressed().mtp[0].block.mlp
    assert isinstance(drafting, MoE) and (drafting.num_experts, drafting.experts_per_token) == (6, 3)


def test_every_weight_the_plan_names_is_that_weight_quantized_alone() -> None:
    before, after, statistics = named_leaves(small_model()), named_leaves(compressed()), small_statistics()
    assert_same_bits(after["embed"], rounded(before["embed"], jnp.ones(CONFIG.hidden_size), "int4g64"))
    for index, (plan, sums) in enumerate(zip(PLAN.blocks, statistics.blocks, strict=True)):
        for own, target in plan.formats.items():
            name = full_name(index, own)
            expected = rounded(before[name], sums.input2[own] / sums.tokens, target)
            assert_same_bits(after[name], expected)
            assert target == KEEP or format_name(after[name]) == target


def test_every_other_weight_keeps_its_bytes() -> None:
    before, after = named_leaves(small_model()), named_leaves(compressed())
    assert before.keys() == after.keys()
    named = {"embed"} | {full_name(i, own) for i, plan in enumerate(PLAN.blocks) for own in plan.formats}
    for name in before.keys() - named:
        is_per_expert = name.endswith(("mlp.router", "mlp.bias", "mlp.group_id"))
        if is_per_expert:
            plan = PLAN.blocks[next(i for i, prefix in enumerate(BLOCKS) if name.startswith(prefix))]
            assert_same_bits(after[name], before[name][np.asarray(plan.keep)])
        elif ".experts." not in name and not name.endswith("routing_scale"):
            assert_same_bits(after[name], before[name])


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("index", [1, 2, 3])
def test_every_expert_is_that_expert_quantized_alone(index: int, projection: str) -> None:
    name, plan = f"{BLOCKS[index]}.mlp.experts.{projection}", PLAN.blocks[index]
    before, after = named_leaves(small_model())[name], named_leaves(compressed())[name]
    sums = small_statistics().blocks[index].experts
    assert isinstance(before, ExpertWeights) and isinstance(after, ExpertWeights)
    assert sums is not None and plan.keep is not None
    moment_EI = sums.input_second_moment(projection)
    assert after.num_experts == len(plan.keep)
    for new, (old, target) in enumerate(zip(plan.keep, plan.experts[projection], strict=True)):
        assert_same_bits(after.expert(new), rounded(before.expert(old), moment_EI[old], target))


def test_the_routing_scale_is_the_plan_s() -> None:
    after = named_leaves(compressed())
    assert [float(after[f"{prefix}.mlp.routing_scale"]) for prefix in BLOCKS[1:]] == [1.25, 1.0, 1.0]


def test_the_same_inputs_give_the_same_bytes_and_stay_as_they_are() -> None:
    model, plan, statistics = inputs(mtp=True)
    before = jax.tree.map(np.array, (named_leaves(model), statistics))
    assert_same_bits(named_leaves(compress(model, plan, statistics)), named_leaves(compressed()))
    assert_same_bits((named_leaves(model), statistics), before)


def test_the_blocks_of_a_model_without_mtp_are_the_same() -> None:
    whole, without = named_leaves(compressed()), named_leaves(compressed(mtp=False))
    assert without.keys() == {name for name in whole if not name.startswith("mtp.")}
    assert_same_bits(without, {name: whole[name] for name in without})


def test_an_empty_plan_changes_nothing_but_what_it_names() -> None:
    model, _, statistics = inputs(mtp=True)
    after = named_leaves(compress(model, Plan(KEEP, "int4g64", (BlockPlan(),) * 4), statistics))
    before = named_leaves(model)
    head = rounded(before["head"], statistics.head_input2 / statistics.tokens, "int4g64")
    assert_same_bits(after, before | {"head": head})


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"self_attn.o": "int9g32"}, "unknown format 'int9g32'"),
        ({"mlp.dwon": "int4g32"}, "gives a format to 'mlp.dwon', which is no matrix of block 0"),
        ({"eh_proj": "int4g32"}, "gives a format to 'eh_proj', which is no matrix of block 0"),
    ],
)
def test_a_plan_that_does_not_suit_the_model_is_refused(formats: dict[str, str], message: str) -> None:
    model, plan, statistics = inputs(mtp=False)
    blocks = (BlockPlan(formats), *plan.blocks[1:])
    with pytest.raises(InputError, match=message):
        compress(model, dataclasses.replace(plan, blocks=blocks), statistics)


def test_with_hessians_every_matrix_is_rounded_with_error_feedback() -> None:
    """Each by its own input's Hessian, an expert's by that of its number in the original."""
    statistics = statistics_with_hessians()
    leaves = named_leaves(compress(small_model(), PLAN, statistics))
    block = statistics.blocks[1]
    assert block.experts is not None
    q_a = round_weight(original("layers.1.self_attn.q_a"), block.inputs("self_attn.q_a"), parse_format("int2g64"))
    assert_same_bits(leaves["layers.1.self_attn.q_a"], q_a)
    experts, survivor = leaves["layers.1.mlp.experts.up"], 4
    assert isinstance(experts, ExpertWeights)
    number = PLAN.blocks[1].keep[survivor]  # type: ignore[index]
    one = round_weight(
        original("layers.1.mlp.experts.up", number), block.experts.inputs("up", number), parse_format("int3g64")
    )
    assert_same_bits(experts.expert(survivor), one)
    plain = named_leaves(compressed())
    assert isinstance(q_a, GroupedCodes)
    assert not np.array_equal(q_a.words, plain["layers.1.self_attn.q_a"].words)
    assert_same_bits(leaves["embed"], plain["embed"])


def original(name: str, expert: int | None = None) -> jax.Array:
    leaf = named_leaves(small_model())[name]
    return dense(leaf if expert is None else leaf.expert(expert), jnp.float32)


SHALLOW = dataclasses.replace(PLAN, embed=KEEP, blocks=(PLAN.blocks[0], *(BlockPlan(),) * 3))


SEQUENTIAL = Method(error_feedback=True, sequential=True)


def in_sequence(plan: Plan, statistics: Statistics, method: Method = SEQUENTIAL) -> dict[str, Any]:
    """The plan's leaves, calibration following compression, damped as `statistics` say."""
    return on_the_way(dataclasses.replace(plan, method=method), statistics)


def on_the_way(plan: Plan, known: Statistics | None = None) -> dict[str, Any]:
    parts = Collected()
    calibrate_and_compress(ModelSource(small_model()), plan, CHUNKS, HELD_OUT, parts, known=known, batch=2)
    return parts.leaves


@pytest.mark.parametrize("error_feedback", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_statistics_made_on_the_way_give_the_same_bytes(error_feedback: bool) -> None:
    """As those of the whole model at once, damping chosen where there are Hessians."""
    statistics = small_statistics()
    if error_feedback:
        held_out = calibrate(small_model(), HELD_OUT, batch=2, hessians=True)
        statistics = choose_damping(small_model(), statistics_with_hessians(), held_out)
    expected = named_leaves(compress(small_model(), PLAN, statistics))
    found = on_the_way(dataclasses.replace(PLAN, method=Method(error_feedback)))
    assert list(found) != [] and found.keys() == expected.keys()
    assert_same_bits({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("own", ["sequential", "output_fit"])
def test_one_block_at_a_time_is_in_memory(own: str) -> None:
    """Each is asked for when those before it, and what became of them, are let go of."""
    lent: list[Any] = []

    @dataclasses.dataclass(frozen=True)
    class Lending(ModelSource):
        def block(self, index: int) -> Any:
            assert not [own for own in lent if own() is not None], f"alive when block {index} was asked for"
            block = super().block(index)

            def lend(part: Any) -> Any:
                copy = jax.tree.map(jnp.copy, part)
                lent.extend(weakref.ref(array) for array in jax.tree.leaves(copy))
                return copy

            trunk = lend(block.trunk)
            return dataclasses.replace(block, trunk=trunk, experts_of=lambda members: lend(block.experts_of(members)))

    class Named(Collected):
        def add(self, leaves: Mapping[str, Any]) -> None:
            self.leaves |= dict.fromkeys(leaves)

    parts = Named()
    plan = dataclasses.replace(PLAN, method=Method(**{"error_feedback": True, own: True}))
    gc.disable()
    try:
        calibrate_and_compress(Lending(small_model()), plan, CHUNKS, HELD_OUT, parts)
    finally:
        gc.enable()
    assert lent and parts.leaves.keys() == named_leaves(small_model()).keys()


def test_in_sequence_the_first_rounded_block_is_as_without() -> None:
    """Up to it nothing has changed; the float32 sums may differ in the last bits, and a few codes with them."""
    found = in_sequence(SHALLOW, statistics_with_hessians())
    alone = named_leaves(compress(small_model(), SHALLOW, statistics_with_hessians()))
    for name in ("layers.0.self_attn.q_a", "layers.0.self_attn.k_b"):
        a, b = (np.asarray(dense(leaves[name], jnp.dtype("float32"))) for leaves in (found, alone))
        assert np.mean(a != b) < 0.01
    assert_same_bits(found["layers.1.self_attn.q_a"], alone["layers.1.self_attn.q_a"])


def test_in_sequence_a_block_is_rounded_by_what_the_compressed_ones_put_out() -> None:
    """As if the compressed blocks before it had been calibrated with it, its pruned experts never chosen."""
    leaves, original_leaves = in_sequence(PLAN, statistics_with_hessians()), named_leaves(small_model())
    before = {name: leaf for name, leaf in leaves.items() if name == "embed" or name.startswith("layers.0.")}
    masked = {
        "layers.1.mlp.bias": original_leaves["layers.1.mlp.bias"]
        - 1e9 * ~np.isin(range(12), PLAN.blocks[1].keep or ()),
        "layers.1.mlp.routing_scale": jnp.float32(1.25),
    }
    mixed = DeepseekV3(CONFIG, (original_leaves | before | masked).__getitem__, [3, 2, 3, 3])
    sums = calibrate(mixed, CHUNKS, batch=2, hessians=True).blocks[1]
    target = parse_format("int2g64")
    expected = round_weight(original("layers.1.self_attn.q_a"), sums.inputs("self_attn.q_a"), target)
    a, b = (np.asarray(dense(leaf, jnp.dtype("float32"))) for leaf in (leaves["layers.1.self_attn.q_a"], expected))
    assert np.mean(a != b) < 0.01
    assert sums.experts is not None
    one = round_weight(original("layers.1.mlp.experts.up", 6), sums.experts.inputs("up", 6), parse_format("int3g64"))
    a, b = (
        np.asarray(dense(leaf, jnp.dtype("float32"))) for leaf in (leaves["layers.1.mlp.experts.up"].expert(4), one)
    )
    assert np.mean(a != b) < 0.01
    plain = named_leaves(compress(small_model(), PLAN, statistics_with_hessians()))["layers.1.self_attn.q_a"]
    assert (
        np.mean(np.asarray(dense(plain, jnp.dtype("float32"))) != np.asarray(dense(expected, jnp.dtype("float32"))))
        > 0.01
    )


def test_in_sequence_shapes_are_the_same() -> None:
    found = in_sequence(PLAN, small_statistics(), Method(sequential=True))
    jax.tree.map(assert_same_shape, found, dict(named_leaves(compressed())))


def test_in_sequence_damping_is_what_was_chosen() -> None:
    """For the original, on tokens left out; nothing is left out of what compressed blocks are calibrated on."""
    statistics = statistics_with_hessians()
    first = statistics.blocks[0]
    chosen = dataclasses.replace(first, damping={"self_attn.q_a": jnp.float32(3.0)})
    statistics = dataclasses.replace(statistics, blocks=(chosen, *statistics.blocks[1:]), head_damping=jnp.float32(0.1))
    plan = dataclasses.replace(SHALLOW, head="int2g64")
    found = in_sequence(plan, statistics)
    inputs, to = first.inputs("self_attn.q_a"), parse_format(plan.blocks[0].formats["self_attn.q_a"])
    a, b, usual = (
        np.asarray(dense(leaf, jnp.dtype("float32")))
        for leaf in (
            found["layers.0.self_attn.q_a"],
            round_weight(original("layers.0.self_attn.q_a"), inputs._replace(damping=3.0), to),
            round_weight(original("layers.0.self_attn.q_a"), inputs, to),
        )
    )
    assert np.mean(a != b) < 0.01 < np.mean(a != usual)
    plain = in_sequence(plan, statistics_with_hessians())
    assert not np.array_equal(found["head"].words, plain["head"].words)
